"""The plan of a launch: what it says, what it refuses, and that it makes nothing."""

import dataclasses
import json
import shlex
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from launcher import corpus, objects, plan, record, security_group, speed
from launcher.aws import Account
from launcher.plan import Plan
from launcher.record import Record
from launcher.request import Request, parse
from tests.cloud.cloud import LocalCloud
from tests.cloud.server import Fault, Refusal
from txl_jax import results
from txl_jax.config import Config
from txl_jax.errors import UserError

pytest_plugins = ["tests.cloud.fixtures"]

BUCKET = "txl-123456789012-us-east-1"
LOGDIR = f"s3://{BUCKET}/runs/eight-machines"
SPOT = {"us-east-1c": 31.212 * 0.34, "us-east-1d": 31.212 * 0.36}
"""What the local cloud asks for a p3dn.24xlarge."""


@pytest.fixture
def account(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    for name, value in cloud.environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", cloud.environ["HOME"])
    # There is no server that could tell.
    monkeypatch.setattr(security_group, "own_public_address", lambda: "203.0.113.7")
    return Account.open()


def request(words: str = "") -> Request:
    return parse(["--config", "eight_machines", *shlex.split(words)])


def planned(account: Account, words: str = "") -> Plan:
    return plan.make(account, request(words))


def refusal(account: Account, words: str) -> str:
    with pytest.raises(UserError) as raised:
        planned(account, words)
    assert str(raised.value).isprintable()
    return str(raised.value)


def shown(found: Plan) -> dict[str, str]:
    """The rows that people see, by title."""
    console = Console(width=2000)
    with console.capture() as capture:
        console.print(plan.show(found))
    rows: dict[str, str] = {}
    for line in capture.get().splitlines():
        title, _, text = line.strip().partition("  ")
        rows[title] = f"{rows[title]}\n{text.strip()}" if title in rows else text.strip()
    return rows


def test_it_says_what_will_be_rented_and_trained(account):
    found = planned(account, "--lr 0.0001 --max-hours 10")
    rental = found.rental
    assert rental
    assert (rental.kind.gpus, rental.spot, rental.zones) == (8, True, tuple(SPOT))
    assert rental.prices == pytest.approx(SPOT, abs=1e-4)
    assert rental.image.needs_driver
    rows = shown(found)
    assert rows["run"] == f"eight-machines, config eight_machines, logs in {LOGDIR}"
    assert rows["hosts"].startswith("8 x p3dn.24xlarge (8 V100 of 32 GiB, 96 vCPUs, 768 GiB, EFA ")
    assert rows["hosts"].endswith("spot")
    assert rows["where"] == (
        "account 123456789012, us-east-1c ($10.61 an hour each), then us-east-1d ($11.24 an hour "
        "each)"
    )
    # A spot price may rise to that on demand.
    assert rows["price"] == "$84.90 an hour now (on demand $249.70); at most $2,496.96 in 10 hours"
    assert rows["SSH"] == "from 203.0.113.7/32 alone"
    assert rows["batch"] == "6144 sequences over 64 devices, learning rate 0.0192"
    assert rows["speed"].startswith("unknown")
    assert "after 10 hours" in rows["end"]
    assert BUCKET in rows["makes"] and "security group" in rows["makes"]
    groups = "txl-laptop-us-east-1c, txl-laptop-us-east-1d"
    assert f"cluster placement groups {groups}" in rows["makes"].splitlines()
    assert shlex.split(rows["command"]) == [
        *("python", "-m", "txl_jax.train", "--config", "eight_machines", "--lr", "0.0001"),
        *("--supervise", "--coordinator", "HOST-0:8476", "--num-processes", "8"),
        *("--process-id", "I", "--logdir", LOGDIR),
    ]


def test_it_makes_nothing(account, cloud):
    before = len(cloud.calls)
    planned(account)
    asked = {(call.service, call.operation) for call in cloud.calls[before:]}
    read_only = ("Describe", "Get", "List", "HEAD", "GET", "Lookup")
    assert [one for one in asked if not one[1].startswith(read_only)] == []
    assert cloud.instances() == []


def spot_prices(cloud: LocalCloud, **prices: float) -> None:
    """What spot hosts cost, by the letter of the zone."""
    items = "".join(
        f"<item><availabilityZone>us-east-1{zone}</availabilityZone><instanceType>x</instanceType>"
        f"<productDescription>Linux/UNIX</productDescription><spotPrice>{price}</spotPrice>"
        "<timestamp>2026-01-01T00:00:00.000Z</timestamp></item>"
        for zone, price in prices.items()
    )
    answer = f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken/>"
    cloud.server.answers["ec2:DescribeSpotPriceHistory"] = lambda _: answer


def zones(found: Plan) -> str:
    """The letters of the zones, in order."""
    assert found.rental
    return "".join(zone[-1] for zone in found.rental.zones)


def test_the_cheapest_zone_comes_first_and_one_without_a_price_last(account, cloud):
    words = "--instance-type c7i.xlarge --batch 8 --eval-batch 8"
    spot_prices(cloud, a=3.0, b=1.0, d=2.0, f=0.5)
    found = planned(account, words)
    assert zones(found) == "fbdac"
    assert found.rental and found.rental.price(8) == 4.0
    assert "us-east-1a ($3.00 an hour each), then us-east-1c" in shown(found)["where"]
    assert zones(planned(account, f"{words} --nospot")) == "fbdac"
    assert zones(planned(account, f"{words} --max-price 1.5")) == "fbc"
    assert zones(planned(account, f"{words} --zone us-east-1d")) == "d"
    spot_prices(cloud, **dict.fromkeys("abcdf", 3.0))
    assert "costs $3.00 an hour or more" in refusal(account, f"{words} --max-price 1.5")


def test_a_subnet_lies_in_one_zone(account, cloud):
    ec2 = cloud.client("ec2")
    subnets = {s["AvailabilityZone"][-1]: s["SubnetId"] for s in ec2.describe_subnets()["Subnets"]}
    assert zones(planned(account, f"--subnet {subnets['d']}")) == "d"
    complaint = refusal(account, f"--subnet {subnets['a']}")
    assert "no part in a zone where p3dn.24xlarge can be started (us-east-1c, us-east-1d)" in (
        complaint
    )


def test_prices_of_other_hosts(account):
    rows = shown(planned(account, "--nospot"))
    assert rows["price"] == "$249.70 an hour now; at most $5,992.70 in 24 hours"
    assert rows["hosts"].endswith(", on demand")
    assert rows["end"].startswith("hosts stop 10 minutes")
    rows = shown(planned(account, "--keep"))
    assert rows["price"] == "$84.90 an hour now (on demand $249.70)"
    assert rows["end"].startswith("--keep: once they train, the hosts run, and cost")


def test_a_highest_price_is_the_bound(account):
    rows = shown(planned(account, "--max-price 12 --max-hours 10"))
    assert "at most $960.00 in 10 hours" in rows["price"]
    found = plan.as_json(planned(account, "--max-price 12"))
    assert found["highest_price_per_hour"] == 96.0


def test_without_a_known_price_on_demand_nothing_bounds_a_spot_price(account, cloud):
    cloud.refuse("GetProducts", "AccessDeniedException")
    assert shown(planned(account))["price"] == "$84.90 an hour now"


def test_where_ssh_may_come_from_is_known_before_anybody_is_asked(account):
    rows = shown(planned(account, "--ssh-cidr 192.0.2.0/24,203.0.113.9"))
    assert rows["SSH"] == "from 192.0.2.0/24, 203.0.113.9/32 alone"
    assert "'a/b' is no network" in refusal(account, "--ssh-cidr a/b")
    assert "would open the hosts to the world" in refusal(account, "--ssh-cidr 0.0.0.0/0")
    # From this machine the default network is not the way out, or there is none.
    assert planned(account, "--private-ip --ssh-cidr 10.1.2.3").rental


def test_the_command_has_the_words_of_the_corpus_too(account, tmp_path):
    for number in range(300):  # so many that each split gets some
        (tmp_path / f"{number}.txt").write_text("once upon a time\n")
    asked = request(f"--dataset text --text-dir {tmp_path} --data-dir {tmp_path}/../data")
    assert asked.with_corpus(None) is asked
    brought = corpus.find(asked.command.experiment.data)
    assert brought
    words = brought.words
    asked = asked.with_corpus(brought)
    assert words[0] == "--text-dir"
    found = plan.make(account, asked)
    place = found.trainer.index("--supervise")
    assert found.trainer[place - len(words) : place] == words
    assert shlex.join(words) in shown(plan.make_listed(asked, 2))["command"]


def test_a_run_to_begin_from_has_to_be_there(account):
    make_bucket(account)
    began = f"--init-from s3://{BUCKET}/runs/one"
    complaint = f"init_from is s3://{BUCKET}/runs/one, where there is no run: config.json or"
    assert complaint in refusal(account, began)
    objects.write(account, BUCKET, "runs/one/config.json", b"{}")
    planned(account, began)
    objects.write(account, BUCKET, "runs/two/imported.json", b"{}")
    planned(account, f"{began} --init-upper-from s3://{BUCKET}/runs/two/")
    assert "init_upper_from is" in refusal(account, f"{began} --init-upper-from s3://{BUCKET}/x")


def test_a_name_that_nobody_typed_does_not_go_on_with_somebody_elses_run(account, cloud):
    launched(account, "", "eight-machines")
    planned(account)
    known, version = record.read(account, BUCKET, "eight-machines")
    assert known
    grace = "arn:aws:iam::123456789012:user/grace"
    theirs = dataclasses.replace(known, owner=grace)
    record.write(account, BUCKET, "eight-machines", theirs, version)
    assert refusal(account, "") == (
        f"a run eight-machines was launched by {grace}: --name eight-machines goes on with it, "
        "another --name begins one of your own"
    )
    rows = shown(planned(account, "--name eight-machines"))
    assert rows["note"] == f"it goes on with the run that {grace} launched"


def test_without_a_known_price_it_says_so(account, cloud):
    spot_prices(cloud)
    cloud.refuse("GetProducts", "AccessDeniedException")
    rows = shown(planned(account))
    assert rows["price"] == "unknown"
    assert rows["where"] == "account 123456789012, us-east-1c, then us-east-1d"


def make_bucket(account: Account) -> None:
    """The account's bucket, as yet without its settings."""
    account.client("s3").create_bucket(Bucket=BUCKET)


def launched(account: Account, words: str, name: str, record_words: str | None = None) -> None:
    """Leaves in S3 what a run of that name has."""
    make_bucket(account)
    command = request(words if record_words is None else record_words).command
    known = Record(
        launch="0" * 16,
        owner=account.caller,
        started=datetime.now(UTC),
        config=command.experiment,
        words=("--config", "eight_machines"),
        options=record.options(command),
        zones=("us-east-1c",),
        source="0" * 64,
        corpus="",
        revision="",
    )
    record.write(account, BUCKET, name, known, replaces="")
    speed.remember(account, BUCKET, name, command.config, command.experiment)


def metrics(account: Account, name: str, *speeds: Any) -> None:
    lines = [json.dumps({"step": 1, "times/tokens_per_sec": speed}) for speed in speeds]
    text = "\n".join(["cut off {", *lines, '{"step": 9, "learning/val_loss": 1.0}', "5"])
    objects.write(account, BUCKET, f"runs/{name}/metrics.jsonl", text.encode())


def test_a_measured_speed_tells_time_and_price(account):
    launched(account, "", "earlier")
    metrics(account, "earlier", 90_000, 100_000, 1_000_000, "fast", -1, None, float("nan"))
    found = planned(account)
    assert found.speed == speed.Speed(100_000, "earlier")
    assert found.hours == pytest.approx(1.5e9 / 1e5 / 3600)
    rows = shown(found)
    assert rows["speed"] == (
        "100,000 tokens/s, as measured in earlier; 4 h 10 min for 1,500,000,000 tokens"
    )
    assert "; $353.74 for the expected 4 h 10 min; at most " in rows["price"]
    assert "raise --max-hours above 4.2" in shown(planned(account, "--max-hours 3"))["note"]
    assert "note" not in rows


def test_a_speed_counts_only_for_the_same_experiment_on_the_same_machines(account):
    launched(account, "--batch 3072", "other-batch")
    metrics(account, "other-batch", 1.0)
    launched(account, "", "older")
    metrics(account, "older", 2.0)
    launched(account, "", "not-yet-measured")
    for words in ("", "--lr 1 --max-tokens 99999999 --name a"):
        assert planned(account, words).speed == speed.Speed(2.0, "older")
    for words in ("--machines 4", "--n-layer 3", "--zero 1", "--dtype float32", "--mem-len 0"):
        assert planned(account, words).speed is None, words


def test_the_speed_of_a_throughput_run_is_what_it_printed(account):
    words = "--config test_8"
    launched(account, words, "measured")
    printed = 'step 1\n{"config": "test_8", "tokens_per_s": {"median": 5.5}}\nended\n'
    objects.write(account, BUCKET, "launches/measured/output-0.txt", printed.encode())
    assert planned(account, words).speed == speed.Speed(5.5, "measured")


def test_a_damaged_note_of_speeds_is_none(account):
    make_bucket(account)
    key = "throughput/eight_machines-p3dn.24xlarge-8.json"
    for content in (b"[]", b"{", b'{"runs": 5}', b'{"runs": [5, "../a", "b"]}', b"[" * 99_999):
        objects.write(account, BUCKET, key, content)
        assert planned(account).speed is None


REFUSED = [
    ("--instance-type p9.huge", "us-east-1 does not offer the instance type 'p9.huge'"),
    ("--instance-type 'x\n$(y)'", "does not offer the instance type"),
    ("--batch 100", "batch is 100, which 64 devices cannot divide; use a multiple of 64"),
    ("--batch 6144 --accumulate 5", "64 devices x accumulate 5 cannot divide"),
    ("--eval-batch 8", "eval_batch is 8, which 64 devices cannot divide"),
    ("--dtype bfloat16", "the device (V100) has compute capability 7.0"),
    ("--zone us-east-1a", "not offered in us-east-1a; it is in us-east-1c, us-east-1d"),
    ("--subnet subnet-1", "there is no subnet 'subnet-1'"),
    ("--image ami-1", "there is no image ami-1"),
    ("--bucket A", "'A' cannot be a bucket"),
    ("--instance-type p4d.24xlarge --machines 2", "add --private-ip"),
]


def test_what_cannot_be_is_refused_in_one_line(account):
    for words, complaint in REFUSED:
        assert complaint in refusal(account, words)


def test_a_bucket_of_somebody_else_is_refused(account, cloud):
    cloud.server.faults.append(Fault("s3:HEAD", Refusal("403", "Forbidden", 403), None))
    assert "belongs to another account" in refusal(account, "--bucket somebody-elses")


def write_config(account: Account, cfg: Config, name: str = "eight-machines") -> None:
    make_bucket(account)
    objects.write_json(account, BUCKET, f"runs/{name}/config.json", dataclasses.asdict(cfg))


def test_a_run_of_another_config_is_refused_and_the_same_one_goes_on(account):
    cfg = request().command.experiment
    there = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=267_735))
    write_config(account, there)
    planned(account)
    planned(account, "--checkpoint-minutes 9 --data-dir x --zero 1")
    message = refusal(account, "--lr 1")
    assert message.startswith(f"{LOGDIR} belongs to a run of another config (optim.lr: 6.25e-05")
    assert "take another --name" in message
    planned(account, "--lr 1 --name another")
    objects.write(account, BUCKET, f"runs/eight-machines/{results.FILE}", b"{}")
    assert "the run eight-machines has finished" in refusal(account, "")


def test_a_foreign_config_in_s3_cannot_write_to_the_terminal(account):
    cfg = request().command.experiment
    data = dataclasses.replace(cfg.data, text_dir="\x1b]0;x\x07\n")
    write_config(account, dataclasses.replace(cfg, data=data))
    assert "\\x1b]0;x\\x07\\n" in refusal(account, "")
    objects.write(account, BUCKET, "runs/eight-machines/config.json", b'{"a\\u001b": 1}')
    assert "another version" in refusal(account, "")


def test_json_says_the_same(account):
    launched(account, "", "earlier")
    metrics(account, "earlier", 100_000)
    found = json.loads(json.dumps(plan.as_json(planned(account))))
    assert found["price_per_hour"] == pytest.approx(8 * SPOT["us-east-1c"], abs=1e-3)
    assert found["expected_price"] == pytest.approx(found["price_per_hour"] * found["hours"])
    assert (found["batch"], found["peak_lr"], found["machines"]) == (6144, 0.012, 8)
    assert found["command"][:3] == ["python", "-m", "txl_jax.train"]
    assert found["zones"] == list(SPOT) and found["spot"] is True
    assert found["measured_in"] == "earlier"


def test_a_plan_for_machines_that_run_already_asks_nobody():
    found = plan.make_listed(parse(["--hosts", "a,b", "--logdir", "/shared/a b"]), 2)
    rows = shown(found)
    assert rows["hosts"] == "2, which run already"
    assert rows["command"].endswith("--process-id I --logdir '/shared/a b'")
    assert "price" not in plan.as_json(found)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--batch 0", "batch is 0"),
        ("--d-model 15", "d_model is 15; it has to be even"),
        ("--lr 0", "lr is 0.0"),
        ("--init-upper-from s3://b/a", "init_upper_from is given and init_from is not"),
        ("--config test_8 --max-tokens 100000", "--throughput times those after the first 10"),
    ],
)
def test_an_experiment_is_checked_before_anybody_is_asked(words, complaint):
    with pytest.raises(UserError, match=complaint):
        plan.check(request(words).command.experiment)


def test_what_a_finished_run_leaves_is_called_as_the_trainer_calls_it():
    assert plan.RESULTS == results.FILE

"""What is lost is rented anew, once, in one zone, and for no more than it may cost.

moto's hosts have no sshd, so what starts trainers on them is replaced here: the local cloud's tests
have it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from moto.ec2.models.instances import Instance
from rich.console import Console

from launcher import again, ec2, hardware, record, recovery, runs, standing
from launcher.aws import Account
from launcher.hardware import Prices
from launcher.hold import Hold, Superseded
from launcher.lease import Lease, Lost
from launcher.look import Look, look
from launcher.order import order_of
from launcher.record import Record
from launcher.recovery import Recovery, TooDear
from launcher.runs import Run
from launcher.verdict import Limits
from tests.cloud.s3 import as_over_tls
from tests.launcher.cloud import Cloud
from tests.launcher.looks import BUCKET, LAUNCH, NAME, command, some_record
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
A, B = "us-east-1a", "us-east-1b"


class Bench:
    """A run of some hosts, which are lost, and a watcher that recovers it."""

    def __init__(self, aws: Cloud, account: Account, monkeypatch: pytest.MonkeyPatch):
        self.aws, self.account = aws, account
        self.prices = {A: 0.5, B: 0.6}
        self.said: list[str] = []
        self.moved: list[str] = []
        self.trained: list[Run] = []
        self.most = 0
        """Hosts that stood at once."""
        monkeypatch.setattr(hardware, "prices", lambda *_: Prices(2.0, self.prices))
        monkeypatch.setattr(Recovery, "_train", lambda _, run, known, hold: self.train(run, hold))
        aws.public_parameter(UBUNTU, aws.image())
        self.after_run: Any = lambda instances: None
        aws.after_run = self._started

    def _started(self, instances: list[Instance]) -> None:
        self.most = max(self.most, len(self.standing()))
        self.after_run(instances)

    def train(self, run: Run, hold: Hold) -> None:
        assert not hold.lost()
        self.trained.append(run)

    def launch(self, *words: str) -> Run:
        """Rents hosts as a launch does."""
        typed = dataclasses.replace(command(*words), bucket=BUCKET)
        known = dataclasses.replace(some_record(*words), owner=self.account.caller)
        made = standing.ensure(self.account, typed, [], known.zones)
        record.write(self.account, BUCKET, NAME, known, "")
        kind = hardware.describe(self.account, "c7i.large")
        image = hardware.image(self.account, kind)
        prices = self.prices if typed.spot else dict.fromkeys(self.prices, 2.0)
        order = order_of(typed, known, kind, image, prices, made, again=False)
        self.lease = Lease(self.account, BUCKET, NAME, self.said.append).__enter__()
        return ec2.start(self.account, order, self.said.append)

    def look(self) -> Look:
        """A look, of which the book tells."""
        seen = look(self.account, BUCKET, NAME)
        self.lease.update(lambda book: book.with_hosts(seen.run, seen.now, seen.status.seen))
        return seen

    def recovery(self, **limits: Any) -> Recovery:
        return Recovery(
            self.account,
            BUCKET,
            NAME,
            self.lease,
            Limits(**limits),
            False,
            Console(),
            self.said.append,
            lambda seen, why: self.moved.append(why),
        )

    def recover(self, *ill: int, **limits: Any) -> None:
        """By a look that is made now."""
        seen = self.look()
        given_up = tuple(host for host in seen.alive if host.index in ill)
        self.recovery(**limits).recover(seen, given_up)

    def lose(self, *numbers: int) -> None:
        """EC2 takes back the hosts of these numbers that stand."""
        hosts = [host for host in self.look().standing if host.index in numbers]
        assert len(hosts) == len(numbers)
        for instance in self.aws.instances():
            if instance.id in {host.instance_id for host in hosts}:
                instance.terminate()
                instance.state_reason.code = "Server.SpotInstanceTermination"

    def standing(self) -> set[str]:
        return {i.id for i in self.aws.instances("pending", "running", "stopping", "stopped")}

    def zones(self) -> set[str]:
        return {host.zone for host in self.look().standing}

    def known(self) -> Record:
        known, _ = record.read(self.account, BUCKET, NAME)
        assert known
        return known

    def given_up(self) -> set[str]:
        return {name for name, paid in self.lease.book.hosts.items() if paid.given_up}


@pytest.fixture
def bench(aws: Cloud, account: Account, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(ec2, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 0.05)
    monkeypatch.setattr(recovery, "_DRY_SECONDS", 0.1)
    monkeypatch.setattr(recovery, "_AGAIN_SECONDS", 0.01)
    made = Bench(aws, account, monkeypatch)
    with as_over_tls():
        yield made
        made.lease.__exit__(None, None, None)


def ids(run: Run) -> list[str]:
    return [host.instance_id for host in run.hosts]


def test_a_lost_host_is_replaced_beside_the_others(bench):
    first, _ = ids(bench.launch())
    bench.lose(1)
    bench.recover()
    (run,) = bench.trained
    assert [(host.index, host.state, host.zone) for host in run.hosts] == [
        (0, "running", A),
        (1, "running", A),
    ]
    assert ids(run)[0] == first
    assert bench.standing() == set(ids(run))
    assert (bench.look().missing, bench.moved) == ((), [])


def test_a_host_that_is_ill_is_given_up_and_replaced(bench):
    _, ill = ids(bench.launch())
    bench.recover(1)
    assert len(bench.trained) == 1
    assert ill not in bench.standing() and len(bench.standing()) == 2
    assert bench.given_up() == {ill}
    assert bench.most == 2


def test_it_is_lost_again_and_again(bench):
    """Each time EC2 is asked for another host, though the launch and the number are the same."""
    bench.launch()
    for number in (1, 1, 0, 1):
        bench.lose(number)
        bench.recover()
        assert bench.look().missing == ()
    assert len(bench.aws.instances()) == 2 + 4
    assert bench.most == 2


def test_hosts_that_shut_down_count_against_the_quota_until_they_are_terminated(bench, monkeypatch):
    bench.launch()
    bench.lose(1)
    waited: list[list[str]] = []
    monkeypatch.setattr(
        ec2, "until_terminated", lambda _, hosts: waited.append([h.state for h in hosts])
    )
    bench.aws.refuse("RunInstances", "VcpuLimitExceeded", times=1)
    bench.recover()
    assert waited == [["terminated"]]
    assert len(bench.trained) == 1
    bench.lose(0)
    bench.aws.refuse("RunInstances", "VcpuLimitExceeded", times=2)
    with pytest.raises(ec2.Quota, match="a quota of the account is reached"):
        bench.recover()
    assert len(bench.standing()) == 1 and not bench.moved


def test_further_hosts_are_without_public_addresses_where_the_others_are(bench):
    """As a launch with --private-ip has rented them."""
    bench.launch()
    seen = bench.look()
    assert not bench.recovery()._order(seen).private_ip
    hosts = tuple(dataclasses.replace(host, public_ip="") for host in seen.run.hosts)
    private = dataclasses.replace(seen, run=dataclasses.replace(seen.run, hosts=hosts))
    assert bench.recovery()._order(private).private_ip


def test_when_all_are_lost_the_cheapest_zone_is_tried_first(bench):
    bench.launch()
    bench.lose(0, 1)
    bench.prices = {A: 0.9, B: 0.6}
    bench.recover()
    assert bench.zones() == {B}
    assert [host.price for host in bench.trained[0].hosts] == [0.6, 0.6]
    bench.lose(0, 1)
    bench.prices = {A: 0.5, B: 0.6}
    bench.recover()
    assert bench.zones() == {A}
    assert len(bench.standing()) == bench.most == 2


def test_zones_of_which_no_price_is_known_come_last(bench):
    bench.launch()
    bench.lose(0, 1)
    bench.prices = {B: 0.6}
    bench.recover()
    assert bench.zones() == {B}


def test_a_run_leaves_a_zone_that_has_no_room_with_all_its_hosts(bench):
    before = ids(bench.launch())
    bench.lose(1)
    bench.aws.full(A)
    bench.recover()
    assert bench.zones() == {B}
    assert len(bench.standing()) == bench.most == 2
    assert bench.standing().isdisjoint(before)
    (why,) = bench.moved
    assert why.startswith("no room for host 1 of trial in us-east-1a: InsufficientInstanceCapacity")
    assert before[0] in bench.given_up()
    assert len(bench.trained) == 1


def test_when_all_other_zones_are_full_it_comes_back_to_the_first(bench):
    bench.launch()
    bench.lose(1)
    bench.aws.full(A)
    bench.aws.full(B)
    with pytest.raises(ec2.Full, match="no zone has room for 2"):
        bench.recover()
    assert bench.standing() == set() and bench.trained == []
    with pytest.raises(ec2.Full):
        bench.recover()
    assert len(bench.aws.instances()) == 2
    bench.aws.refusals.clear()
    bench.recover()
    assert bench.zones() == {A}
    assert len(bench.moved) == 1


def full_for(aws: Cloud, number: int, times: int) -> None:
    """A zone has no room for the host of this number, some times."""
    aws.refuse(
        "RunInstances",
        "InsufficientInstanceCapacity",
        status=500,
        times=times,
        when=lambda parameters: (
            {"Key": "txl:host", "Value": str(number)} in parameters["TagSpecifications"][0]["Tags"]
        ),
    )


def test_a_zone_is_asked_again_for_what_it_had_no_room_for(bench, monkeypatch):
    monkeypatch.setattr(recovery, "_DRY_SECONDS", 60.0)
    bench.launch("--machines=3")
    bench.lose(1, 2)
    full_for(bench.aws, 2, times=2)
    bench.recover()
    assert len(bench.aws.instances()) == 3 + 2
    assert (len(bench.standing()), bench.moved, bench.zones()) == (3, [], {A})


def test_hosts_that_were_rented_before_a_zone_was_full_are_not_paid_for(bench):
    bench.launch("--machines=3")
    bench.lose(1, 2)
    full_for(bench.aws, 2, times=1000)
    bench.recover()
    assert bench.zones() == {B}
    assert len(bench.standing()) == bench.most == 3
    assert len(bench.aws.instances()) == 3 + 1 + 3


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("seen", [False, True])
def test_a_recovery_that_is_cut_off_is_gone_on_with(after, seen, bench, monkeypatch):
    """By a watcher that sees the host which was rented last, or does not yet."""
    bench.launch("--machines=3")
    bench.lose(1, 2)
    before = bench.look()
    done, own = [], ec2.start_one

    class Killed(Exception):
        pass

    def start_one(*words: Any) -> str:
        done.append(own(*words))
        if len(done) == after:
            raise Killed
        return done[-1]

    monkeypatch.setattr(ec2, "start_one", start_one)
    with pytest.raises(Killed):
        bench.recovery().recover(before, ())
    assert len(bench.standing()) == 1 + after
    version = look(bench.account, BUCKET, NAME).version
    after_it = bench.look() if seen else dataclasses.replace(before, version=version)
    bench.recovery().recover(after_it, ())
    assert len(bench.aws.instances()) == 3 + 2
    assert len(bench.standing()) == bench.most == 3
    assert bench.moved == []


def test_what_drives_the_hosts_lets_go_and_the_book_knows_who_did_last(bench):
    bench.launch()
    hold = again.take_hold(bench.account, BUCKET, NAME, bench.known(), bench.look().version)
    bench.lose(1)
    bench.recover()
    assert hold.lost()
    assert bench.lease.book.attempt == bench.known().attempt != hold.attempt
    assert bench.known().wish == record.TRAIN


def test_a_recovery_whose_hold_another_command_takes_ends(bench, monkeypatch):
    monkeypatch.setattr(recovery, "_DRY_SECONDS", 60.0)
    bench.launch("--machines=3")
    bench.lose(1, 2)

    def take(instances: list[Instance]) -> None:
        again.ask_in(bench.account, BUCKET, NAME, LAUNCH, record.STOP)

    bench.after_run = take
    with pytest.raises(Superseded):
        bench.recover()
    assert len(bench.standing()) == 2  # one was rented, and it is the other command's to know
    assert bench.trained == []
    assert bench.known().wish == record.STOP


def test_by_a_look_that_is_old_nothing_is_rented(bench):
    bench.launch()
    bench.lose(1)
    seen = bench.look()
    again.ask_in(bench.account, BUCKET, NAME, LAUNCH, record.END)
    with pytest.raises(record.Taken):
        bench.recovery().recover(seen, ())
    assert len(bench.standing()) == 1
    assert bench.known().wish == record.END


def test_a_watcher_that_has_lost_its_lease_rents_nothing(bench):
    bench.launch()
    bench.lose(1)
    seen = bench.look()
    bench.lease._lost = True
    with pytest.raises(Lost):
        bench.recovery().recover(seen, ())
    assert (len(bench.standing()), bench.trained) == (1, [])


def test_hosts_that_die_meanwhile_end_the_recovery_and_the_others_stay(bench):
    bench.launch()
    bench.lose(1)

    def die(instances: list[Instance]) -> None:
        bench.after_run = lambda _: None
        instances[0].terminate()

    bench.after_run = die
    with pytest.raises(UserError, match="hosts of trial are terminated"):
        bench.recover()
    assert (len(bench.standing()), bench.trained) == (1, [])
    bench.recover()
    assert (len(bench.standing()), len(bench.trained)) == (2, 1)


def stop(bench: Bench, *numbers: int) -> None:
    """The hosts of these numbers shut themselves down."""
    ec2.stop(bench.account, [host for host in bench.look().alive if host.index in numbers])


def test_hosts_on_demand_that_have_stopped_start_again(bench):
    before = ids(bench.launch("--nospot"))
    stop(bench, 0, 1)
    bench.recover()
    assert bench.standing() == set(before)
    assert {host.state for host in bench.trained[0].hosts} == {"running"}


def test_beside_a_stopped_host_a_lost_one_is_replaced(bench):
    first, _ = ids(bench.launch("--nospot"))
    stop(bench, 0)
    bench.lose(1)
    bench.recover()
    (run,) = bench.trained
    assert ids(run)[0] == first and {host.zone for host in run.hosts} == {A}
    assert len(bench.standing()) == bench.most == 2


def test_a_stopped_host_for_which_there_is_no_room_is_given_up(bench):
    _, stopped = ids(bench.launch("--nospot"))
    stop(bench, 1)
    bench.aws.refuse("StartInstances", "InsufficientInstanceCapacity", status=500)
    with pytest.raises(ec2.Full, match="us-east-1a has no room for the hosts now"):
        bench.recover()
    assert stopped not in bench.standing()
    assert bench.given_up() == {stopped}
    bench.recover()
    assert len(bench.standing()) == 2 and len(bench.trained) == 1


@pytest.mark.parametrize("code", ["UnauthorizedOperation", "RequestLimitExceeded"])
def test_a_stopped_host_is_kept_when_aws_refuses_to_start_it(code, bench):
    before = ids(bench.launch("--nospot"))
    stop(bench, 1)
    bench.aws.refuse("StartInstances", code)
    with pytest.raises(UserError):
        bench.recover()
    assert bench.standing() == set(before)


def test_further_hosts_cost_no_more_than_is_left(bench):
    bench.launch()
    bench.lose(1)
    bench.recover(max_hourly_cost=1.25)
    asked = bench.aws.asked("RunInstances")[-1]
    assert asked["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] == "0.75"
    bench.lose(1)
    bench.recover(max_hourly_cost=1.0)
    asked = bench.aws.asked("RunInstances")[-1]
    assert asked["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] == "0.5"
    assert (bench.zones(), bench.moved) == ({A}, [])


def test_the_launchs_own_highest_price_holds(bench):
    bench.launch("--max-price=0.7")
    for limits in ({}, {"max_hourly_cost": 9.0}):
        bench.lose(1)
        bench.recover(**limits)
        asked = bench.aws.asked("RunInstances")[-1]
        assert asked["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] == "0.7"


def test_a_zone_that_is_too_dear_now_is_left(bench):
    bench.launch()
    bench.lose(1)
    bench.prices = {A: 0.8, B: 0.6}
    bench.recover(max_hourly_cost=1.25)
    assert bench.zones() == {B}
    assert bench.moved == ["us-east-1a costs too much now"]
    assert len(bench.standing()) == bench.most == 2


def test_when_all_zones_are_too_dear_nothing_runs(bench):
    bench.launch()
    bench.lose(1)
    bench.prices = {A: 0.8, B: 0.7}
    complaint = r"2 hosts of trial would cost more than --max-hourly-cost 1\.25"
    with pytest.raises(TooDear, match=complaint):
        bench.recover(max_hourly_cost=1.25)
    assert (bench.standing(), bench.trained) == (set(), [])
    with pytest.raises(TooDear):
        bench.recover(max_hourly_cost=1.25)
    bench.prices = {A: 0.8, B: 0.625}
    bench.recover(max_hourly_cost=1.25)
    assert bench.zones() == {B}


def test_where_costs_count_hosts_of_unknown_price_are_not_rented(bench):
    bench.launch()
    bench.lose(0, 1)
    bench.prices = {B: 0.6}
    for limits in ({"max_cost": 100.0}, {"max_hourly_cost": 100.0}):
        bench.recover(**limits)
        assert bench.zones() == {B}
        bench.lose(0, 1)
    bench.aws.full(B)
    for limits in ({"max_cost": 100.0}, {"max_hourly_cost": 100.0}):
        with pytest.raises(ec2.Full):
            bench.recover(**limits)
    bench.recover()
    assert bench.zones() == {A}


def test_stopped_hosts_that_start_again_leave_less_for_others(bench):
    """Two dollars an hour each, on demand."""
    bench.launch("--nospot")
    stop(bench, 0)
    bench.lose(1)
    bench.recover(max_hourly_cost=4.0)
    assert len(bench.standing()) == 2
    stop(bench, 0)
    bench.lose(1)
    with pytest.raises(TooDear):
        bench.recover(max_hourly_cost=3.0)
    assert bench.standing() == set()


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(*_: Any) -> None:
        raise UserError("cannot reach them")

    monkeypatch.setattr(recovery, "reached", reach)


def test_at_the_end_of_its_budget_spot_hosts_end(bench, unreached):
    before = ids(bench.launch())
    bench.recovery().wind_down(bench.look())
    assert bench.standing() == set()
    assert bench.known().wish == record.END
    assert bench.given_up() == set(before)
    assert bench.said[-1] == (
        "cannot reach them; what was trained since the last checkpoint is lost"
    )


def test_at_the_end_of_its_budget_hosts_on_demand_stop(bench, unreached):
    before = ids(bench.launch("--nospot"))
    bench.recovery().wind_down(bench.look())
    assert {instance.state for instance in bench.aws.instances()} == {"stopped"}
    assert bench.standing() == set(before)
    assert bench.known().wish == record.STOP
    assert bench.given_up() == set()


def test_without_hosts_there_is_nothing_to_end(bench):
    bench.launch()
    bench.lose(0, 1)
    said = list(bench.said)
    bench.recovery().wind_down(bench.look())
    assert bench.said == said
    assert bench.known().wish != record.TRAIN


def test_the_hosts_of_a_run_that_a_person_ends_end_on_demand_too(bench):
    bench.launch("--nospot")
    again.ask_in(bench.account, BUCKET, NAME, LAUNCH, record.END)
    bench.recovery().release(bench.look())
    assert bench.standing() == set()


def test_hosts_that_the_book_does_not_know_end_too(bench):
    """A recovery that was under way has rented them a moment ago."""
    bench.launch()
    bench.recovery().release(look(bench.account, BUCKET, NAME))
    assert bench.standing() == set()
    assert len(bench.given_up()) == bench.lease.book.had(LAUNCH) == 2


def test_hosts_of_other_runs_are_left_alone(bench):
    bench.launch()
    bench.lose(0)
    for name, launch in (("other", LAUNCH), (NAME, "f" * 16)):
        kind = hardware.describe(bench.account, "c7i.large")
        order = bench.recovery()._order(bench.look())
        ec2.start(
            bench.account, dataclasses.replace(order, name=name, launch=launch, kind=kind), print
        )
    bench.aws.full(A)
    bench.recover()
    assert bench.moved
    others = [run for run in runs.find(bench.account) if (run.name, run.launch) != (NAME, LAUNCH)]
    assert [len(run.hosts) for run in others] == [2, 2]

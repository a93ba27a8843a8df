"""Why a run is silent, by what its hosts say, and as far as none has to be reached."""

from datetime import timedelta

import pytest

from launcher import inquiry, setup
from launcher.inquiry import Answer, judge
from launcher.look import Look
from launcher.reach import reached
from launcher.setup import Condition
from tests.launcher.looks import NOW, host, look, lost
from txl_jax.errors import RESTART_STATUS, UserError

pytest_plugins = ["tests.launcher.fixtures"]

HOUR = 3600.0
MINUTE = timedelta(minutes=1)
LATE = 5 * MINUTE
"""By when a host that had a notice is gone."""


def trains(age: float = HOUR) -> Condition:
    return Condition(training=True, status=None, trainer=age, set_up=age + 60, busy=False)


def ended(status: int) -> Condition:
    return Condition(training=False, status=status, trainer=HOUR, set_up=HOUR, busy=False)


def idle(set_up: float = HOUR, busy: bool = False) -> Condition:
    return Condition(training=False, status=None, trainer=-1, set_up=set_up, busy=busy)


def two(silent: timedelta | None = LATE) -> Look:
    return look(host(0), host(1), silent=silent)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("told", [[trains(), trains()], [ended(0), ended(0)], [trains(), ended(0)]])
def test_trainers_at_work_or_done_are_left_alone(told, ours):
    assert judge(two(), told, ours) is None


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("silent", [LATE, 3 * MINUTE])
def test_an_error_of_a_trainer_is_a_failure(silent, ours):
    """At once: nothing that comes later would explain it."""
    why = "the trainer of host 1 has ended with status 1"
    assert judge(two(silent), [trains(), ended(1)], ours) == Answer("failed", why, (1,))
    answer = judge(two(silent), [ended(0), ended(1)], ours)
    assert answer == Answer("failed", why, (0, 1))
    answer = judge(two(silent), [ended(RESTART_STATUS), ended(-9)], ours)
    assert answer and (answer.kind, answer.hosts) == ("failed", (0, 1))


def test_trainers_that_ask_for_a_restart_may_lose_a_host():
    told = [ended(RESTART_STATUS), ended(RESTART_STATUS)]
    assert judge(two(3 * MINUTE), told, ours=False) is None
    answer = judge(two(LATE), told, ours=False)
    why = f"the trainer of host 0 has ended with status {RESTART_STATUS}"
    assert answer == Answer("failed", why, (0, 1))
    assert judge(two(3 * MINUTE), [ended(0), ended(RESTART_STATUS)], ours=False) is None


def test_in_a_recovery_that_goes_on_they_are_started_again_and_that_is_no_failure():
    told = [ended(RESTART_STATUS), trains()]
    answer = judge(two(3 * MINUTE), told, ours=True)
    assert answer and (answer.kind, answer.hosts) == ("", (0,))
    answer = judge(two(LATE), told, ours=True)
    assert answer and answer.kind == "failed"


def test_an_end_counts_before_what_else_is_wrong():
    answer = judge(two(), [idle(), ended(3)], ours=True)
    assert answer == Answer("failed", "the trainer of host 1 has ended with status 3", (1,))


def test_a_recovery_that_was_cut_off_goes_on():
    told = [trains(), idle(set_up=10.0, busy=True)]
    assert judge(two(), told, ours=True) == Answer("", "no trainer was started on host 1", (1,))
    answer = judge(two(), [idle(), idle()], ours=True)
    assert answer == Answer("", "no trainer was started on hosts 0, 1", (0, 1))


@pytest.mark.parametrize(
    "told",
    [
        [idle(busy=True), idle()],
        [trains(), idle(busy=True)],
        [idle(set_up=299.0), idle()],
        [idle(set_up=0.0), idle(set_up=-1)],
        [trains(age=10.0), idle()],
    ],
)
def test_another_commands_set_up_is_left_alone_while_it_goes_on(told):
    assert judge(two(), told, ours=False) is None


@pytest.mark.parametrize("set_up", [300.0, HOUR, -1])
def test_another_commands_set_up_that_stands_still_is_a_failure(set_up):
    answer = judge(two(), [idle(set_up), idle(set_up)], ours=False)
    assert answer == Answer("failed", "the set-up of hosts 0, 1 stands still", (0, 1))
    answer = judge(two(), [trains(), idle(set_up)], ours=False)
    assert answer == Answer("failed", "the set-up of host 1 stands still", (1,))


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("silent", "stalled"),
    [(inquiry.STALLED, False), (inquiry.STALLED + SECOND, True), (2 * HOUR * SECOND, True)],
)
def test_trainers_that_have_trained_and_show_nothing_for_long_stand_still(silent, stalled, ours):
    hosts = (host(number, launched=NOW - timedelta(hours=9)) for number in (0, 1))
    seen = look(*hosts, silent=silent)
    answer = judge(seen, [trains(3 * HOUR), trains(3 * HOUR)], ours)
    assert bool(answer) == stalled
    if answer:
        assert (answer.kind, answer.hosts, answer.ill) == ("stalled", (), ())
        assert answer.why.startswith("the trainers have shown no sign of life for ")


@pytest.mark.parametrize(
    ("age", "stalled"),
    [
        (11 * MINUTE, False),  # the sign of life was of the trainers before
        (inquiry.NOT_BEGUN, False),
        (inquiry.NOT_BEGUN + SECOND, True),
    ],
)
def test_trainers_that_have_not_made_a_step_get_longer(age, stalled):
    answer = judge(two(timedelta(hours=1)), [trains(age.total_seconds())] * 2, ours=True)
    assert bool(answer) == stalled
    answer = judge(two(None), [trains(age.total_seconds())] * 2, ours=True)
    assert bool(answer) == stalled


def test_the_youngest_trainer_counts():
    old, young = trains(2 * HOUR), trains(60.0)
    assert judge(two(timedelta(hours=1)), [old, young], ours=True) is None
    assert judge(two(timedelta(hours=1)), [old, old], ours=True)


def test_trainers_that_wait_for_one_that_has_ended_well_stand_still_some_day():
    answer = judge(two(timedelta(hours=1)), [trains(2 * HOUR), ended(0)], ours=True)
    assert answer and answer.kind == "stalled"


def test_a_sign_of_life_of_before_the_trainers_start_is_none_of_theirs():
    """The run had trained an hour ago; the trainers of 29 minutes ago prepare token files."""
    assert judge(two(timedelta(hours=1)), [trains(29 * 60.0)] * 2, ours=True) is None
    assert judge(two(timedelta(minutes=28)), [trains(29 * 60.0)] * 2, ours=True)


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No host is reached; how many each try was for."""
    asked: list[int] = []

    def reach(account, run, private, seconds):
        asked.append(len(run.hosts))
        raise UserError("cannot reach them")

    monkeypatch.setattr(inquiry, "reached", reach)
    return asked


@pytest.mark.parametrize(
    "seen",
    [
        look(silent=timedelta(hours=1)),
        look(host(0), silent=timedelta(hours=1)),
        look(host(0), lost(1), silent=timedelta(hours=1)),
        look(host(0), host(1, "pending"), silent=timedelta(hours=1)),
        look(host(0), host(1, "stopped"), silent=timedelta(hours=1)),
    ],
)
def test_only_a_whole_run_is_asked(seen, unreached, account):
    assert inquiry.ask(account, seen, private_ip=False, ours=True) is None
    assert unreached == []


def test_hosts_that_do_not_answer_are_ill_only_after_a_long_silence(unreached, account):
    seen = two(inquiry.STALLED - SECOND)
    assert inquiry.ask(account, seen, private_ip=False, ours=True) is None
    assert unreached == [2]


def test_if_no_host_answers_it_may_be_this_machine_that_is_cut_off(unreached, account):
    assert inquiry.ask(account, two(timedelta(hours=1)), private_ip=False, ours=True) is None
    assert sorted(unreached) == [1, 1, 2]


def test_without_a_key_nobody_is_asked_and_nothing_is_known(account):
    """The real way to the hosts, as far as it leads without them."""
    seen = two(timedelta(hours=1))
    assert seen.run
    with pytest.raises(UserError, match="key"), reached(account, seen.run, False, 1.0):
        pass
    assert inquiry.ask(account, seen, private_ip=False, ours=True) is None


def test_hosts_that_do_not_answer_while_others_do_are_given_up(account, monkeypatch):
    """SSH is the local cloud's to test: here a host answers, or does not."""

    class Reached:
        def __init__(self, account, run, private, seconds):
            if any(host.index == 1 for host in run.hosts):
                raise UserError("cannot reach 1 of its hosts")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(inquiry, "reached", Reached)
    answer = inquiry.ask(account, two(timedelta(minutes=12)), private_ip=False, ours=True)
    why = "host 1 did not answer, after 12 min without a sign of life"
    assert answer == Answer("stalled", why, (1,), (host(1),))
    assert inquiry.ask(account, two(inquiry.STALLED - SECOND), False, True) is None


def test_what_hosts_tell_is_judged(account, monkeypatch):
    """In the order of their numbers."""

    class Reached:
        def __init__(self, account, run, private, seconds):
            self.run = run

        def __enter__(self):
            return self.run

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(inquiry, "reached", Reached)
    monkeypatch.setattr(
        setup, "conditions", lambda run: [ended(h.index) for h in run.hosts if h.state == "running"]
    )
    gone = lost(1, generation=1, launched=NOW - timedelta(hours=3))
    seen = look(host(1), host(0), gone, silent=LATE)
    answer = inquiry.ask(account, seen, private_ip=False, ours=True)
    assert answer == Answer("failed", "the trainer of host 1 has ended with status 1", (0, 1))

"""What is done about a run, by what is seen of it."""

import dataclasses
from datetime import timedelta

import pytest

from launcher import record, verdict
from launcher.look import Look
from launcher.verdict import Do, Limits, Verdict
from launcher.watch_book import Event, Paid
from tests.launcher.looks import (
    BY_HAND,
    BY_ITSELF,
    NOW,
    SPOT_ENDED,
    book_of,
    event,
    host,
    look,
    lost,
    some_record,
)
from txl_jax.errors import UserError

ANY = Limits()
QUIET = verdict.SILENT + timedelta(seconds=1)


def judge(seen: Look, *events: Event, limits: Limits = ANY, given_up=()) -> Verdict:
    return verdict.judge(seen, book_of(seen, *events, given_up=given_up), limits)


def test_a_run_that_trains_is_left_alone():
    assert judge(look(host(0), host(1))) == Verdict(Do.NOTHING)


def test_hosts_that_come_up_are_waited_for():
    young = [host(number, "pending", launched=NOW) for number in (0, 1)]
    assert judge(look(*young, silent=None)) == Verdict(Do.NOTHING)


@pytest.mark.parametrize(
    ("silent", "do"),
    [(verdict.SILENT, Do.NOTHING), (QUIET, Do.ASK), (None, Do.ASK)],
)
def test_only_silent_hosts_are_asked(silent, do):
    assert judge(look(host(0), host(1), silent=silent)) == Verdict(do)


def test_since_the_last_hosts_start_it_is_not_silent():
    young = host(1, launched=NOW - timedelta(minutes=1))
    assert judge(look(host(0), young, silent=timedelta(hours=1))) == Verdict(Do.NOTHING)


FINISHED = {
    "trains": look(host(0), host(1), finished=True),
    "ended": look(host(0), host(1), finished=True, known=some_record(wish=record.END)),
    "stopped": look(
        host(0, "stopped"), host(1), finished=True, known=some_record(wish=record.STOP)
    ),
    "lost": look(lost(0), host(1), finished=True),
    "by hand": look(lost(0, BY_HAND), lost(1, BY_HAND), finished=True),
    "ill": look(host(0), host(1), finished=True, silent=QUIET, impaired=(host(0),)),
    "without hosts": look(finished=True),
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_run_is_at_its_end_whatever_else_is_seen(case):
    failures = [event("failed") for _ in range(9)]
    found = judge(FINISHED[case], *failures, limits=Limits(0, 0, 0.01, 0.01))
    assert (found.do, found.status) == (Do.END, 0)
    assert found.why == "finished; its hosts end by themselves, 10 minutes after success"
    assert (found.lost, found.ill) == ((), ())


def test_with_keep_the_hosts_of_a_finished_run_cost_on():
    found = judge(look(host(0), host(1), finished=True, known=some_record("--keep")))
    assert "stand, and cost, until they are killed" in found.why


@pytest.mark.parametrize("hosts", [(host(0), host(1)), (lost(0), host(1)), ()])
def test_a_run_that_a_person_has_ended_is_at_its_end(hosts):
    found = judge(look(*hosts, known=some_record(wish=record.END)), limits=Limits(max_cost=0.01))
    assert found == Verdict(Do.END, "ended by a person, or for its budget", status=1)


@pytest.mark.parametrize("states", [("stopping", "stopped"), ("running", "running")])
def test_a_run_that_a_person_has_stopped_is_waited_for(states):
    hosts = [host(number, state, spot=False) for number, state in enumerate(states)]
    found = judge(look(*hosts, silent=QUIET, known=some_record(wish=record.STOP)))
    assert (found.do, found.status) == (Do.WAIT, 0)
    assert "stopped by a person" in found.why


def test_a_lost_host_is_replaced_and_its_loss_is_told():
    gone = lost(1)
    found = judge(look(host(0), gone))
    assert found == Verdict(Do.RECOVER, f"host 1 lost ({SPOT_ENDED})", (gone,))


def test_several_lost_hosts_are_one_loss():
    gone = lost(0), host(1, "shutting-down", reason_code="Server.InternalError")
    found = judge(look(*gone))
    assert found.why == f"hosts 0, 1 lost (Server.InternalError, {SPOT_ENDED})"
    assert (found.do, found.lost) == (Do.RECOVER, gone)


def test_a_loss_that_is_written_down_is_not_told_again():
    seen = look(host(0), lost(1))
    found = judge(seen, event("preempted"), given_up=(lost(1),), limits=Limits(preemptions=1))
    assert found == Verdict(Do.RECOVER)


def test_beside_a_loss_that_is_written_down_a_new_one_is_told():
    found = judge(look(lost(0), lost(1)), event("preempted"), given_up=(lost(1),))
    assert (found.do, found.lost) == (Do.RECOVER, (lost(0),))


def test_a_host_whose_place_is_taken_is_no_loss():
    gone, new = lost(1), host(1, generation=1, launched=NOW)
    assert judge(look(host(0), gone, new)) == Verdict(Do.NOTHING)


def test_the_loss_of_a_host_that_had_taken_a_lost_ones_place_is_new():
    first, second = lost(1, launched=NOW - timedelta(hours=3)), lost(1, generation=1)
    found = judge(look(host(0), first, second), event("preempted"), given_up=(first,))
    assert found.lost == (second,)


def test_hosts_that_ec2_has_forgotten_are_missing():
    assert judge(look(host(1)), event("preempted")) == Verdict(Do.RECOVER)
    assert judge(look(), event("preempted")) == Verdict(Do.RECOVER)


@pytest.mark.parametrize(("before", "do"), [(1, Do.RECOVER), (2, Do.WIND_DOWN)])
def test_at_one_loss_more_than_are_seen_to_the_run_ends(before, do):
    losses = [event("preempted"), event("restarted")] * before
    others = event("failed"), event("restarted"), event("preempted", launch="f" * 16)
    seen = look(host(0), lost(1))
    found = judge(seen, *losses, *others, limits=Limits(preemptions=2, failures=0))
    assert (found.do, found.lost) == (do, (lost(1),))
    assert found.status == (do is Do.WIND_DOWN)
    assert ("2 --preemptions were seen to already" in found.why) == (do is Do.WIND_DOWN)


def test_without_any_preemptions_the_first_loss_ends_the_run():
    assert judge(look(host(0), lost(1)), limits=Limits(preemptions=0)).do is Do.WIND_DOWN


def test_hosts_on_demand_that_have_stopped_are_lost():
    stopped = host(1, "stopped", spot=False, reason_code="Server.ScheduledStop")
    found = judge(look(host(0, spot=False), stopped))
    assert found == Verdict(Do.RECOVER, "host 1 lost (Server.ScheduledStop)", (stopped,))


def test_hosts_that_are_stopping_are_waited_for():
    hosts = host(0, "stopping", spot=False), host(1, "stopped", spot=False)
    assert judge(look(*hosts)) == Verdict(Do.WAIT, "hosts are stopping")
    assert judge(look(lost(0), hosts[0])).do is Do.WAIT


@pytest.mark.parametrize("state", ["terminated", "shutting-down"])
def test_when_all_hosts_were_terminated_by_hand_none_are_rented(state):
    seen = look(*(host(number, state, reason_code=BY_HAND) for number in (0, 1)))
    expected = Verdict(Do.END, "all hosts were terminated by hand", status=1)
    assert judge(seen, limits=Limits(preemptions=0, max_cost=0.01)) == expected
    assert judge(seen, event("preempted"), event("restarted")) == expected
    assert judge(seen, event("preempted", launch="f" * 16)) == expected


@pytest.mark.parametrize(
    "seen",
    [
        look(host(0), lost(1, BY_HAND)),
        look(lost(0), lost(1, BY_HAND)),
        look(lost(1, BY_HAND)),
        look(lost(1, BY_HAND), lost(1, BY_HAND, generation=1)),
    ],
)
def test_when_not_all_hosts_were_terminated_by_hand_they_are_lost(seen):
    assert judge(seen).do is Do.RECOVER


def test_in_an_interruption_terminated_hosts_are_those_that_a_watcher_has_ended():
    """As it does when it moves to another zone: EC2 gives the same reason."""
    seen = look(lost(0, BY_HAND), lost(1, BY_HAND))
    assert judge(seen, event("preempted"), given_up=(lost(0), lost(1))) == Verdict(Do.RECOVER)


ALMOST = timedelta(hours=24 * 0.96)
BEFORE = timedelta(hours=24 * 0.94)


@pytest.mark.parametrize(
    ("ran", "do"),
    [(timedelta(hours=24), Do.WIND_DOWN), (ALMOST, Do.WIND_DOWN), (BEFORE, Do.RECOVER)],
)
@pytest.mark.parametrize("state", ["terminated", "shutting-down", "stopped"])
def test_hosts_that_have_ended_themselves_after_max_hours_are_not_replaced(ran, do, state):
    ended = [
        host(number, state, launched=NOW - ran, reason_code=BY_ITSELF, ended=NOW)
        for number in (0, 1)
    ]
    found = judge(look(*ended))
    assert found.do is do
    if do is Do.WIND_DOWN:
        assert (found.why, found.status) == ("its hosts have run for --max-hours 24", 1)


def test_one_host_that_has_ended_itself_after_max_hours_is_the_end_of_the_run():
    ended = lost(1, BY_ITSELF, launched=NOW - timedelta(hours=24))
    assert judge(look(host(0), ended)).do is Do.WIND_DOWN  # by when the run was seen last


def test_max_hours_are_those_since_the_last_start():
    """The keeper on a host that was stopped and started again begins anew."""
    again = host(1, "stopped", reason_code=BY_ITSELF, hours_before=23.0, ended=NOW)
    assert judge(look(host(0), again)).do is Do.RECOVER


def test_other_ends_after_max_hours_are_losses():
    assert judge(look(host(0), lost(1, launched=NOW - ALMOST))).do is Do.RECOVER
    running = host(1, reason_code=BY_ITSELF, launched=NOW - ALMOST)
    assert judge(look(host(0), running)).do is Do.NOTHING
    ended = lost(1, BY_ITSELF, launched=NOW - ALMOST)
    assert judge(look(host(0), ended, known=some_record("--keep"))).do is Do.RECOVER
    longer = some_record("--max-hours=48")
    assert judge(look(host(0), ended, known=longer)).do is Do.RECOVER


def test_who_has_taken_a_hosts_place_that_ended_after_max_hours_trains_on():
    old = lost(1, BY_ITSELF, launched=NOW - ALMOST)
    assert judge(look(host(0), old, host(1, generation=1, launched=NOW))).do is Do.NOTHING


def test_an_impaired_host_that_is_silent_is_given_up():
    bad = host(1)
    found = judge(look(host(0), bad, silent=QUIET, impaired=(bad,)))
    assert found == Verdict(Do.RECOVER, "host 1 lost (EC2's checks fail)", (bad,), (bad,))


def test_while_the_run_shows_that_it_lives_an_impaired_host_is_not_given_up():
    assert judge(look(host(0), host(1), impaired=(host(1),))) == Verdict(Do.NOTHING)


def test_an_impaired_instance_of_another_run_is_none_of_ours():
    other = host(1, generation=9)
    assert judge(look(host(0), host(1), silent=QUIET, impaired=(other,))).do is Do.ASK


def test_an_impaired_host_whose_loss_is_written_down_is_given_up_still():
    """The watcher was cut off before it terminated it."""
    bad = host(1)
    seen = look(host(0), bad, silent=QUIET, impaired=(bad,))
    assert judge(seen, event("preempted"), given_up=(bad,)) == Verdict(Do.RECOVER, ill=(bad,))


FIVE_MINUTES = 2.0 * 5 / 60
"""What two hosts cost until they have ended."""


@pytest.mark.parametrize(
    ("most", "do"),
    [
        (4.0 + FIVE_MINUTES + 0.01, Do.NOTHING),
        (4.0 + FIVE_MINUTES, Do.WIND_DOWN),
        (4.0, Do.WIND_DOWN),
        (0.5, Do.WIND_DOWN),
    ],
)
def test_before_the_cost_reaches_its_limit_the_run_ends(most, do):
    found = judge(look(host(0), host(1)), limits=Limits(max_cost=most))
    assert found.do is do
    if do is Do.WIND_DOWN:
        assert found.why.startswith(f"it has cost $4.00, and would reach --max-cost {most:g} in ")
        assert found.status == 1


@pytest.mark.parametrize(("price", "do"), [(1.25, Do.NOTHING), (1.26, Do.WIND_DOWN)])
def test_when_spot_prices_rise_above_the_limit_of_an_hour_the_run_ends(price, do):
    seen = dataclasses.replace(look(host(0), host(1)), spot={"us-east-1a": price})
    found = judge(seen, limits=Limits(max_hourly_cost=2.5))
    assert found.do is do
    if do is Do.WIND_DOWN:
        assert found.why == "its hosts cost $2.52 an hour by now, more than --max-hourly-cost 2.5"
    hosts = [host(number, spot=False) for number in (0, 1)]
    on_demand = dataclasses.replace(look(*hosts), spot={"us-east-1a": 9.0})
    assert judge(on_demand, limits=Limits(max_hourly_cost=2.5)).do is Do.NOTHING


def test_what_lost_hosts_have_cost_counts():
    before = host(1, "terminated", reason_code=SPOT_ENDED, ended=NOW - timedelta(hours=1))
    seen = look(host(0), before, host(1, generation=1, launched=NOW - timedelta(hours=1)))
    assert judge(seen, limits=Limits(max_cost=4.0)).do is Do.WIND_DOWN
    assert judge(seen, limits=Limits(max_cost=4.5)).do is Do.NOTHING


def test_hosts_that_are_to_be_replaced_will_cost_what_they_did():
    """Nobody rents hosts for the last five minutes."""
    gone = [lost(number, ended=NOW) for number in (0, 1)]
    assert judge(look(*gone), limits=Limits(max_cost=4.1)).do is Do.WIND_DOWN


def test_a_cost_that_is_not_known_is_not_below_a_limit():
    seen = look(host(0), host(1, price=None))
    found = judge(seen, limits=Limits(max_cost=1000.0))
    assert (found.do, found.status) == (Do.WIND_DOWN, 1)
    assert found.why == "what its hosts cost is not known, and --max-cost cannot be kept"
    assert judge(seen).do is Do.NOTHING
    forgotten = dataclasses.replace(
        book_of(look(host(0), host(1))), hosts={"i-12345678": Paid(0, "", None, 1.0)}
    )
    seen = look(host(0), host(1))
    assert verdict.judge(seen, forgotten, Limits(max_cost=1000.0)).do is Do.WIND_DOWN


@pytest.mark.parametrize(("before", "do"), [(2, Do.RECOVER), (3, Do.WIND_DOWN)])
@pytest.mark.parametrize("kind", ["failed", "stalled"])
def test_after_some_failures_the_run_ends(kind, before, do):
    seen = look(host(0), host(1))
    events = [event(kind)] * before + [event("preempted"), event("failed", launch="f" * 16)]
    found = verdict.on_failure(seen, book_of(seen, *events), Limits(failures=3), "it broke")
    assert (found.do, found.status) == (do, int(do is Do.WIND_DOWN))
    ended = "it broke, and 3 --failures were seen to already"
    assert found.why == (ended if do is Do.WIND_DOWN else "it broke")


def test_without_any_failures_the_first_one_ends_the_run():
    seen = look(host(0), host(1))
    assert verdict.on_failure(seen, book_of(seen), Limits(failures=0), "-").do is Do.WIND_DOWN


def test_hosts_that_nobody_was_asked_about_are_not_rented():
    with pytest.raises(UserError, match=r"EC2 knows no host .* any more: the command that launch"):
        verdict.check_known(look(), book_of(look()))
    with pytest.raises(UserError, match="EC2 knows no host"):
        verdict.check_known(look(), book_of(look(), event("preempted"), event("restarted")))


@pytest.mark.parametrize(
    ("seen", "events"),
    [
        (look(lost(0)), ()),
        (look(), (event("preempted"),)),
        (look(finished=True), ()),
        (look(known=some_record(wish=record.END)), ()),
        (look(known=some_record(wish=record.STOP)), ()),
    ],
)
def test_a_run_whose_hosts_are_known_or_awaited_can_be_looked_after(seen, events):
    verdict.check_known(seen, book_of(seen, *events))


def test_at_the_limit_of_an_hours_cost_a_run_can_be_looked_after():
    verdict.check_price(look(host(0), host(1)), Limits(max_hourly_cost=2.0))
    with pytest.raises(UserError, match=r"cost \$2\.00 an hour, .* --max-hourly-cost 1\.99:"):
        verdict.check_price(look(host(0), host(1)), Limits(max_hourly_cost=1.99))


def test_gone_hosts_cost_nothing_an_hour():
    verdict.check_price(look(host(0), lost(1), host(1, generation=1)), Limits(max_hourly_cost=2.0))
    verdict.check_price(look(host(0), lost(1)), Limits(max_hourly_cost=1.0))


def test_where_prices_are_not_known_no_budget_can_be_kept():
    seen = look(host(0), host(1, price=None))
    verdict.check_price(seen, Limits())
    for limits in (Limits(max_hourly_cost=9.0), Limits(max_cost=9.0)):
        with pytest.raises(UserError, match="cost is not known: leave --max-hourly-cost and"):
            verdict.check_price(seen, limits)


def test_what_further_hosts_may_cost_is_what_the_others_leave():
    limits = Limits(max_hourly_cost=4.0)
    assert verdict.share(look(host(0), lost(1)), limits, 1) == 3.0
    assert verdict.share(look(host(0), lost(1)), limits, 2) == 1.5
    assert verdict.share(look(), limits, 2) == 2.0
    assert verdict.share(look(host(0), host(1)), Limits(max_cost=1.0), 1) is None
    with pytest.raises(UserError, match="not known: --max-hourly-cost cannot be kept"):
        verdict.share(look(host(0, price=None)), limits, 1)


def test_stopped_hosts_that_would_be_started_again_cost_as_the_others():
    seen = look(host(0, spot=False), host(1, "stopped", spot=False))
    verdict.check_price(seen, Limits(max_hourly_cost=2.0))
    with pytest.raises(UserError, match=r"cost \$2\.00 an hour"):
        verdict.check_price(seen, Limits(max_hourly_cost=1.5))
    assert verdict.share(seen, Limits(max_hourly_cost=4.0), 1) == 2.0


def test_a_budget_that_is_just_right_is_not_missed_by_rounding():
    assert 0.1 + 0.1 + 0.1 > 0.3
    three = [host(number, price=0.1) for number in range(3)]
    known = some_record("--machines=3")
    verdict.check_price(look(*three, known=known), Limits(max_hourly_cost=0.3))
    two = look(*three[:2], lost(2, price=0.1), known=known)
    assert verdict.share(two, Limits(max_hourly_cost=0.3), 1) == 0.1

"""Of all watchers one acts, whatever becomes of it."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from launcher import lease, watch_book
from launcher.aws import Account
from launcher.lease import Lease, Lost
from launcher.watch_book import Book
from tests.launcher.looks import BUCKET, NAME, event
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


@pytest.fixture(autouse=True)
def bucket(aws) -> None:
    aws.client("s3").create_bucket(Bucket=BUCKET)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats come at once, and a holder that gives them is not gone however slow this machine is."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders give no sign of life, and that is noticed at once."""
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.2)


def there(account: Account) -> Book:
    return watch_book.read(account, BUCKET, NAME)[0]


def lease_of(account: Account, said: Callable[[str], Any] = lambda _: None) -> Lease:
    return Lease(account, BUCKET, NAME, said)


def noted(book: Book, text: str = "a") -> Book:
    return book.with_event(event("failed", text=text))


def texts(book: Book) -> list[str]:
    return [each.text for each in book.events]


def take(account: Account) -> str:
    """Another watcher takes the lease."""
    book, version = watch_book.read(account, BUCKET, NAME)
    return watch_book.write(account, BUCKET, NAME, dataclasses.replace(book, holder="b"), version)


def lose_answers(account: Account, times: int = 1) -> None:
    """The answer of the next write is lost, and the write has come through."""
    events, left = account.client("s3").meta.events, [times]

    def lose(**_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            events.unregister("after-call.s3.PutObject", unique_id="lose")
        raise ConnectionClosedError(endpoint_url="https://s3")

    events.register("after-call.s3.PutObject", lose, unique_id="lose")


def test_the_store_refuses_to_replace_another_version(aws):
    """All that is tested here rests on it."""
    s3 = aws.client("s3")
    words = {"Bucket": BUCKET, "Key": "a"}
    first = s3.put_object(**words, Body=b"1", IfNoneMatch="*")["ETag"]
    second = s3.put_object(**words, Body=b"2", IfMatch=first)["ETag"]
    for condition in ({"IfMatch": first}, {"IfNoneMatch": "*"}):
        with pytest.raises(ClientError) as error:
            s3.put_object(**words, Body=b"3", **condition)
        assert error.value.response["Error"]["Code"] == "PreconditionFailed"
    assert s3.get_object(**words)["ETag"] == second


def test_the_first_watcher_takes_it_at_once_and_gives_it_back(account):
    said: list[str] = []
    with lease_of(account, said.append) as held:
        assert there(account).holder == held.book.holder != ""
        held.check()
        assert texts(held.update(noted)) == ["a"]
        assert texts(held.book) == texts(there(account)) == ["a"]
    assert (there(account).holder, texts(there(account))) == ("", ["a"])
    assert said == []


def test_what_was_written_before_is_gone_on_with(account):
    watch_book.write(account, BUCKET, NAME, noted(Book(attempt="x", beat=7)), "")
    with lease_of(account) as held:
        assert (texts(held.book), held.book.attempt) == (["a"], "x")
        assert held.book.beat > 7


def test_a_damaged_book_is_no_hindrance(aws, account):
    aws.client("s3").put_object(Bucket=BUCKET, Key=watch_book.key(NAME), Body=b"{")
    with lease_of(account) as held:
        assert held.update(noted) == there(account)


def test_while_it_is_held_the_beat_grows_and_the_others_wait(account):
    waits, told = threading.Event(), []

    def say(text: str) -> None:
        told.append(text)
        waits.set()

    def follow() -> None:
        with lease_of(account, say) as second:
            holders.append(second.book.holder)

    holders: list[str] = []
    follower = threading.Thread(target=follow, daemon=True)
    with lease_of(account) as first:
        follower.start()
        assert waits.wait(60)
        beat = first.book.beat
        while first.book.beat < beat + 5:
            time.sleep(0.01)
        assert there(account).holder == first.book.holder
        assert holders == []
        texts(first.update(noted))
    follower.join(60)
    assert len(holders) == 1 and holders[0] not in ("", first.book.holder)
    assert told == [f"another watcher looks after {NAME}: waiting until it is gone"]
    assert (there(account).holder, texts(there(account))) == ("", ["a"])


def test_when_its_holder_is_gone_the_next_takes_it(account, silent):
    """As after SIGKILL: nothing was given back."""
    gone = lease_of(account).__enter__()
    gone.update(noted)
    with lease_of(account) as held:
        assert there(account).holder == held.book.holder != gone.book.holder
        assert texts(held.book) == ["a"]


def test_a_holder_that_gives_a_late_sign_of_life_is_not_gone(account, monkeypatch):
    """The wait begins anew with each version that is seen."""
    watch_book.write(account, BUCKET, NAME, Book(holder="b"), "")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 30.0)
    clock, looks, own = [0.0], [0], watch_book.read
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)

    def read(*words: Any) -> tuple[Book, str]:
        """20 seconds pass from look to look; after the first one the other one beats."""
        looks[0] += 1
        clock[0] += 20.0
        if looks[0] == 2:
            book, version = own(*words)
            watch_book.write(account, BUCKET, NAME, dataclasses.replace(book, beat=1), version)
        return own(*words)

    monkeypatch.setattr(watch_book, "read", read)
    lease_of(account)._take()
    assert looks[0] == 4  # one more than without the sign


def test_a_holder_that_has_lost_it_cannot_write(account, silent):
    lost = lease_of(account).__enter__()
    with lease_of(account) as held:
        lost._written = time.monotonic()  # it was away, and believes that it was not
        with pytest.raises(Lost, match=f"another watcher looks after {NAME} now"):
            lost.update(noted)
        with pytest.raises(Lost):
            lost.check()
        assert there(account) == held.book
        lost.__exit__(None, None, None)
        assert there(account).holder == held.book.holder


def test_a_holder_that_has_lost_it_learns_it_by_its_own_beat(account):
    with lease_of(account) as held:
        version = ""
        while not version:  # the holder's own beats come between
            try:
                version = take(account)
            except UserError:
                continue
        with pytest.raises(Lost):
            while True:
                held.check()
                time.sleep(0.01)
    assert there(account).holder == "b"
    assert watch_book.read(account, BUCKET, NAME)[1] == version


def test_a_holder_whose_beats_do_not_come_through_acts_no_more(account, monkeypatch):
    with lease_of(account) as held:
        monkeypatch.setattr(lease, "LEASE_SECONDS", -1.0)
        with pytest.raises(Lost):
            held.check()
        with pytest.raises(Lost):
            held.update(noted)


def test_what_was_given_back_is_not_held(account):
    with lease_of(account) as held:
        pass
    with pytest.raises(Lost):
        held.check()
    with pytest.raises(Lost):
        held.update(noted)
    assert texts(there(account)) == []


def test_of_several_that_take_it_at_once_one_gets_it(account, silent, monkeypatch):
    """The others wait, for its silence here."""
    holders: list[str] = []
    own, one = watch_book.write, threading.Lock()

    def write(*words: Any) -> str:
        with one:  # moto compares the version in one step, and writes in another
            return own(*words)

    monkeypatch.setattr(watch_book, "write", write)

    def follow() -> None:
        held = lease_of(account)
        held._take()
        holders.append(held.book.holder)

    threads = [threading.Thread(target=follow, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(holders)) == 4
    assert there(account).holder == holders[-1]
    assert there(account).beat == 4


def test_a_write_whose_answer_was_lost_is_taken_in(account, monkeypatch):
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    with lease_of(account) as held:
        lose_answers(account)
        with pytest.raises(UserError):
            held.update(noted)
        assert texts(there(account)) == ["a"]
        assert texts(held.book) == []
        held.check()
        held.update(noted)
        assert texts(there(account)) == texts(held.book) == ["a"]
        held.update(lambda book: noted(book, "b"))
        assert texts(there(account)) == ["a", "b"]
    assert there(account).holder == ""


def test_while_the_store_is_away_the_lease_is_not_lost(account, aws):
    with lease_of(account) as held:
        beat = held.book.beat
        lose_answers(account, times=3)
        while held.book.beat < beat + 3:
            time.sleep(0.01)
        held.check()
        assert texts(held.update(noted)) == ["a"]


def test_what_cannot_be_given_back_hides_no_error(account, monkeypatch):
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    with pytest.raises(ZeroDivisionError), lease_of(account):
        lose_answers(account)
        raise ZeroDivisionError

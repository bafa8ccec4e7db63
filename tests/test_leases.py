"""Who may run a turn on a session, who waits, and for how long."""

from __future__ import annotations

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.leases import Lease, Leases
from claude_proxy.sessions.waiting import WaitingRoom
from tests.support import result_of

TIMEOUT = 30.0


def make(queue_length: int = 64) -> tuple[Leases, Clock]:
    clock = Clock()
    return Leases(clock, waiting_room=WaitingRoom(queue_length, TIMEOUT)), clock


def acquired(leases: Leases, key: str) -> Lease:
    lease: Lease = result_of(leases.acquire(key))
    return lease


def error_of(answer: Deferred[Lease]) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        result_of(answer)
    return caught.value


def test_a_free_key_is_given_at_once() -> None:
    leases, clock = make()
    assert not acquired(leases, "a").waited
    assert not acquired(leases, "b").waited
    assert (leases.held, leases.waiting) == (2, 0)
    assert clock.getDelayedCalls() == []


def test_those_who_wait_are_served_in_their_order() -> None:
    leases, clock = make()
    holder = acquired(leases, "a")
    order: list[tuple[str, bool]] = []
    granted: list[Lease] = []
    for name in ("first", "second", "third"):

        def got(lease: Lease, name: str = name) -> None:
            order.append((name, lease.waited))
            granted.append(lease)

        leases.acquire("a").addCallback(got)
    assert leases.waiting == 3
    holder.release()
    assert order == [("first", True)]
    granted[0].release()
    granted[1].release()
    assert [name for name, _ in order] == ["first", "second", "third"]
    assert (leases.held, leases.waiting) == (1, 0)
    granted[2].release()
    assert leases.held == 0
    assert clock.getDelayedCalls() == []


def test_nobody_waits_for_another_key() -> None:
    leases, _ = make()
    acquired(leases, "a")
    leases.acquire("a")
    assert not acquired(leases, "b").waited


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    leases, _ = make(queue_length=2)
    first, second = acquired(leases, "a"), acquired(leases, "b")
    leases.acquire("a")
    waiting = leases.acquire("b")
    error = error_of(leases.acquire("a"))
    assert error.failure is Failure.SERVER_BUSY
    assert error.retry_after == 30
    assert "1 more request waiting for it" in error.message
    assert "2 of at most 2 requests are waiting" in error.message
    assert error.message.endswith("Try again in 30 seconds.")
    assert leases.waiting == 2
    second.release()
    result_of(waiting).release()
    leases.acquire("a")
    assert leases.waiting == 2
    first.release()


def test_without_a_queue_only_free_keys_are_given() -> None:
    leases, _ = make(queue_length=0)
    acquired(leases, "a")
    assert error_of(leases.acquire("a")).failure is Failure.SERVER_BUSY


def test_patience_ends_with_a_409_that_says_how_long_it_was() -> None:
    leases, clock = make()
    holder = acquired(leases, "a")
    waiting = leases.acquire("a")
    clock.advance(TIMEOUT - 0.001)
    assert leases.waiting == 1
    clock.advance(0.001)
    error = error_of(waiting)
    assert error.failure is Failure.SESSION_BUSY
    assert "30 seconds" in error.message
    assert "was the next" in error.message
    assert (leases.held, leases.waiting) == (1, 0)
    holder.release()
    assert leases.held == 0


@pytest.mark.parametrize(
    ("before", "words"),
    [(1, "with 1 request in line before this one"), (3, "with 3 requests in line before")],
)
def test_a_409_says_how_many_wait_before(before: int, words: str) -> None:
    leases, clock = make()
    acquired(leases, "a")
    clock.advance(1)
    for _ in range(before):
        leases.acquire("a")
    impatient = leases.acquire("a", TIMEOUT - 1)
    leases.acquire("a")
    clock.advance(TIMEOUT - 1)
    assert words in error_of(impatient).message


def test_each_has_a_patience_of_its_own() -> None:
    leases, clock = make()
    holder = acquired(leases, "a")
    impatient = leases.acquire("a")
    clock.advance(20)
    later = leases.acquire("a")
    clock.advance(10)
    assert error_of(impatient).failure is Failure.SESSION_BUSY
    clock.advance(5)
    holder.release()
    assert result_of(later).waited
    assert clock.getDelayedCalls() == []


def test_cancelling_leaves_the_queue() -> None:
    leases, clock = make()
    holder = acquired(leases, "a")
    leaving, staying = leases.acquire("a"), leases.acquire("a")
    leaving.cancel()
    with pytest.raises(CancelledError):
        result_of(leaving)
    assert leases.waiting == 1
    holder.release()
    assert result_of(staying).waited
    assert clock.getDelayedCalls() == []


def test_cancelling_what_is_granted_already_changes_nothing() -> None:
    leases, _ = make()
    granted = leases.acquire("a")
    granted.cancel()
    assert leases.held == 1
    result_of(granted).release()
    assert leases.held == 0


def test_releasing_twice_does_not_take_it_from_the_next() -> None:
    leases, _ = make()
    holder = acquired(leases, "a")
    second, third = leases.acquire("a"), leases.acquire("a")
    holder.release()
    holder.release()
    assert result_of(second).waited
    assert leases.waiting == 1
    assert not third.called


def test_a_further_key_is_held_and_released_with_the_first() -> None:
    leases, _ = make()
    holder = acquired(leases, "a")
    holder.add_key("b")
    holder.add_key("b")
    holder.add_key("a")
    waiting = leases.acquire("b")
    assert (leases.held, leases.waiting) == (2, 1)
    holder.release()
    assert leases.held == 1
    result_of(waiting).release()
    assert leases.held == 0


def test_a_further_key_that_another_holds_stays_theirs() -> None:
    leases, _ = make()
    holder, other = acquired(leases, "a"), acquired(leases, "b")
    holder.add_key("b")
    holder.release()
    assert leases.held == 1
    other.release()
    assert leases.held == 0


def test_a_key_is_claimed_once() -> None:
    leases, _ = make()
    assert leases.claim("a")
    assert not leases.claim("a")


def test_a_released_lease_takes_no_further_key() -> None:
    leases, _ = make()
    late = acquired(leases, "a")
    late.release()
    late.add_key("b")
    assert leases.held == 0, "nobody would ever give it back"


def test_what_is_left_of_a_patience_is_enough_or_not() -> None:
    leases, clock = make()
    holder = acquired(leases, "a")
    short, none, whole = leases.acquire("a", 5), leases.acquire("a", -1), leases.acquire("a")
    clock.advance(0)
    assert error_of(none).failure is Failure.SESSION_BUSY
    clock.advance(5)
    assert error_of(short).failure is Failure.SESSION_BUSY
    holder.release()
    assert result_of(whole).waited


def test_who_comes_back_at_once_when_patience_ends_waits_at_the_end() -> None:
    leases, clock = make(queue_length=2)
    holder = acquired(leases, "a")
    again: list[Deferred[Lease]] = []
    leases.acquire("a").addErrback(lambda _: again.append(leases.acquire("a")))
    clock.advance(1)
    other = leases.acquire("a")
    clock.advance(TIMEOUT - 1)
    assert leases.waiting == 2
    holder.release()
    result_of(other).release()
    assert result_of(again[0]).waited

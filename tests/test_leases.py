"""Who may run a turn on a session, who waits, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.leases import Lease, Leases
from tests.support import result_of

TIMEOUT = 30.0


def make(queue_length: int = 64) -> tuple[Leases, Clock]:
    clock = Clock()
    return Leases(clock, queue_length=queue_length, queue_timeout=TIMEOUT), clock


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
    assert (leases.held, leases.waiting) == (1, 0)
    holder.release()
    assert leases.held == 0


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


@dataclass
class Client:
    """One who asked for a key: what became of it."""

    key: str
    answer: Deferred[Lease]
    lease: Lease | None = None
    failure: TwistedFailure | None = None
    released: bool = False
    extra: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.answer.addCallbacks(self.granted, self.failed)

    def granted(self, lease: Lease) -> None:
        assert self.lease is None
        self.lease = lease

    def failed(self, failure: TwistedFailure) -> None:
        assert self.failure is None
        self.failure = failure

    @property
    def holds(self) -> bool:
        return self.lease is not None and not self.released

    @property
    def waits(self) -> bool:
        return self.lease is None and self.failure is None

    @property
    def keys(self) -> set[str]:
        return {self.key, *self.extra} if self.holds else set()


KEYS = st.sampled_from("abc")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), KEYS),
        st.tuples(st.just("acquire"), KEYS),
        st.tuples(st.sampled_from(["release", "cancel"]), st.integers(0, 30)),
        st.tuples(st.just("add"), st.integers(0, 30), KEYS),
        st.tuples(st.just("wait"), st.floats(0.1, 20)),
    ),
    max_size=60,
)


class World:
    """Many clients of few keys, and what must hold of them at any moment."""

    def __init__(self) -> None:
        self.leases, self.clock = make(queue_length=5)
        self.clients: list[Client] = []

    def act(self, name: object, *values: object) -> None:
        if name == "acquire":
            key = str(values[0])
            self.clients.append(Client(key, self.leases.acquire(key)))
        elif name == "wait":
            self.clock.advance(float(str(values[0])))
        elif self.clients:
            client = self.clients[int(str(values[0])) % len(self.clients)]
            if name == "cancel":
                client.answer.cancel()
            elif name == "release":
                self.release(client)
            elif client.holds:
                self.add_key(client, str(values[1]))

    def release(self, client: Client) -> None:
        """Release, once or again; the first in line for its key must have it then."""
        if client.lease is None:
            return
        held = client.keys
        in_line = [
            next((c for c in self.clients if c.waits and c.key == key), None) for key in held
        ]
        client.released = True
        client.lease.release()
        assert all(waiter.holds for waiter in in_line if waiter), "one was passed over"

    def add_key(self, client: Client, key: str) -> None:
        assert client.lease is not None
        if not any(key in other.keys for other in self.clients):
            client.extra.add(key)
        client.lease.add_key(key)

    def check(self) -> None:
        held = [key for client in self.clients for key in client.keys]
        assert len(held) == len(set(held)), "two hold one key"
        assert self.leases.held == len(held)
        assert self.leases.waiting == sum(client.waits for client in self.clients)
        # Everybody who waits has somebody to wait for, and no timer is left over.
        assert {client.key for client in self.clients if client.waits} <= set(held)
        assert len(self.clock.getDelayedCalls()) == self.leases.waiting


@given(OPERATIONS)
def test_no_interleaving_gives_a_key_to_two_or_loses_a_lease(
    operations: list[tuple[object, ...]],
) -> None:
    world = World()
    for operation in operations:
        world.act(*operation)
        world.check()
    while holders := [client for client in world.clients if client.holds]:
        world.release(holders[0])
        world.check()
    assert (world.leases.held, world.leases.waiting) == (0, 0)
    for client in world.clients:
        assert (client.lease is None) != (client.failure is None)

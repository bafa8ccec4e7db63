"""How many turns run at once; and leases and slots together, whatever happens in which order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.capacity import Capacity, Slot
from claude_proxy.sessions.leases import Lease, Leases
from claude_proxy.sessions.waiting import WaitingRoom
from tests.support import result_of

TIMEOUT = 30.0


def make(turns: int = 1, queue_length: int = 64) -> tuple[Capacity, Clock]:
    clock = Clock()
    return Capacity(clock, turns=turns, waiting_room=WaitingRoom(queue_length, TIMEOUT)), clock


def acquired(capacity: Capacity) -> Slot:
    slot: Slot = result_of(capacity.acquire())
    return slot


def error_of(answer: Deferred[Slot]) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        result_of(answer)
    return caught.value


def test_slots_are_given_at_once_while_there_are_any() -> None:
    capacity, clock = make(turns=2)
    acquired(capacity)
    acquired(capacity)
    waiting = capacity.acquire()
    assert not waiting.called
    assert (capacity.running, capacity.waiting) == (2, 1)
    assert len(clock.getDelayedCalls()) == 1


def test_a_slot_goes_to_the_first_in_line() -> None:
    capacity, clock = make()
    holder = acquired(capacity)
    first, second = capacity.acquire(), capacity.acquire()
    holder.release()
    assert (first.called, second.called) == (True, False)
    assert (capacity.running, capacity.waiting) == (1, 1)
    result_of(first).release()
    result_of(second).release()
    assert (capacity.running, capacity.waiting) == (0, 0)
    assert clock.getDelayedCalls() == []


def test_releasing_twice_gives_one_slot() -> None:
    capacity, _ = make()
    holder = acquired(capacity)
    first, second = capacity.acquire(), capacity.acquire()
    holder.release()
    holder.release()
    assert (first.called, second.called) == (True, False)
    result_of(first).release()
    result_of(second).release()
    holder.release()
    assert capacity.running == 0


def test_cancelling_leaves_the_queue() -> None:
    capacity, clock = make()
    holder = acquired(capacity)
    leaving, staying = capacity.acquire(), capacity.acquire()
    leaving.cancel()
    with pytest.raises(CancelledError):
        result_of(leaving)
    assert capacity.waiting == 1
    holder.release()
    result_of(staying).release()
    assert capacity.running == 0
    assert clock.getDelayedCalls() == []


def test_a_full_queue_is_a_429_that_says_how_full() -> None:
    capacity, _ = make(turns=2, queue_length=1)
    acquired(capacity)
    acquired(capacity)
    capacity.acquire()
    error = error_of(capacity.acquire())
    assert (error.failure, error.retry_after) == (Failure.SERVER_BUSY, 30)
    assert error.message == (
        "2 of at most 2 turns are running, and 1 of at most 1 requests are waiting: the queue is "
        "full. Try again in 30 seconds; the server's administrator may raise MAX_CONCURRENT_TURNS."
    )
    assert (capacity.running, capacity.waiting) == (2, 1)


def test_patience_ends_with_a_429_that_says_the_position() -> None:
    capacity, clock = make()
    acquired(capacity)
    clock.advance(1)
    capacity.acquire()
    impatient = capacity.acquire(TIMEOUT - 1)
    capacity.acquire()
    clock.advance(TIMEOUT - 1)
    error = error_of(impatient)
    assert (error.failure, error.retry_after) == (Failure.SERVER_BUSY, 30)
    assert error.message.startswith(
        "After 30 seconds of waiting this request was number 2 of 3 in line. 1 of at most 1 turn "
        "are running. Try again in 30 seconds;"
    )
    assert (capacity.running, capacity.waiting) == (1, 2)


def test_the_advice_follows_from_turns_that_have_ended() -> None:
    capacity, clock = make(turns=2, queue_length=4)
    for seconds in (10, 14):
        slot = acquired(capacity)
        clock.advance(seconds)
        slot.release()
    acquired(capacity)
    acquired(capacity)
    for _ in range(4):
        capacity.acquire()
    # Five turns have to end before one that comes now runs; they take 12 seconds, two at a time.
    assert error_of(capacity.acquire()).retry_after == 30


def test_who_waited_for_a_session_finds_the_place_in_the_queue_still_free() -> None:
    clock, room = Clock(), WaitingRoom(1, TIMEOUT)
    leases = Leases(clock, waiting_room=room)
    capacity = Capacity(clock, turns=1, waiting_room=room)
    holder: Lease = result_of(leases.acquire("a"))
    slot = acquired(capacity)
    slots: list[Deferred[Slot]] = []
    leases.acquire("a").addCallback(lambda _: slots.append(capacity.acquire()))
    assert error_of(capacity.acquire()).failure is Failure.SERVER_BUSY
    holder.release()
    assert (leases.waiting, capacity.waiting, room.waiting) == (0, 1, 1)
    slot.release()
    result_of(slots[0]).release()
    assert (room.waiting, capacity.running) == (0, 0)


# Leases and slots together.

TURNS, LENGTH = 2, 5
KEYS = ("a", "b", "c")


class Client:
    """A request on its way: the lease of its session, a slot, the turn, and out."""

    def __init__(
        self, world: World, key: str, patience: int, *, hasty: bool, stubborn: bool
    ) -> None:
        self.world = world
        self.key = key
        self.extra: set[str] = set()
        self.patience = patience
        self.hasty = hasty  # its turn is over as soon as it runs
        self.stubborn = stubborn  # when its patience ends it comes again
        self.lease: Lease | None = None
        self.slot: Slot | None = None
        self.failure: TwistedFailure | None = None
        self.released = False
        self.waits_for: str | None = None
        self.number = 0
        self.since = 0.0
        self.answer: Deferred[Lease] | Deferred[Slot]

    def set_out(self) -> None:
        leases = self.world.leases
        self.ask(self.key, partial(leases.acquire, self.key), self.got_lease)

    def ask(self, line: str, acquire: object, got: object) -> None:
        assert callable(acquire)
        assert callable(got)
        self.waits_for, self.number = line, self.world.next_number()
        self.since = self.world.clock.seconds()
        self.answer = acquire(self.patience)
        self.answer.addCallbacks(got, self.failed)

    def arrived(self) -> None:
        """Its wait is over; whoever came before it in its line must not wait any more."""
        assert self.waits_for is not None
        assert self.failure is None
        assert not any(
            other.waits_for == self.waits_for and other.number < self.number
            for other in self.world.clients
        ), "one was passed over"
        self.patience -= int(self.world.clock.seconds() - self.since)
        assert self.patience >= 0
        self.waits_for = None

    def got_lease(self, lease: Lease) -> None:
        assert self.lease is None
        self.arrived()
        self.lease = lease
        self.ask("", self.world.capacity.acquire, self.got_slot)

    def got_slot(self, slot: Slot) -> None:
        assert self.slot is None
        self.arrived()
        self.slot = slot
        if self.hasty:
            self.finish()

    def failed(self, failure: TwistedFailure) -> None:
        assert self.failure is None
        assert self.waits_for is not None
        world, line = self.world, self.waits_for
        self.failure, self.waits_for = failure, None
        waited = world.clock.seconds() - self.since
        if isinstance(failure.value, ProxyError):
            gave_up = waited >= self.patience
            if not gave_up:
                assert waited == 0
                assert world.room.is_full, "there was room"
                assert self.lease is None or not self.lease.waited, "it had a place before"
            busy = Failure.SESSION_BUSY if gave_up and line else Failure.SERVER_BUSY
            # Those without patience may find the room full as well.
            assert failure.value.failure in {busy, Failure.SERVER_BUSY}
            self.finish()
            if gave_up and self.stubborn:
                world.enter(self.key, 10, hasty=False, stubborn=False)
        else:
            assert failure.check(CancelledError)
            self.finish()

    def finish(self) -> None:
        """Give everything back, as often as one likes."""
        self.released = True
        if self.slot is not None:
            self.slot.release()
        if self.lease is not None:
            self.lease.release()

    @property
    def keys(self) -> set[str]:
        return {self.key, *self.extra} if self.lease is not None and not self.released else set()

    @property
    def runs(self) -> bool:
        return self.slot is not None and not self.released


class World(RuleBasedStateMachine):
    """Many clients of few sessions and slots, and what must hold of them at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.room = WaitingRoom(LENGTH, TIMEOUT)
        self.leases = Leases(self.clock, waiting_room=self.room)
        self.capacity = Capacity(self.clock, turns=TURNS, waiting_room=self.room)
        self.clients: list[Client] = []
        self._number = 0

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def alive(self) -> Iterator[Client]:
        return (client for client in self.clients if client.keys or client.waits_for is not None)

    def pick(self, number: int) -> Client:
        """One that still does something, or else any."""
        candidates = list(self.alive()) or self.clients
        return candidates[number % len(candidates)]

    @rule(
        key=st.sampled_from(KEYS),
        patience=st.integers(0, 30),
        hasty=st.booleans(),
        stubborn=st.booleans(),
    )
    def enter(self, key: str, patience: int, *, hasty: bool, stubborn: bool) -> None:
        client = Client(self, key, patience, hasty=hasty, stubborn=stubborn)
        self.clients.append(client)
        client.set_out()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20))
    def leave(self, number: int) -> None:
        """The client goes: whatever it waits for is cancelled, and what it has it gives back."""
        client = self.pick(number)
        client.answer.cancel()
        client.finish()

    @precondition(lambda self: any(client.runs for client in self.clients))
    @rule(number=st.integers(0, 20), again=st.booleans())
    def end_a_turn(self, number: int, *, again: bool) -> None:
        running = [client for client in self.clients if client.runs]
        client = running[number % len(running)]
        client.finish()
        if again:
            client.finish()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 20), key=st.sampled_from(KEYS))
    def learn_a_name(self, number: int, key: str) -> None:
        """A further key, also for one whose lease is given back already."""
        client = self.clients[number % len(self.clients)]
        if client.lease is None:
            return
        if not client.released and not any(key in other.keys for other in self.clients):
            client.extra.add(key)
        client.lease.add_key(key)

    @rule(seconds=st.integers(0, 20))
    def time_passes(self, seconds: int) -> None:
        self.clock.pump([1] * seconds or [0])

    @invariant()
    def nothing_is_held_twice(self) -> None:
        held = [key for client in self.clients for key in client.keys]
        assert len(held) == len(set(held)), "two hold one key"
        assert self.leases.held == len(held)
        running = sum(client.runs for client in self.clients)
        assert self.capacity.running == running <= TURNS

    @invariant()
    def everybody_who_waits_is_known_and_has_something_to_wait_for(self) -> None:
        lines = [client.waits_for for client in self.clients if client.waits_for is not None]
        for_slots = lines.count("")
        assert (self.capacity.waiting, self.leases.waiting) == (for_slots, len(lines) - for_slots)
        assert self.room.waiting == len(lines) <= LENGTH
        assert len(self.clock.getDelayedCalls()) == len(lines), "a timer is left over"
        assert set(lines) - {""} <= {key for client in self.clients for key in client.keys}
        assert not for_slots or self.capacity.running == TURNS

    @invariant()
    def nobody_waits_too_long(self) -> None:
        now = self.clock.seconds()
        for client in self.clients:
            if client.waits_for is not None:
                assert now - client.since <= client.patience

    def teardown(self) -> None:
        while running := [client for client in self.clients if client.runs]:
            running[0].finish()
        self.nothing_is_held_twice()
        assert not list(self.alive())
        assert (self.leases.held, self.capacity.running, self.room.waiting) == (0, 0, 0)
        assert self.clock.getDelayedCalls() == []
        for client in self.clients:
            assert (client.slot is None) != (client.failure is None)


TestLeasesAndSlots = World.TestCase

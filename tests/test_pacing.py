"""When a process may be started: one in each turn of the reactor, few at a time, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from claude_proxy.sessions.pacing import START_WAIT, Pace, Start
from tests.support import result_of


class TurningClock(Clock):
    """A clock that turns as a reactor does: what is called for later in a turn has to wait."""

    def turn(self) -> None:
        for call in [call for call in self.calls if call.getTime() <= self.seconds()]:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)


class World:
    """A pace, and the starts that it let happen."""

    def __init__(self, at_once: int = 100) -> None:
        self.clock = TurningClock()
        self.pace = Pace(self.clock, at_once=at_once)
        self.starts: dict[int, Start] = {}
        self.asked = 0

    @property
    def started(self) -> list[int]:
        return list(self.starts)

    def ask(self) -> Deferred[None]:
        number = self.asked
        self.asked += 1

        async def start() -> None:
            self.starts[number] = await self.pace.my_turn()

        return Deferred.fromCoroutine(start())

    def is_idle(self) -> bool:
        """Whether, a turn later, nobody waits or starts."""
        self.clock.turn()
        return self.pace.waiting == self.pace.starting == 0 and not self.clock.getDelayedCalls()


def test_who_comes_alone_starts_at_once() -> None:
    world = World()
    for _ in range(2):
        start: Start = result_of(world.pace.my_turn())
        assert (world.pace.waiting, world.pace.starting) == (0, 1)
        start.over()
        assert world.is_idle()


def test_a_burst_starts_one_in_each_turn_in_order() -> None:
    world = World()
    for _ in range(4):
        world.ask()
    assert (world.started, world.pace.waiting) == ([0], 3)
    for number in (1, 2, 3):
        world.clock.turn()
        assert world.started == list(range(number + 1))


def test_who_comes_while_others_wait_starts_after_them() -> None:
    world = World()
    world.ask()
    world.ask()
    world.clock.turn()
    world.ask()
    assert world.started == [0, 1]
    world.clock.turn()
    assert world.started == [0, 1, 2]


def test_who_is_woken_and_asks_again_waits_for_another_turn() -> None:
    world = World()

    async def two() -> None:
        world.starts[10] = await world.pace.my_turn()
        world.starts[11] = await world.pace.my_turn()

    world.ask()
    Deferred.fromCoroutine(two())
    world.clock.turn()
    assert world.started == [0, 10]
    world.clock.turn()
    assert world.started == [0, 10, 11]


def test_who_leaves_while_waiting_takes_no_turn() -> None:
    world = World()
    world.ask()
    leaving = world.ask()
    world.ask()
    leaving.cancel()
    with pytest.raises(CancelledError):
        result_of(leaving)
    assert world.pace.waiting == 1
    world.clock.turn()
    assert world.started == [0, 2]


def test_only_so_many_are_starting_at_a_time() -> None:
    world = World(at_once=2)
    for _ in range(4):
        world.ask()
    for _ in range(5):
        world.clock.turn()
    assert (world.started, world.pace.starting, world.pace.waiting) == ([0, 1], 2, 2)
    world.starts[1].over()
    world.starts[1].over()
    world.clock.turn()
    assert (world.started, world.pace.starting, world.pace.waiting) == ([0, 1, 2], 2, 1)


def test_two_that_are_over_in_one_turn_make_room_for_one_start_in_each_turn() -> None:
    world = World(at_once=2)
    for _ in range(4):
        world.ask()
    world.clock.turn()
    world.clock.turn()
    world.starts[0].over()
    world.starts[1].over()
    assert world.started == [0, 1, 2]
    world.clock.turn()
    assert world.started == [0, 1, 2, 3]


def test_a_process_that_says_nothing_does_not_hold_up_the_others() -> None:
    world = World(at_once=1)
    world.ask()
    world.ask()
    world.clock.turn()
    world.clock.advance(START_WAIT - 0.1)
    assert world.started == [0]
    world.clock.advance(0.1)
    assert world.started == [0, 1]
    world.starts[0].over()
    assert world.pace.starting == 1, "that one was over before"
    world.starts[1].over()
    assert world.is_idle()


STEPS = st.sampled_from(["ask", "ask", "turn", "leave", "over", "wait"])


@given(st.lists(STEPS, max_size=60), st.integers(0, 30))
def test_no_turn_has_two_starts_and_nobody_is_forgotten(steps: list[str], which: int) -> None:
    world = World(at_once=3)
    asked: list[Deferred[None]] = []
    before_this_turn = 0
    gone = set()
    for step in steps:
        if step == "ask":
            asked.append(world.ask())
        elif step in {"turn", "wait"}:
            before_this_turn = len(world.starts)
            if step == "wait":
                world.clock.rightNow += 0.4
            world.clock.turn()
        elif step == "over" and world.starts:
            world.starts[world.started[which % len(world.starts)]].over()
        elif step == "leave" and asked and not asked[-1].called:
            asked[-1].addErrback(lambda _: None)
            asked[-1].cancel()
            gone.add(len(asked) - 1)
        assert len(world.starts) - before_this_turn <= 1
        assert world.pace.starting <= 3
        assert world.pace.waiting + len(world.starts) + len(gone) == len(asked)
    for _ in asked:
        world.clock.turn()
        for start in list(world.starts.values()):
            start.over()
    assert world.started == [number for number in range(len(asked)) if number not in gone]
    assert world.is_idle()

"""Processes that are started ahead of need, with children that the test plays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import capturedLogs

from claude_proxy.cli.command import LaunchKey, TurnSettings
from claude_proxy.cli.process import AgentProcess
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IAgentListener
from claude_proxy.sessions.pool import Agent, Setup
from claude_proxy.sessions.spares import REST, RETRY, Spares
from tests.support import FakeChild, FakeReactor, result_of

A = Setup(LaunchKey("/w/a"), ("/opt/claude", "2.1.197"), 0)
B = replace(A, key=LaunchKey("/w/b"))
C = replace(A, key=LaunchKey("/w/c"))
NEWER_CLI = replace(A, cli=("/opt/claude", "2.1.330"))
MCP_1 = replace(A, key=LaunchKey("/w/a", mcp_servers=("git",)), mcp=1)
MCP_2 = replace(MCP_1, mcp=2)


class World:
    """Spares, and all that they need."""

    def __init__(self, count: int = 1) -> None:
        self.reactor = FakeReactor()
        self.stamps: dict[Setup, object] = {}
        self.busy = False
        self.room = 100
        self.start_error: Exception | None = None
        self.held_starts: list[Deferred[None]] | None = None
        self.held_stamps: list[Deferred[None]] | None = None
        self.buried: list[str] = []
        self.started: list[Setup] = []
        self.agents: dict[str, Agent] = {}
        self.spares = Spares(
            cast(IReactorTime, self.reactor),
            count=count,
            start=self.start,
            gone=self.gone,
            stamp=self.stamp,
            room=lambda: self.room,
            is_busy=lambda: self.busy,
            make_id=lambda: f"id{len(self.agents)}",
        )

    async def start(self, setup: Setup, session: str) -> Agent:
        if self.held_starts is not None:
            held: Deferred[None] = Deferred()
            self.held_starts.append(held)
            await held
        if self.start_error is not None:
            raise self.start_error
        process = AgentProcess(
            cast(IReactorTime, self.reactor),
            cast(IAgentListener, None),
            has_control=True,
            kill_timeout=5,
            line_limit=1000,
            log_context={},
        )
        self.reactor.spawnProcess(process, "claude", ["claude"], {})
        agent = self.agents[session] = Agent(process, setup, session, TurnSettings())
        self.started.append(setup)
        return agent

    async def gone(self, agent: Agent) -> None:
        assert agent.process.ended
        self.buried.append(agent.marker)

    async def stamp(self, setup: Setup) -> object:
        if self.held_stamps is not None:
            held: Deferred[None] = Deferred()
            self.held_stamps.append(held)
            await held
        stamp = self.stamps.get(setup, 0)
        if isinstance(stamp, Exception):
            raise stamp
        return stamp

    @property
    def children(self) -> list[FakeChild]:
        return self.reactor.children

    def turn(self, setup: Setup = A) -> Agent | None:
        """A new session's turn, from its beginning to its end; the process is the test's."""
        self.busy = True
        self.spares.used(setup)
        agent: Agent | None = result_of(self.spares.take(setup))
        self.busy = False
        self.spares.rested()
        return agent

    def rest(self, seconds: float = REST) -> None:
        self.reactor.advance(seconds)

    def is_still(self) -> bool:
        """Whether no timer runs."""
        return not self.reactor.getDelayedCalls()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: sent.append((group, number)))
    return sent


def of_type(events: Sequence[Any], name: str) -> list[Any]:
    return [event for event in events if event.get("type") == name]


# From one turn to the next.


def test_after_a_rest_there_is_a_spare_for_what_was_used(world: World) -> None:
    assert world.turn() is None
    world.rest(REST - 0.1)
    assert world.started == []
    world.rest(0.1)
    assert world.started == [A]
    assert world.is_still()
    agent = world.turn()
    assert agent is world.agents["id0"]
    assert agent.cli_session == "id0"
    assert not world.children[0].stdin_closed
    assert world.spares.waiting == 0
    world.rest()
    assert world.started == [A, A], "one that was used is replaced"


def test_a_spare_is_only_for_an_equal_setup(world: World) -> None:
    world.turn(A)
    world.rest()
    assert world.turn(B) is None
    assert world.turn(A) is not None


def test_without_spares_nothing_happens() -> None:
    world = World(0)
    assert world.turn() is None
    assert world.is_still()
    assert result_of(world.spares.close()) is None


def test_a_turn_puts_off_the_start(world: World) -> None:
    world.turn()
    world.rest(REST / 2)
    world.spares.used(A)
    assert world.is_still()
    world.rest(10)
    assert world.started == []


def test_nothing_is_started_while_the_server_is_busy(world: World) -> None:
    world.turn()
    world.busy = True
    world.rest()
    assert world.started == []
    assert world.is_still()


def test_a_turn_breaks_off_a_start_that_has_not_come_to_its_process(world: World) -> None:
    world.held_starts = []
    world.turn()
    world.rest()
    [held] = world.held_starts
    held.addErrback(lambda failure: failure.trap(CancelledError) and None)
    world.held_starts = None
    world.busy = True
    world.spares.used(A)
    assert held.called
    assert (world.started, world.spares.waiting) == ([], 0)
    world.busy = False
    world.spares.rested()
    world.rest()
    assert world.started == [A]


def test_a_turn_breaks_off_a_look_at_the_disk(world: World) -> None:
    world.held_stamps = []
    world.turn()
    world.rest()
    world.held_stamps = None
    world.busy = True
    world.spares.used(A)
    assert world.started == []
    assert world.is_still()


def test_several_are_started_one_after_the_other_for_what_was_used_last() -> None:
    world = World(3)
    world.turn(A)
    world.turn(B)
    for expected in ([B], [B, A], [B, A, B], [B, A, B]):
        world.rest()
        assert world.started == expected
    assert world.is_still()


def test_what_is_out_of_use_gives_way(world: World) -> None:
    world.turn(A)
    world.rest()
    for _ in range(3):
        world.turn(B)
    world.rest()
    assert world.started == [A], "it was used of late"
    world.turn(B)
    world.rest()
    assert world.children[0].stdin_closed
    assert world.started == [A, B]
    world.children[0].exits()
    assert world.buried == ["id0"]


@pytest.mark.parametrize(("older", "newer"), [(A, NEWER_CLI), (B, NEWER_CLI), (MCP_1, MCP_2)])
def test_one_of_an_older_cli_or_configuration_goes_at_once(
    world: World, older: Setup, newer: Setup
) -> None:
    world.turn(older)
    world.rest()
    assert world.turn(newer) is None
    assert world.children[0].stdin_closed
    world.rest()
    assert world.started == [older, newer]


def test_one_without_mcp_servers_does_not_mind_their_configuration(world: World) -> None:
    world.turn(A)
    world.rest()
    world.turn(MCP_2)
    assert not world.children[0].stdin_closed


# What it has read.


def test_a_stale_one_is_not_used(world: World) -> None:
    world.turn()
    world.rest()
    world.stamps[A] = 1
    assert world.turn() is None
    assert world.children[0].stdin_closed
    world.rest()
    assert world.turn() is world.agents["id1"]


def test_a_turn_that_makes_one_stale_has_it_replaced_before_it_is_needed(world: World) -> None:
    world.turn()
    world.rest()
    world.spares.used(A)
    world.stamps[A] = 1
    world.spares.rested()
    world.rest()
    assert world.children[0].stdin_closed
    assert world.turn() is world.agents["id1"]


def test_what_changes_while_one_is_starting_makes_it_stale(world: World) -> None:
    world.held_starts = []
    world.turn()
    world.rest()
    world.stamps[A] = 1
    world.held_starts[0].callback(None)
    assert world.started == [A]
    assert world.turn() is None


def test_where_it_is_not_known_what_was_read_there_are_none(world: World) -> None:
    world.stamps[A] = None
    with capturedLogs() as events:
        world.turn()
        world.rest()
        world.turn()
        world.rest()
    assert world.started == []
    assert len(of_type(events, "spare_failed")) == 1
    assert world.is_still()


def test_a_look_that_fails_is_no_turns_failure(world: World) -> None:
    world.turn()
    world.rest()
    world.stamps[A] = RuntimeError("broken")
    assert world.turn() is None
    assert world.children[0].stdin_closed
    world.children[0].exits()
    world.rest()
    assert world.is_still()
    assert world.started == [A]


def test_a_client_that_leaves_meanwhile_leaves_the_spare(world: World) -> None:
    world.turn()
    world.rest()
    world.held_stamps = []
    taking: Deferred[Any] = Deferred.fromCoroutine(world.spares.take(A))
    taking.addErrback(lambda failure: failure.trap(CancelledError) and None)
    taking.cancel()
    world.held_stamps = None
    assert world.spares.waiting == 1
    assert world.turn() is world.agents["id0"]


def test_two_that_ask_at_once_never_get_the_same(world: World) -> None:
    world = World(2)
    world.turn()
    world.rest()
    world.rest()
    world.held_stamps = []
    taken: list[Any] = []
    for _ in range(3):
        Deferred.fromCoroutine(world.spares.take(A)).addCallback(taken.append)
    assert taken == [None]
    for held in list(world.held_stamps):
        held.callback(None)
    assert taken == [None, world.agents["id0"], world.agents["id1"]]


# Ends.


def test_one_that_dies_is_forgotten_and_not_started_again_and_again(world: World) -> None:
    world.turn()
    with capturedLogs() as events:
        for started in (1, 2, 3):
            world.rest()
            world.children[-1].exits(1)
            assert (len(world.started), world.spares.waiting) == (started, 0)
            assert len(world.buried) == started
            assert world.is_still()
            assert world.turn() is None
            world.rest()
            assert len(world.started) == started
            world.rest(RETRY)
            world.turn()
    assert len(of_type(events, "spare_failed")) == 1


def test_one_that_dies_while_it_is_looked_at_is_not_used(world: World) -> None:
    world.turn()
    world.rest()
    world.held_stamps = []
    taken: list[Any] = []
    Deferred.fromCoroutine(world.spares.take(A)).addCallback(taken.append)
    world.children[0].exits(1)
    world.held_stamps[0].callback(None)
    assert taken == [None]
    assert world.buried == ["id0"]


def test_what_a_taken_one_does_is_its_new_owners_business(world: World) -> None:
    world.turn()
    world.rest()
    assert world.turn() is not None
    with capturedLogs() as events:
        world.children[0].exits(1)
    assert of_type(events, "spare_failed") == []
    assert world.buried == []


@pytest.mark.parametrize(
    "error",
    [ProxyError(Failure.CLI_NOT_FOUND), OSError("no"), RuntimeError("a fault")],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_to_start_is_logged_once_and_tried_again_later(
    world: World, error: Exception
) -> None:
    world.start_error = error
    with capturedLogs() as events:
        for _ in range(3):
            world.turn()
            world.rest()
            assert world.is_still()
            world.rest(RETRY)
    assert len(of_type(events, "spare_failed")) == 1
    world.start_error = None
    world.turn()
    world.rest()
    assert world.started == [A]


def test_others_are_started_where_one_setup_fails() -> None:
    world = World(2)
    world.stamps[B] = None
    world.turn(A)
    world.turn(B)
    world.rest()
    world.rest()
    assert world.started == [A]


def test_room_is_made_by_the_oldest() -> None:
    world = World(2)
    world.turn(A)
    world.rest()
    world.rest()
    world.spares.make_room(1)
    assert [child.stdin_closed for child in world.children] == [True, False]
    world.spares.make_room()
    assert [child.stdin_closed for child in world.children] == [True, True]
    assert world.is_still() is False, "they are given time to go"
    for child in world.children:
        child.exits()
    assert world.is_still()
    world.spares.rested()
    world.rest()
    assert world.started == [A, A, A]


def test_dropped_ones_come_back_for_the_turns_that_follow(world: World) -> None:
    world.turn()
    world.rest()
    world.spares.drop("the MCP configuration was reloaded")
    world.children[0].exits()
    world.spares.rested()
    world.rest(10)
    assert world.started == [A]
    world.turn()
    world.rest()
    assert world.started == [A, A]


def close(world: World) -> list[None]:
    closed: list[None] = []
    Deferred.fromCoroutine(world.spares.close()).addCallback(closed.append)
    return closed


def test_the_stop_waits_until_they_are_gone(world: World) -> None:
    world.turn()
    world.rest()
    closed = close(world)
    assert world.children[0].stdin_closed
    assert closed == []
    world.children[0].exits()
    assert closed == [None]
    assert world.buried == ["id0"]
    world.turn()
    world.rest(10)
    assert world.started == [A]
    assert world.is_still()


def test_one_that_does_not_leave_is_killed(world: World, signals: list[tuple[int, int]]) -> None:
    world.turn()
    world.rest()
    closed = close(world)
    for _ in range(20):
        world.rest(1)
    assert closed == [None]
    assert len(signals) >= 2
    assert world.is_still()


def test_a_start_that_cannot_be_broken_off_is_ended_at_the_stop(world: World) -> None:
    world.turn()
    held: Deferred[None] = Deferred()
    original = world.start

    async def stubborn(setup: Setup, session: str) -> Agent:
        try:
            await Deferred()
        except CancelledError:
            await held
        return await original(setup, session)

    cast(Any, world.spares)._start = stubborn
    world.rest()
    closed = close(world)
    assert closed == []
    held.callback(None)
    assert world.children[0].stdin_closed
    assert closed == []
    world.children[0].exits()
    assert closed == [None]


def test_one_that_is_looked_at_during_the_stop_is_ended(world: World) -> None:
    world.turn()
    world.rest()
    world.held_stamps = []
    taken: list[Any] = []
    Deferred.fromCoroutine(world.spares.take(A)).addCallback(taken.append)
    close(world)
    world.held_stamps[0].callback(None)
    assert taken == [None]
    assert world.children[0].stdin_closed


def test_what_cannot_be_removed_does_not_hold_up_the_stop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(_: Agent) -> None:
        raise OSError

    monkeypatch.setattr(world.spares, "_gone", gone)
    world.turn()
    world.rest()
    closed = close(world)
    with capturedLogs() as events:
        world.children[0].exits()
    assert closed == [None]
    assert len(of_type(events, "internal_error")) == 1


# Whatever happens, in whatever order.


def die(world: World, code: int) -> None:
    if world.children and world.children[-1].pid is not None:
        world.children[-1].exits(code)


_STEPS: dict[str, Callable[[World, int], object]] = {
    "use": lambda world, n: world.spares.used([A, B, C, NEWER_CLI][n % 4]),
    "turn": lambda world, n: world.turn([A, B][n % 2]),
    "rested": lambda world, n: world.spares.rested(),
    "rest": lambda world, n: world.rest([0.5, 1, 70][n % 3]),
    "change": lambda world, n: world.stamps.update({[A, B, C][n % 3]: n}),
    "die": lambda world, n: die(world, n % 2),
    "busy": lambda world, n: setattr(world, "busy", n % 2 == 0),
    "room": lambda world, n: world.spares.make_room(n % 3),
    "drop": lambda world, n: world.spares.drop("a test"),
}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(_STEPS)), st.integers(0, 11)), max_size=40),
    st.integers(0, 3),
)
def test_there_are_never_too_many_and_none_is_left(
    steps: list[tuple[str, int]], count: int
) -> None:
    world = World(count)
    for name, number in steps:
        _STEPS[name](world, number)
        assert world.spares.waiting <= count
        assert len(cast(Any, world.spares)._failed) <= 8
    closed = close(world)
    for _ in range(2):
        for child in world.children:
            if child.pid is not None:
                child.exits()
    assert closed == [None]
    assert world.is_still()
    assert cast(Any, world.spares)._spares == []
    assert len(set(world.buried)) == len(world.buried)

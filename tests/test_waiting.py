"""How many wait, in which order, how long, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.waiting import LONGEST_ADVICE, Line, WaitingRoom, counted
from tests.support import result_of


class World:
    """Two lines that share a room."""

    def __init__(self, length: int = 3) -> None:
        self.clock = Clock()
        self.room = WaitingRoom(length, 30.0)
        self.one: Line[str] = Line(self.clock, self.room)
        self.other: Line[str] = Line(self.clock, self.room)

    def is_empty(self) -> bool:
        return (
            len(self.one) == len(self.other) == self.room.waiting == 0
            and not self.clock.getDelayedCalls()
        )


def gave_up(ahead: int) -> ProxyError:
    return ProxyError(Failure.SERVER_BUSY, f"{ahead} ahead")


def test_all_lines_fill_one_room() -> None:
    world = World()
    world.one.join(30, gave_up)
    world.other.join(30, gave_up)
    assert not world.room.is_full
    leaving = world.other.join(30, gave_up)
    assert (world.room.waiting, world.room.is_full) == (3, True)
    leaving.addErrback(lambda _: None)
    leaving.cancel()
    assert (world.room.waiting, world.room.is_full) == (2, False)


def test_a_room_for_nobody_is_always_full() -> None:
    assert WaitingRoom(0, 30).is_full


def test_the_first_to_come_is_the_first_to_be_served() -> None:
    world = World()
    first, second = world.one.join(30, gave_up), world.one.join(30, gave_up)
    assert world.one.serve(lambda: "bread")
    assert result_of(first) == "bread"
    assert not second.called
    assert world.one.serve(lambda: "cake")
    assert result_of(second) == "cake"
    assert world.is_empty()


def test_for_nobody_nothing_is_made() -> None:
    def bake() -> str:
        raise AssertionError

    assert not World().one.serve(bake)


def test_who_gives_up_learns_how_many_were_ahead() -> None:
    world = World()
    world.one.join(10, gave_up)
    leaving = world.one.join(10, gave_up)
    impatient = world.one.join(5, gave_up)
    leaving.addErrback(lambda _: None)
    leaving.cancel()
    world.clock.advance(5)
    with pytest.raises(ProxyError, match="1 ahead"):
        result_of(impatient)
    assert len(world.one) == world.room.waiting == 1


@pytest.mark.parametrize("patience", [0.0, -3.0])
def test_without_patience_one_waits_to_the_next_turn_of_the_reactor(patience: float) -> None:
    world = World()
    served, impatient = world.one.join(patience, gave_up), world.one.join(patience, gave_up)
    world.one.serve(lambda: "bread")
    world.clock.advance(0)
    assert result_of(served) == "bread"
    with pytest.raises(ProxyError):
        result_of(impatient)
    assert world.is_empty()


ENDINGS = ["serve", "cancel", "timeout"]


@pytest.mark.parametrize("later", ENDINGS)
@pytest.mark.parametrize("first", ENDINGS)
def test_whatever_ends_a_wait_first_counts_and_the_rest_changes_nothing(
    first: str, later: str
) -> None:
    world = World()
    waiting = world.one.join(30, gave_up)
    ended: list[object] = []
    waiting.addBoth(ended.append)
    happen = {
        "serve": lambda: world.one.serve(lambda: "bread"),
        "cancel": waiting.cancel,
        "timeout": lambda: world.clock.advance(30),
    }
    happen[first]()
    assert world.is_empty()
    happen[later]()
    assert world.is_empty()
    assert len(ended) == 1
    kinds = {"serve": str, "cancel": CancelledError, "timeout": ProxyError}
    assert isinstance(getattr(ended[0], "value", ended[0]), kinds[first])


def test_who_is_served_may_join_again_at_once() -> None:
    world = World(length=1)
    again: list[Deferred[str]] = []
    world.one.join(30, gave_up).addCallback(lambda _: again.append(world.one.join(30, gave_up)))
    world.one.serve(lambda: "bread")
    assert len(again) == len(world.one) == world.room.waiting == 1
    world.one.serve(lambda: "cake")
    assert result_of(again[0]) == "cake"
    assert world.is_empty()


# When to come back.


def test_before_a_turn_has_ended_the_advice_is_the_patience() -> None:
    assert WaitingRoom(1, 12.3).advice(5) == 13


@pytest.mark.parametrize(
    ("ahead", "side_by_side", "seconds"),
    [(1, 1, 10), (3, 1, 30), (3, 2, 15), (1, 16, 1), (0, 1, 1)],
)
def test_the_advice_follows_from_the_turns_ahead_and_what_turns_take(
    ahead: int, side_by_side: int, seconds: int
) -> None:
    room = WaitingRoom(1, 30)
    room.took(5)
    room.took(15)
    assert room.advice(ahead, side_by_side) == seconds


def test_turns_of_long_ago_do_not_count() -> None:
    room = WaitingRoom(1, 30)
    room.took(1000)
    for _ in range(32):
        room.took(2)
    assert room.advice(1) == 2


@given(
    patience=st.floats(0, 3_000_000),
    took=st.lists(st.floats(0, 100_000), max_size=5),
    ahead=st.integers(0, 10_000),
    side_by_side=st.integers(1, 10_000),
)
def test_the_advice_is_never_too_short_or_too_long(
    patience: float, took: list[float], ahead: int, side_by_side: int
) -> None:
    room = WaitingRoom(1, patience)
    for seconds in took:
        room.took(seconds)
    assert 1 <= room.advice(ahead, side_by_side) <= LONGEST_ADVICE


@pytest.mark.parametrize(("number", "words"), [(0, "0 turns"), (1, "1 turn"), (2, "2 turns")])
def test_words_are_counted_as_people_do(number: int, words: str) -> None:
    assert counted(number, "turn") == words

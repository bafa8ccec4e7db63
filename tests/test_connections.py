"""How many connections there may be, and which of them makes room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.web.connections import (
    OVERFLOW,
    OWN_DESCRIPTORS,
    Connections,
    Stage,
    connections_that_fit,
)


class Place:
    """A connection that notes whether it was told to go."""

    def __init__(self, connections: Connections, stage: Stage | None = Stage.NEW) -> None:
        self.told = 0
        connections.add(self)
        if stage is not Stage.NEW:
            connections.move(self, stage)

    def give_way(self) -> None:
        self.told += 1


def told(*places: Place) -> list[bool]:
    assert all(place.told < 2 for place in places)
    return [bool(place.told) for place in places]


def test_below_the_limit_nobody_has_to_go() -> None:
    connections = Connections(2)
    place = Place(connections)
    assert connections.make_room()
    assert told(place) == [False]


def test_the_one_that_has_waited_longest_goes() -> None:
    connections = Connections(3)
    places = [Place(connections) for _ in range(3)]
    assert connections.make_room()
    assert told(*places) == [True, False, False]
    Place(connections)
    assert connections.make_room()
    assert told(*places) == [True, True, False]


def test_strangers_go_first_then_those_at_rest_then_those_that_send() -> None:
    connections = Connections(4)
    sending = Place(connections, Stage.SENDING)
    resting = Place(connections, Stage.RESTING)
    busy = Place(connections, None)
    new = Place(connections)
    for expected in ([False, False, True], [False, True, True], [True, True, True]):
        assert connections.make_room()
        assert told(sending, resting, new) == expected
        Place(connections, None)
    assert told(busy) == [False]


def test_where_all_are_busy_a_newcomer_is_refused() -> None:
    connections = Connections(2)
    places = [Place(connections, None) for _ in range(2)]
    assert not connections.make_room()
    assert told(*places) == [False, False]
    connections.remove(places[0])
    assert connections.make_room()


def test_a_connection_at_rest_counts_from_its_last_answer() -> None:
    connections = Connections(2)
    first, second = (Place(connections, Stage.RESTING) for _ in range(2))
    connections.move(first, None)
    connections.move(first, Stage.RESTING)
    assert connections.make_room()
    assert told(first, second) == [False, True]


def test_who_was_told_to_go_cannot_take_it_back() -> None:
    connections = Connections(1)
    place = Place(connections)
    assert connections.make_room()
    connections.move(place, Stage.RESTING)
    other = Place(connections, None)
    assert not connections.make_room()
    connections.remove(place)
    connections.remove(place)
    assert len(connections) == 1
    assert told(place, other) == [True, False]


def test_those_that_do_not_go_are_not_replaced_for_ever() -> None:
    connections = Connections(10)
    places = [Place(connections) for _ in range(10)]
    while connections.make_room():
        places.append(Place(connections))
    assert len(connections) == 10 + OVERFLOW


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([*Stage, None, "gone"]))))
def test_whatever_happens_the_counts_are_right(moves: list[tuple[int, Stage | str | None]]) -> None:
    connections = Connections(4)
    places: dict[int, Place] = {}
    for number, stage in moves:
        if number not in places:
            if connections.make_room():
                places[number] = Place(connections)
        elif isinstance(stage, str):
            connections.remove(places.pop(number))
        else:
            connections.move(places[number], stage)
        assert len(connections) == len(places)
        staying = [place for place in places.values() if not place.told]
        assert len(staying) <= 4


@pytest.mark.parametrize(
    ("wanted", "processes", "descriptors", "expected"),
    [
        (512, 21, 1024, (512, OVERFLOW)),
        (512, 21, -1, (512, OVERFLOW)),
        (10_000, 21, 4096, (4096 - OWN_DESCRIPTORS - 84 - OVERFLOW, OVERFLOW)),
        (512, 100, 1024, (512 - 138, 186)),
        (512, 10_000, 1024, (11, 5)),
        (3, 10_000, 1024, (3, 13)),
    ],
)
def test_there_is_room_for_the_pipes_of_children(
    wanted: int, processes: int, descriptors: int, expected: tuple[int, int]
) -> None:
    assert connections_that_fit(wanted, processes, descriptors) == expected

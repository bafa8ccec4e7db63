"""How much the bodies of requests may take together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.web.bodies import SMALL_BODY, Bodies

LIMIT = 10 * SMALL_BODY


def test_small_bodies_are_never_counted() -> None:
    bodies = Bodies(LIMIT)
    assert bodies.grow(0, LIMIT)
    assert all(bodies.has_room(SMALL_BODY) and bodies.grow(0, SMALL_BODY) for _ in range(100))
    assert bodies.held == LIMIT


def test_together_they_fill_the_limit_and_not_more() -> None:
    bodies = Bodies(LIMIT)
    assert bodies.has_room(LIMIT)
    assert bodies.grow(0, LIMIT - SMALL_BODY - 1)
    assert bodies.grow(0, SMALL_BODY + 1)
    assert not bodies.has_room(SMALL_BODY + 1)
    assert not bodies.grow(SMALL_BODY + 1, SMALL_BODY + 2)
    assert bodies.held == LIMIT
    bodies.release(SMALL_BODY + 1)
    assert bodies.has_room(SMALL_BODY + 1)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4 * SMALL_BODY) | st.none()), max_size=60)
)
def test_what_is_held_is_the_sum_of_what_has_come(
    steps: list[tuple[int, int | None]],
) -> None:
    bodies = Bodies(LIMIT)
    counted: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for number, more in steps:
        if more is None:
            bodies.release(counted.pop(number, 0))
            sizes.pop(number, None)
        else:
            sizes[number] = sizes.get(number, 0) + more
            if bodies.grow(counted.get(number, 0), sizes[number]):
                counted[number] = sizes[number] if sizes[number] > SMALL_BODY else 0
            else:
                bodies.release(counted.pop(number, 0))
                del sizes[number]
        assert bodies.held == sum(counted.values()) <= LIMIT

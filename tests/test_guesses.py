"""Wrong keys: how long each has to wait, and for whom it counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.web.guesses import ADDRESSES, FORGIVEN, LONGEST, Guesses, neighbourhood


def waits(guesses: Guesses, times: int, address: str = "192.0.2.1", now: float = 0) -> list[float]:
    return [guesses.note(address, now) for _ in range(times)]


def test_the_first_are_answered_at_once_and_then_each_waits_longer() -> None:
    expected = [0, 0, 0, 0, 0, 0.25, 0.5, 1, 2, 4, 8, 8, 8]
    assert waits(Guesses(), len(expected)) == expected


def test_who_stops_guessing_is_forgiven_in_little_more_than_two_minutes() -> None:
    guesses = Guesses()
    waits(guesses, 1000)
    assert waits(guesses, 1, now=60) == [pytest.approx(0.5)]
    assert waits(guesses, FORGIVEN, now=200) == [0] * FORGIVEN


def test_whoever_mistypes_a_key_now_and_then_never_waits() -> None:
    guesses = Guesses()
    assert [guesses.note("192.0.2.1", 15.0 * number) for number in range(100)] == [0] * 100


def test_every_address_counts_for_itself() -> None:
    guesses = Guesses()
    waits(guesses, 100)
    assert waits(guesses, 1, "192.0.2.2") == [0]
    assert waits(guesses, 1, "2001:db8::1") == [0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("unix", "unix", True),
        ("unix", "192.0.2.1", False),
    ],
)
def test_what_one_customer_has_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (neighbourhood(one) == neighbourhood(other)) is same


def test_only_so_many_addresses_are_remembered() -> None:
    guesses = Guesses()
    waits(guesses, 100, "198.51.100.1")
    for number in range(ADDRESSES - 1):
        guesses.note(f"10.0.{number >> 8}.{number & 255}", 0)
    assert waits(guesses, 1, "198.51.100.1") == [LONGEST]
    for number in range(ADDRESSES):
        guesses.note(f"10.1.{number >> 8}.{number & 255}", 0)
    assert len(guesses) == ADDRESSES
    assert waits(guesses, 1, "198.51.100.1") == [0]


@given(st.lists(st.tuples(st.text(max_size=20), st.floats(0, 1e9)), max_size=50))
def test_no_address_and_no_time_is_too_strange(noted: list[tuple[str, float]]) -> None:
    guesses = Guesses()
    now = 0.0
    for address, later in noted:
        now += later
        assert 0 <= guesses.note(address, now) <= LONGEST

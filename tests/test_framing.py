"""Lines, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.framing import LineFramer, LineTooLongError

PIECES = st.lists(
    st.binary(max_size=12)
    | st.sampled_from([b"\n", b"\n\n", b"\r\n", b"a\nb", b"\xc2", b"\x85", "\u2028".encode()]),
    max_size=30,
)


def fed(framer: LineFramer, pieces: list[bytes]) -> list[bytes]:
    """Feed all pieces; return the lines, in order."""
    return [line for piece in pieces for line in framer.feed(piece)]


@given(PIECES)
def test_bytes_cut_anywhere_give_the_lines_of_the_whole(pieces: list[bytes]) -> None:
    framer = LineFramer(10_000)
    lines = fed(framer, pieces)
    assert [*lines, framer.finish()] == b"".join(pieces).split(b"\n")


@given(PIECES, st.integers(min_value=0, max_value=20))
def test_a_line_is_refused_exactly_if_it_is_longer_than_the_limit(
    pieces: list[bytes], limit: int
) -> None:
    lines = b"".join(pieces).split(b"\n")
    framer = LineFramer(limit)
    if max(map(len, lines)) > limit:
        with pytest.raises(LineTooLongError):
            fed(framer, pieces)
    else:
        assert [*fed(framer, pieces), framer.finish()] == lines


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([b"0123456789\n"], [b"0123456789"]),
        ([b"0123456789"], []),
        ([b"01234", b"56789\n"], [b"0123456789"]),
        ([b"01234", b"56789", b"\n"], [b"0123456789"]),
        ([b"0123456", b"789\nabcdefghij\nok"], [b"0123456789", b"abcdefghij"]),
        ([b"ab\n" * 9], [b"ab"] * 9),
    ],
)
def test_lines_up_to_the_limit_pass(pieces: list[bytes], lines: list[bytes]) -> None:
    assert fed(LineFramer(10), pieces) == lines


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"0123456789x\n"], id="complete"),
        pytest.param([b"0123456789x"], id="unfinished"),
        pytest.param([b"01234", b"56789x\n"], id="complete, in two pieces"),
        pytest.param([b"01234", b"56789x"], id="unfinished, in two pieces"),
        pytest.param([b"0123456789", b"x\n"], id="by its last byte"),
        pytest.param([b"ok\n0123456789x\nok\n"], id="between others"),
        pytest.param([b"ok\nok\n0123456789x"], id="unfinished, after others"),
    ],
)
def test_one_byte_over_the_limit_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(LineTooLongError):
        fed(LineFramer(10), pieces)


def test_the_limit_is_that_of_one_line_and_not_of_all() -> None:
    framer = LineFramer(10)
    for _ in range(100):
        assert fed(framer, [b"01234", b"56789\n012"]) == [b"0123456789"]
        assert fed(framer, [b"3456789", b"\n"]) == [b"0123456789"]


def test_only_a_newline_ends_a_line() -> None:
    text = "a\u0085b\u2028c\x0bd\x0ce\r".encode()
    assert LineFramer(100).feed(text + b"\n") == [text]


def test_a_long_line_is_joined_once_and_not_at_every_piece() -> None:
    piece = b"x" * 8192
    framer = LineFramer(1024 * len(piece))
    for _ in range(1024):
        assert framer.feed(piece) == []
    # Nothing was joined or copied so far: each piece is kept as it came.
    assert [id(kept) for kept in framer._pieces] == [id(piece)] * 1024
    assert framer.feed(b"\n") == [piece * 1024]
    assert framer._pieces == []


def test_what_came_after_the_last_newline_is_handed_out_once() -> None:
    framer = LineFramer(10)
    assert framer.feed(b"one\ntw") == [b"one"]
    assert framer.feed(b"o") == []
    assert framer.finish() == b"two"
    assert framer.finish() == b""
    assert framer.feed(b"01234567") == []
    assert framer.feed(b"89\n") == [b"0123456789"]

"""Lines of the CLI, decoded as far as needed and kept as they came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.events import Event, parse_event, salvage_event

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Pairs of surrogates cannot be told from the characters that they stand for.
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
KNOWN = ("type", "subtype", "session_id", "uuid", "isReplay", "parent_tool_use_id", "(line)")
OBJECTS = st.dictionaries(st.sampled_from(KNOWN) | st.text(), JSON, max_size=8)
SURROGATES = st.text(st.sampled_from('a\\"é😀\ud83d\ude00\udfff'), max_size=20)

DEEP = b'{"type":"result","deep":' + b"[" * 50_000 + b"]" * 50_000 + b"}"


def parsed(line: bytes) -> Event:
    event = parse_event(line)
    assert event is not None
    assert event.line == line
    return event


def mended(text: str) -> str:
    """The text with the replacement character for every half of a surrogate pair."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def test_the_fields_that_the_server_acts_on_are_decoded() -> None:
    event = parsed(
        b'{"uuid":"u","type":"user","session_id":"s","subtype":"x","isReplay":true,'
        b'"parent_tool_use_id":"toolu_1","message":{"role":"user"}}'
    )
    assert (event.type, event.subtype, event.session_id, event.uuid) == ("user", "x", "s", "u")
    assert event.is_replay is True
    assert event.parent_tool_use_id == "toolu_1"
    assert event.fields()["message"] == {"role": "user"}


def test_absent_fields_have_their_defaults() -> None:
    event = parsed(b"{}")
    assert event == Event(line=b"{}")
    assert (event.type, event.subtype, event.session_id, event.uuid) == ("", None, None, None)
    assert (event.is_replay, event.parent_tool_use_id) == (False, None)


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"keep_alive","news":[1,2.50,1e3,null],"x":{"y":"\\u00e9\\/"}}',
        b' \t{ "duration_ms" : 1 , "type" : "result" }\r',
        '{"type":"assistant","text":"a\u0085b\u2028größe😀"}'.encode(),
        b'{"type":"future/kind","subtype":"unheard_of","n":123456789012345678901234567890}',
    ],
)
def test_unknown_types_and_fields_pass_byte_for_byte(line: bytes) -> None:
    assert parsed(line).fields() == json.loads(line)


@given(OBJECTS, st.booleans())
def test_every_object_is_an_event_and_keeps_what_fits(
    fields: dict[str, Any], escaped: bool
) -> None:
    event = parsed(json.dumps(fields, ensure_ascii=escaped).encode())
    assert event.fields() == fields

    def text(key: str) -> str | None:
        value = fields.get(key)
        return value if isinstance(value, str) else None

    assert event.type == (text("type") or "")
    assert event.subtype == text("subtype")
    assert event.session_id == text("session_id")
    assert event.uuid == text("uuid")
    assert event.parent_tool_use_id == text("parent_tool_use_id")
    assert event.is_replay is (fields.get("isReplay") is True)


@pytest.mark.parametrize("odd", [None, 1, True, 1.5, [], {}, ["system"]])
@pytest.mark.parametrize("key", ["type", "subtype", "session_id", "uuid", "parent_tool_use_id"])
def test_a_field_of_an_odd_type_does_not_spoil_the_others(key: str, odd: object) -> None:
    usual = {name: f"the {name}" for name in KNOWN if name not in {"isReplay", "(line)"}}
    event = parsed(json.dumps(usual | {key: odd, "isReplay": True}).encode())
    expected: dict[str, str | None] = {**usual, key: None}
    assert event.type == (expected["type"] or "")
    assert event.subtype == expected["subtype"]
    assert event.session_id == expected["session_id"]
    assert event.uuid == expected["uuid"]
    assert event.parent_tool_use_id == expected["parent_tool_use_id"]
    assert event.is_replay


@pytest.mark.parametrize("odd", ["true", 1, None, {}])
def test_only_true_makes_a_replay(odd: object) -> None:
    assert not parsed(json.dumps({"type": "user", "isReplay": odd}).encode()).is_replay


def test_the_last_of_duplicate_keys_counts() -> None:
    event = parsed(b'{"type":"user","type":"result","x":1,"x":2}')
    assert event.type == "result"
    assert event.fields() == {"type": "result", "x": 2}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"Warning: something",
        b"{",
        b'{"type":"result"',
        b'{"type":"result"} x',
        b'{"type":"result"}{"type":"result"}',
        b'{"type":"result","x":NaN}',
        b'{"type":"result","x":-Infinity}',
        b'{"type":1,"x":NaN}',
        b'{"type":"result","x":"\x01"}',
        b'{"type":"result",}',
        b'\xef\xbb\xbf{"type":"result"}',
        b"\xff\xfe",
        b"\x00",
        DEEP,
        b"[" * 50_000,
    ],
)
def test_what_is_no_json_object_is_no_event(line: bytes) -> None:
    assert parse_event(line) is None


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda data: b'{"type":"' + data))
def test_no_bytes_make_it_fail(line: bytes) -> None:
    event = parse_event(line)
    if event is not None:
        assert event.line == line
        assert isinstance(event.fields(), dict)


@given(SURROGATES, SURROGATES)
def test_half_a_surrogate_pair_does_not_lose_the_event(text: str, name: str) -> None:
    # The CLI cuts long texts between two UTF-16 units, and so through an emoji.
    line = json.dumps({"type": "user", "session_id": name, "text": text}).encode()
    event = parsed(line)
    assert event.type == "user"
    assert event.session_id == mended(name)
    assert event.fields() == {"type": "user", "session_id": mended(name), "text": mended(text)}


@pytest.mark.parametrize(
    ("escapes", "text"),
    [
        (rb"\ud83d", "\ufffd"),
        (rb"\uD83D!", "\ufffd!"),
        (rb"\ude00", "\ufffd"),
        (rb"\ud83d\ude00", "😀"),
        (rb"\ud83d\ud83d\ude00", "\ufffd😀"),
        (rb"\ude00\ud83d", "\ufffd\ufffd"),
        (rb"\\ud83d", r"\ud83d"),
        (rb"\\\ud83d", "\\\ufffd"),
        (rb"\ud83d\n", "\ufffd\n"),
        (rb"\ud83d\u00e9", "\ufffdé"),
    ],
)
def test_only_halves_of_surrogate_pairs_are_replaced(escapes: bytes, text: str) -> None:
    assert parsed(b'{"broken":"\\ud83d","x":"' + escapes + b'"}').fields()["x"] == text


def test_bytes_that_are_no_utf_8_do_not_spoil_the_other_fields() -> None:
    event = parsed(b'{"type":"result","subtype":"success","result":"a\xffb\xed\xa0\x80"}')
    assert event.type == "result"
    fields = event.fields()
    assert fields["subtype"] == "success"
    assert fields["result"].startswith("a\ufffdb\ufffd")


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 5000])
def test_numbers_that_nothing_can_hold_leave_no_fields(number: bytes) -> None:
    event = parsed(b'{"type":"result","n":' + number + b"}")
    assert event.type == "result"
    assert event.fields() == {}


def test_a_key_named_like_our_own_attribute_changes_nothing() -> None:
    event = parsed(b'{"type":"x","(line)":"AAAA","line":"BBBB","is_replay":true}')
    assert not event.is_replay


def test_what_people_wrote_is_not_in_the_repr() -> None:
    event = parsed(b'{"type":"user","subtype":"x","message":"my secret","uuid":"u"}')
    assert repr(event) == "<Event user/x of 62 bytes>"
    assert "secret" not in f"{event} {[event]} {event!r}"


RESULT = b'{"type":"result","subtype":"success","session_id":"s"}'


@pytest.mark.parametrize("before", [b"warning: ", b"\xff\xfe ", b"[] ", b"} "])
def test_an_event_behind_words_without_a_newline_is_saved(before: bytes) -> None:
    assert parse_event(before + RESULT) is None
    event = salvage_event(before + RESULT)
    assert event is not None
    assert event.type == "result"
    assert event.line == RESULT


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"words",
        b"words { more }",
        b'words {"type":"result"}',
        b'words {"session_id":"s"}',
        b'words {"type":"result","session_id":"s"} and more',
        b'words {"type":"res',
    ],
)
def test_words_alone_are_no_event(line: bytes) -> None:
    assert salvage_event(line) is None

"""One event, one record, whatever the event holds."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import signal
import sys
import syslog
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.protocol import Factory
from twisted.logger import (
    ILogObserver,
    LegacyLogObserverWrapper,
    Logger,
    LogLevel,
    LogPublisher,
    globalLogPublisher,
)
from twisted.python import log as legacy
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

import claude_proxy
from claude_proxy.web.logline import level_of
from claude_proxy.web.logs import make_observer, mask_key, open_log_file

NOON = 1_795_348_800.0456  # 2026-11-22 12:00:00 UTC
SECRET = 'sk-ant-"quoted"\\back\nslash-é'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def records(emit: Callable[[Logger], object], **options: Any) -> list[dict[str, Any]]:
    """What is written in production for what a logger is told."""
    file = io.StringIO()
    observer = make_observer(file, production=True, level="debug", **options)
    emit(Logger(namespace="claude_proxy.cli", observer=observer))
    return parsed(file)


def parsed(file: io.StringIO) -> list[dict[str, Any]]:
    text = file.getvalue()
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def record(event: dict[Any, Any], **options: Any) -> dict[str, Any]:
    """What is written in production for one raw event."""
    file = io.StringIO()
    make_observer(file, production=True, level="debug", **options)(event)
    (only,) = parsed(file)
    return only


def readable(event: dict[Any, Any], file: io.StringIO | None = None, **options: Any) -> str:
    """What is written in development for one raw event."""
    file = file or io.StringIO()
    make_observer(file, production=False, level="debug", **options)(event)
    return file.getvalue()


def raised(error: BaseException) -> Failure:
    try:
        raise error  # noqa: TRY301  # a failure wants a traceback
    except BaseException:  # noqa: BLE001  # some of the tests are about any of them
        return Failure()


class Hostile:
    """Raises whenever it is looked at."""

    def _refuse(self, *_: object) -> Any:
        raise ValueError("do not touch me")

    __repr__ = __str__ = __bool__ = __format__ = __eq__ = _refuse
    __hash__ = None  # type: ignore[assignment]


# The record.


def test_a_record_has_its_head_its_message_and_its_fields() -> None:
    event = {
        "log_namespace": "claude_proxy.cli",
        "log_level": LogLevel.info,
        "log_time": NOON,
        "log_format": "turn ended: {outcome} after {duration_ms} ms",
        "log_source": object(),
        "type": "turn_end",
        "request_id": "r1",
        "pid": 17,
        "outcome": "success",
        "duration_ms": 12.5,
        "session_id": None,
        "first": True,
        "tokens": {"in": 1, "out": [2, 3]},
    }
    assert list(record(event).items()) == [
        ("time", "2026-11-22T12:00:00.045Z"),
        ("level", "info"),
        ("component", "cli"),
        ("type", "turn_end"),
        ("message", "turn ended: success after 12.5 ms"),
        ("request_id", "r1"),
        ("pid", 17),
        ("outcome", "success"),
        ("duration_ms", 12.5),
        ("session_id", None),
        ("first", True),
        ("tokens", {"in": 1, "out": [2, 3]}),
    ]


@pytest.mark.parametrize("name", ["debug", "info", "warn", "error"])
def test_levels_keep_their_names(name: str) -> None:
    (only,) = records(lambda log: getattr(log, name)("hello"))
    assert only["level"] == name
    assert only["type"] == "log"


def test_critical_is_an_error() -> None:
    (only,) = records(lambda log: log.critical("hello"))
    assert only["level"] == "error"


@pytest.mark.parametrize(
    ("namespace", "component"),
    [
        ("claude_proxy.cli", "cli"),
        ("claude_proxy.sessions.executor.Executor", "sessions"),
        ("claude_proxy", "claude_proxy"),
        ("twisted.web.http", "twisted.web.http"),
        ("", "-"),
        (None, "-"),
        (17, "17"),
    ],
)
def test_the_component_is_the_namespace_within_the_project(
    namespace: object, component: str
) -> None:
    assert record({"log_namespace": namespace})["component"] == component


@pytest.mark.parametrize("when", [None, "noon", float("nan"), float("inf"), 1e300, -1e300, []])
def test_a_time_that_is_none_is_now(when: object) -> None:
    before = time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
    written = record({"log_time": when})["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", written)
    assert written >= before


def test_fields_do_not_replace_the_head() -> None:
    only = record({"log_format": "hello", "level": "fatal", "component": "x", "level_": 1})
    assert (only["level"], only["component"]) == ("info", "-")
    assert (only["level_"], only["component_"], only["level__"]) == ("fatal", "x", 1)


@pytest.mark.parametrize("kind", [None, "", 17, Hostile()])
def test_a_type_that_is_no_word_is_log(kind: object) -> None:
    only = record({"type": kind, "log_format": "hello"})
    assert only["level"] in {"info", "error"}
    assert only["type"] == "log"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("line\nbreak\r\x00\x1b\u2028", "line\nbreak\r\x00\x1b\u2028"),
        ("lone \ud800 surrogate", "lone \\ud800 surrogate"),
        ("größe 😀", "größe 😀"),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (bytearray(b"abc"), "abc"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (2**64 - 1, 2**64 - 1),
        (2**64, hex(2**64)),
        (signal.SIGTERM, 15),
        ((1, (2,)), [1, [2]]),
        ({1: {None: "x"}}, {"1": {"None": "x"}}),
        ({1, 2}, "{1, 2}"),
        (1j, "1j"),
    ],
)
def test_values_become_json(value: object, written: object) -> None:
    assert record({"log_format": "", "field": value})["field"] == written


class Disguised(str):
    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        raise ValueError("do not touch me")

    isascii = __len__ = encode  # type: ignore[assignment]


def test_a_kind_of_string_is_only_a_string() -> None:
    assert record({"log_format": "hello", "field": Disguised("xé")})["field"] == "xé"


def test_an_endless_number_is_cut() -> None:
    assert record({"field": 10**5000})["field"].startswith(hex(10**5000)[:100])


def test_keys_that_are_no_text_are_written_as_text() -> None:
    only = record({"log_format": "", 1: "a", "1": "b", None: "c", ("x", 2): "d", "\ud800": "e"})
    assert (only["1"], only["1_"], only["None"], only["('x', 2)"]) == ("a", "b", "c", "d")
    assert only["\\ud800"] == "e"


def test_long_strings_are_cut_and_say_so() -> None:
    only = record({"log_format": "{text}", "text": "x" * 10_000, "inner": ["y" * 10_000]})
    assert only["text"] == only["message"] == "x" * 8192 + "...[1808 characters left out]"
    assert only["inner"] == ["y" * 8192 + "...[1808 characters left out]"]


@pytest.mark.parametrize(
    "value",
    [
        ["x" * 8000] * 1000,
        [[[[["x" * 100] * 50] * 50] * 50] * 50] * 50,
        {str(number): "x" * 100 for number in range(10_000)},
        list(range(1_000_000)),
        [[]] * 1_000_000,
    ],
)
def test_no_record_is_endless(value: object) -> None:
    file = io.StringIO()
    make_observer(file, production=True, level="debug")({"log_format": "x", "field": value})
    assert len(file.getvalue()) < 150_000
    assert "left out" in file.getvalue()
    assert parsed(file)


def test_too_many_fields_are_left_out() -> None:
    only = record({str(number): "x" * 100 for number in range(10_000)})
    assert len(only) < 1000
    assert "...[left out]" in only.values()


def test_a_structure_within_itself_ends() -> None:
    knot: list[object] = ["x"]
    knot.append(knot)
    loop: dict[str, object] = {}
    loop["loop"] = loop
    only = record({"log_format": "", "knot": knot, "loop": loop})
    assert "[...]" in json.dumps(only["knot"])
    assert "{...}" in json.dumps(only["loop"])


def test_what_raises_when_looked_at_is_still_recorded() -> None:
    (only,) = records(lambda log: log.info("hello {field}", field=Hostile(), pid=17))
    assert only["message"] == "(not formattable) hello {field}"
    assert only["pid"] == 17
    assert "Hostile" in only["field"]


@pytest.mark.parametrize("template", ["{missing}", "{", "{0}", "{pid:x^y}", "{pid.nothing}"])
def test_a_template_that_does_not_fit_is_shown_as_it_is(template: str) -> None:
    (only,) = records(lambda log: log.info(template, pid=17, prompt="tell nobody"))
    assert only["message"] == f"(not formattable) {template}"


def test_an_event_that_cannot_be_read_at_all_leaves_a_record() -> None:
    only = record({"isError": Hostile(), "log_format": "hello"})
    assert only["level"] == "error"
    assert only["message"] == "An event could not be logged: ValueError."


# Failures and the old way of logging.


def test_a_failure_has_its_error_and_its_traceback() -> None:
    def emit(log: Logger) -> None:
        log.failure("while {doing}", raised(KeyError("no such thing")), doing="that", error="own")

    (only,) = records(emit)
    assert only["level"] == "error"
    assert only["message"] == "while that"
    assert only["error"] == "KeyError: 'no such thing'"
    assert only["error_"] == "own"
    assert "in raised" in only["traceback"]
    assert list(only)[-1] == "traceback"


def test_an_error_of_a_library_is_named_in_full() -> None:
    (only,) = records(lambda log: log.failure("x", raised(json.JSONDecodeError("bad", "", 0))))
    assert only["error"] == "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)"
    (only,) = records(lambda log: log.failure("x", raised(ValueError())))
    assert only["error"] == "ValueError"


def test_a_failure_without_a_message_has_its_error_for_one() -> None:
    (only,) = records(lambda log: log.failure("", raised(ValueError("bad"))))
    assert only["message"] == only["error"] == "ValueError: bad"


def test_an_exception_that_cannot_be_shown_is_still_an_error() -> None:
    class Vile(Exception):  # noqa: N818  # it is one
        def __str__(self) -> str:
            raise RuntimeError

    (only,) = records(lambda log: log.failure("hello", raised(Vile())))
    assert only["message"] == "hello"
    assert "Vile" in only["error"]


def test_of_a_long_traceback_the_end_is_kept() -> None:
    def deep(level: int) -> None:
        if level == 0:
            raise ValueError("at the bottom")
        deep(level - 1)

    try:
        deep(300)
    except ValueError:
        failure = Failure()
    (only,) = records(lambda log: log.failure("x", failure))
    assert only["traceback"].startswith("...[")
    assert only["traceback"].rstrip().endswith("ValueError: at the bottom")
    assert len(only["traceback"]) < 9000


@pytest.fixture
def old_style() -> tuple[Any, io.StringIO]:
    """A publisher of the old logging whose events end in a file."""
    file = io.StringIO()
    publisher = LogPublisher(make_observer(file, production=True, level="debug"))
    return legacy.LogPublisher(publisher, publisher), file


def test_old_text_messages(old_style: tuple[Any, io.StringIO]) -> None:
    publisher, file = old_style
    publisher.msg("hello", "old world", system="HTTP,1", pid=17)
    publisher.msg(format="%(a)s and %(b)s", a=1, b=2)
    first, second = parsed(file)
    del first["time"], second["time"]
    assert first == {
        "level": "info",
        "component": "log_legacy",
        "type": "log",
        "message": "hello old world",
        "pid": 17,
    }
    assert (second["message"], second["a"]) == ("1 and 2", 1)


def test_old_errors(old_style: tuple[Any, io.StringIO]) -> None:
    publisher, file = old_style
    failure = raised(ValueError("bad"))
    publisher.msg(failure=failure, why="While asking", isError=1)
    publisher.msg(failure=failure, why=None, isError=1)
    first, second = parsed(file)
    assert (first["level"], first["message"]) == ("error", "While asking")
    assert (first["error"], second["message"]) == ("ValueError: bad", "Unhandled Error")
    assert "in raised" in second["traceback"]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"message": ("a", 1), "isError": 0}, "a 1"),
        ({"format": "%(x)s", "x": 3}, "3"),
        ({}, ""),
    ],
)
def test_old_events_that_nobody_translated(event: dict[str, object], message: str) -> None:
    assert record(event)["message"] == message


def test_an_event_that_an_old_observer_saw_before_keeps_its_message() -> None:
    file = io.StringIO()
    seen: list[object] = []
    publisher = LogPublisher(
        LegacyLogObserverWrapper(cast(Any, seen.append)),
        make_observer(file, production=True, level="debug"),
    )
    Logger(namespace="claude_proxy.cli", observer=publisher).error("hello {x}", x=1)
    (only,) = parsed(file)
    del only["time"]
    assert seen
    assert only == {
        "level": "error",
        "component": "cli",
        "type": "log",
        "message": "hello 1",
        "x": 1,
    }


# Levels and noise.


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["debug", "info", "warn", "error", "error"]),
        ("info", ["info", "warn", "error", "error"]),
        ("warn", ["warn", "error", "error"]),
        ("error", ["error", "error"]),
    ],
)
def test_what_is_below_the_level_is_left_out(level: str, written: list[str]) -> None:
    file = io.StringIO()
    log = Logger(observer=make_observer(file, production=True, level=level))
    for name in ("debug", "info", "warn", "error", "critical"):
        getattr(log, name)("hello")
    assert [only["level"] for only in parsed(file)] == written


@pytest.mark.parametrize("level", ["", "INFO", "warning", "critical"])
def test_an_unknown_level_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match="tuple"):
        make_observer(io.StringIO(), production=True, level=level)


HTTP = "twisted.web.http.HTTPChannel"
APP = "twisted.scripts._twistd_unix.UnixAppLogger"


@pytest.mark.parametrize(
    ("namespace", "template", "level"),
    [
        ("twisted.web.server.Site", "Starting factory {factory!r}", "debug"),
        ("claude_proxy.web.site.Site", "Stopping factory {factory!r}", "debug"),
        (HTTP, "Timing out client: {peer}", "debug"),
        ("twisted.python.log", "{log_io}", "debug"),
        ("twisted.internet.protocol", "anything", "debug"),
        ("twisted.internet.base", "Received SIGTERM, shutting down.", "info"),
        ("twisted.internet.base", "Main loop terminated.", "info"),
        (APP, "twistd {version} ({exe} {pyVersion}) starting up.", "info"),
        (APP, "reactor class: {reactor}.", "info"),
        (APP, "Server Shut Down.", "info"),
        ("stdout", "{log_io}", "info"),
        ("log_legacy", "something else", "info"),
        ("log_legacy", "Site starting on 3000", "debug"),
        ("log_legacy", "(TCP Port 3000 Closed)", "debug"),
        ("claude_proxy.cli", "process starting on demand", "info"),
    ],
)
def test_chatter_is_for_those_who_debug(namespace: str, template: str, level: str) -> None:
    event = {"log_namespace": namespace, "log_format": template, "log_level": LogLevel.info}
    assert level_of(event) == level


@pytest.mark.parametrize(
    ("given_level", "level"),
    [(LogLevel.warn, "warn"), (LogLevel.error, "error"), (LogLevel.critical, "error")],
)
def test_troubles_of_twisted_stay_troubles(given_level: object, level: str) -> None:
    event = {"log_namespace": HTTP, "log_format": "x", "log_level": given_level}
    assert level_of(event) == level


@pytest.mark.parametrize(
    ("event", "level"),
    [({}, "info"), ({"isError": 1}, "error"), ({"log_level": "odd"}, "info")],
)
def test_an_event_without_a_level_gets_one(event: dict[str, object], level: str) -> None:
    assert level_of(event) == level


def test_what_twisted_really_says_of_a_factory_is_chatter() -> None:
    events: list[Any] = []
    globalLogPublisher.addObserver(cast(Any, events.append))
    try:
        factory: Any = Factory()
        factory.doStart()
        factory.doStop()
    finally:
        globalLogPublisher.removeObserver(cast(Any, events.append))
    assert [level_of(event) for event in events] == ["debug", "debug"]


# Development.


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_a_line_for_reading() -> None:
    event = {
        "log_namespace": "claude_proxy.cli",
        "log_level": LogLevel.info,
        "log_time": NOON,
        "log_format": "turn ended: {outcome}",
        "type": "turn_end",
        "outcome": "success",
        "cost": 0.5,
        "text": 'two words="x"',
        "empty": "",
        "list": [1, "ä"],
        "none": None,
    }
    assert readable(event) == (
        "2026-11-22 12:00:00.045 INFO  cli  turn_end  turn ended: success  outcome=success "
        'cost=0.5 text="two words=\\"x\\"" empty="" list=[1, "ä"] none=null\n'
    )


def test_colours_are_for_terminals_only() -> None:
    event = {"log_format": "x", "log_level": LogLevel.error}
    assert "\x1b[31mERROR\x1b[0m" in readable(event, Terminal())
    assert "\x1b" not in readable(event)
    file = Terminal()
    make_observer(file, production=True, level="debug")(event)
    assert "\x1b" not in file.getvalue()
    assert "\\u001b" not in file.getvalue()


@pytest.mark.parametrize(
    "evil",
    ["a\n2026-11-22 12:00:00.000 ERROR forged", "\x1b[2J", "a\rb", "\x9b31m", "\u2028x", "\u202ex"],
)
def test_no_value_can_forge_a_line_or_command_a_terminal(evil: str) -> None:
    event = {
        "log_format": "{field}",
        "log_namespace": evil,
        "type": evil,
        "field": evil,
        "list": [evil],
        evil: 1,
    }
    text = readable(event, Terminal())
    assert len(text.splitlines()) == 1
    assert evil not in text
    assert all(char.isprintable() for char in re.sub(r"\x1b\[(32|0)m", "", text)[:-1])


def test_a_traceback_follows_indented() -> None:
    error = ValueError("first\n2026-11-22 12:00:00.000 ERROR forged \x1b[2J")
    event = {"log_format": "hello", "log_failure": raised(error), "log_level": LogLevel.error}
    first, *rest = readable(event).splitlines()
    assert "hello" in first
    assert r'error="ValueError: first\n2026' in first
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert any("forged \\x1b[2J" in line for line in rest)


def test_a_file_that_cannot_hold_a_letter_gets_its_number() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    make_observer(file, production=False, level="debug")({"log_format": "größe 😀"})
    assert b"gr\\xf6\\xdfe \\U0001f600" in raw.getvalue()


# Secrets.


@pytest.mark.parametrize("production", [True, False])
@pytest.mark.parametrize(
    "where",
    [
        {"log_format": SECRET.replace("{", "{{")},
        {"log_format": "key {key}", "key": SECRET},
        {"log_format": "", "key": ["x" + SECRET + "y"]},
        {"log_format": "", "key": {SECRET: 1}},
        {"log_format": "", "key": SECRET.encode()},
        {"log_format": "", "key": {SECRET}},
        {"log_format": "", "key": json.dumps({"key": SECRET})},
        {"log_format": "", "key": json.dumps({"key": SECRET}, ensure_ascii=False)},
        {"log_format": "", "key": "x" * 8185 + SECRET},
        {"log_format": "", "type": SECRET},
        {"log_format": "", "log_namespace": SECRET},
        {"log_format": "", "log_failure": raised(ValueError(SECRET))},
        {"log_format": "", SECRET: 1},
    ],
)
def test_a_secret_is_replaced_wherever_it_is(where: dict[str, object], production: bool) -> None:
    file = io.StringIO()
    make_observer(file, production=production, level="debug", secrets=[SECRET, "other-secret"])(
        where
    )
    text = file.getvalue()
    assert "[redac" in text
    assert "sk-ant" not in text
    assert "slash-" not in text
    if production:
        assert parsed(file)


def test_a_secret_of_digits_is_replaced_in_numbers_too() -> None:
    only = record({"log_format": "", "pid": 1234567890, "n": 12}, secrets=["12345678"])
    assert (only["pid"], only["n"]) == ("[redacted]90", 12)


def test_the_longer_of_two_secrets_is_replaced_whole() -> None:
    secrets = ["sk-12345", "sk-1234567890"]
    assert record({"log_format": "sk-1234567890"}, secrets=secrets)["message"] == "[redacted]"


def test_a_secret_cannot_break_the_syntax() -> None:
    secrets = ['", "type": "', '{"time": "', "message"]
    only = record({"log_format": "hello", "type": "x"}, secrets=secrets)
    assert (only["message"], only["type"]) == ("hello", "x")


def test_short_secrets_are_left_alone() -> None:
    assert record({"log_format": "hello"}, secrets=["", "l", "hello"])["message"] == "hello"


# Hostile input.

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers().map(lambda n: n << 20_000)
    | st.floats()
    | st.text(st.characters())
    | st.text(st.sampled_from('\ud800\udfff\x00\n\r\x1b\u2028\u2029\x85"\\{}!:%s '), max_size=8)
    | st.binary()
    | st.sampled_from([LogLevel.info, 1j, object(), LogLevel])
    | st.builds(Hostile)
    | st.builds(raised, st.builds(ValueError, st.text()))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
    max_leaves=8,
)
keys = (
    st.text()
    | st.integers()
    | st.none()
    | st.sampled_from(
        [
            "log_format log_level log_time log_namespace log_failure log_text log_flattened type",
            "isError message format failure why time level component error traceback",
        ]
    ).flatmap(lambda names: st.sampled_from(names.split()))
)


@given(st.dictionaries(keys, values, max_size=8), st.lists(st.text(min_size=8), max_size=2))
@settings(max_examples=300, deadline=None)
def test_any_event_is_exactly_one_line_of_json(event: dict[Any, Any], secrets: list[str]) -> None:
    file = io.StringIO()
    make_observer(file, production=True, level="debug", secrets=secrets)(event)
    assert len(file.getvalue().splitlines()) == 1
    (only,) = parsed(file)
    assert list(only)[:5] == ["time", "level", "component", "type", "message"]
    file.getvalue().encode("ascii")


@given(st.dictionaries(keys, values, max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_event_is_one_line_and_what_is_indented(event: dict[Any, Any]) -> None:
    first, *rest = readable(event).splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ ", first)
    assert all(line.startswith("    ") for line in rest)


# Writing.


class Broken(io.StringIO):
    """Fails as often as it is told, then works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.failures = list(errors)

    def write(self, text: str) -> int:
        if self.failures:
            raise self.failures.pop()
        return super().write(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")]
)
def test_what_cannot_be_written_is_lost_in_silence(error: Exception) -> None:
    file = Broken(error)
    observer = make_observer(file, production=True, level="debug")
    observer({"log_format": "one"})
    observer({"log_format": "two"})
    assert [only["message"] for only in parsed(file)] == ["two"]


def test_every_record_is_flushed() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(io.BufferedWriter(cast(Any, raw)), encoding="utf-8")
    make_observer(file, production=True, level="debug")({"log_format": "hello"})
    assert b"hello" in raw.getvalue()


def test_what_tells_of_a_turns_start_waits_and_keeps_its_place() -> None:
    file, put_off = io.StringIO(), list[Callable[[], None]]()
    observer = make_observer(file, production=True, level="debug", later=put_off.append)
    log = Logger(namespace="claude_proxy.web", observer=observer)
    log.info("one", type="request")
    log.info("two", type="turn_start")
    assert (file.getvalue(), len(put_off)) == ("", 1)
    put_off.pop()()
    assert [entry["message"] for entry in parsed(file)] == ["one", "two"]
    log.info("three", type="request")
    log.info("four", type="turn_end")
    assert [entry["message"] for entry in parsed(file)[2:]] == ["three", "four"]
    put_off.pop()()  # it has nothing left to do
    log.info("five", type="request")
    elsewhere = threading.Thread(target=log.info, args=("six",), kwargs={"type": "request"})
    elsewhere.start()
    elsewhere.join()
    messages = [entry["message"] for entry in parsed(file)]
    assert messages == ["one", "two", "three", "four", "five", "six"]


def test_the_observer_is_one() -> None:
    observer = make_observer(io.StringIO(), production=True, level="info")
    assert verifyObject(ILogObserver, observer)


class Interrupting(io.StringIO):
    """Logs again in the middle of its first write, as a signal handler may."""

    observer: ILogObserver | None = None

    def write(self, text: str) -> int:
        if self.observer is not None:
            observer, self.observer = self.observer, None
            observer({"log_format": "from the signal handler"})
        return super().write(text)


def test_a_signal_handler_may_log_in_the_middle_of_a_write() -> None:
    file = Interrupting()
    observer = make_observer(file, production=True, level="debug")
    file.observer = observer
    observer({"log_format": "interrupted"})
    messages = [only["message"] for only in parsed(file)]
    assert messages == ["interrupted", "from the signal handler"]


def test_threads_do_not_mix_their_lines() -> None:
    file = io.StringIO()
    observer = make_observer(file, production=True, level="debug")

    def work(name: str) -> None:
        for number in range(200):
            observer({"log_format": f"{name}{number}"})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = sorted(only["message"] for only in parsed(file))
    assert messages == sorted(f"{name}{number}" for name in "abcd" for number in range(200))


# Keys.


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("", ""),
        ("abc", "..."),
        ("abcd", "a..."),
        ("sk-12345678", "sk..."),
        ("sk-1234567890abcdef-1234567890abcdef", "sk-12345..."),
    ],
)
def test_a_masked_key_shows_a_quarter_of_it_at_most(key: str, shown: str) -> None:
    assert mask_key(key) == shown


@given(st.text(min_size=1))
def test_no_key_is_shown_beyond_its_share(key: str) -> None:
    shown = mask_key(key).removesuffix("...")
    assert key.startswith(shown)
    assert len(shown) <= 8
    assert len(shown) * 4 <= len(key)


# Where the log goes.


@pytest.fixture
def no_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "options",
    [
        {"logfile": "-", "nodaemon": True},
        {"logfile": None, "nodaemon": True},
        {"logfile": "", "nodaemon": 1},
    ],
)
def test_a_server_in_the_foreground_logs_to_its_terminal(options: dict[str, object]) -> None:
    assert open_log_file(options) is sys.stdout


def test_a_daemon_has_no_terminal() -> None:
    with pytest.raises(SystemExit, match="--logfile"):
        open_log_file({"logfile": "-", "nodaemon": False})


@pytest.mark.usefixtures("no_handler")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"logfile": None, "nodaemon": False}, "twistd.log"),
        ({"logfile": "some.log", "nodaemon": False}, "some.log"),
        ({"logfile": "some.log", "nodaemon": True}, "some.log"),
    ],
)
def test_everybody_else_logs_to_a_file(
    options: dict[str, object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = open_log_file(options)
    monkeypatch.chdir("/")  # as a daemon may
    make_observer(file, production=False, level="debug")({"log_format": "größe"})
    assert "größe" in (tmp_path / name).read_text("utf-8")


@pytest.mark.usefixtures("no_handler")
def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_log_file({"logfile": str(tmp_path / "nowhere" / "some.log")})


def observing(file: TextIO) -> ILogObserver:
    return make_observer(file, production=True, level="info")


@pytest.mark.usefixtures("no_handler")
def test_the_signal_rotates_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "some.log"
    observer = observing(open_log_file({"logfile": str(path)}))
    globalLogPublisher.addObserver(observer)
    try:
        observer({"log_format": "before"})
        os.kill(os.getpid(), signal.SIGUSR1)
        observer({"log_format": "after"})
    finally:
        globalLogPublisher.removeObserver(observer)
    rotated = [json.loads(line) for line in (tmp_path / "some.log.1").read_text().splitlines()]
    current = [json.loads(line) for line in path.read_text().splitlines()]
    assert [only["message"] for only in rotated] == ["before"]
    assert [only["type"] for only in current] == ["log_rotated", "log"]
    assert current[1]["message"] == "after"


def test_a_handler_that_is_there_already_stays(tmp_path: Path) -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        open_log_file({"logfile": str(tmp_path / "some.log")})
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("no_handler")
def test_a_long_log_is_rotated_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "some.log"
    path.write_bytes(b"x" * 1_000_001)
    observing(open_log_file({"logfile": str(path)}))({"log_format": "first"})
    assert json.loads(path.read_text())["message"] == "first"


def test_the_log_of_the_system_gets_one_message_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(syslog, "openlog", lambda *args: calls.append(("openlog", *args)))
    monkeypatch.setattr(syslog, "syslog", lambda *args: calls.append(args))
    observer = observing(open_log_file({"syslog": True, "prefix": "proxy"}))
    observer({"log_format": "one\0"})
    observer({"log_format": "two"})
    assert calls[0] == ("openlog", "proxy")
    assert [json.loads(str(text))["message"] for (text,) in calls[1:]] == ["one\0", "two"]


# All that the program logs.


class Call(NamedTuple):
    """One place in the program that logs."""

    place: str
    kind: str
    template: str
    fields: tuple[str, ...]


METHODS = {"debug", "info", "warn", "error", "failure", "critical", "write", "level"}


def logging_calls() -> Iterator[tuple[str, ast.Call]]:
    """All calls with a field `type`, each with its place."""
    package = Path(claude_proxy.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and any(word.arg == "type" for word in node.keywords):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in METHODS:
                    yield f"{path.relative_to(package)}:{node.lineno}", node


def calls() -> Iterator[Call]:
    for place, node in logging_calls():
        words = {word.arg: word.value for word in node.keywords if word.arg is not None}
        kind, template = words.pop("type"), node.args[0]
        assert isinstance(kind, ast.Constant), place
        # A template that is put together could have a client's braces in it.
        assert isinstance(template, ast.Constant), f"{place}: the template is no literal"
        yield Call(place, str(kind.value), str(template.value), tuple(words))


CALLS = list(calls())

HOSTILE: dict[str, object] = {
    "a new line": 'x\n{"time": "2026-11-22T12:00:00.000Z", "level": "error", "type": "forged"}',
    "carriage return": "x\r\nERROR forged",
    "line separators": "x\u2028forged\u2029forged\x85forged\x0bforged\x0cforged\x1cforged",
    "NUL": "x\x00y",
    "a lone surrogate": "x\ud800y\udfff",
    "terminal codes": "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\u202e\u200b\ufeff",
    "quotes": 'x" \\" \\\\", "level": "error',
    "100 kB": "x" * 100_000,
    "100 kB of controls": "\x1b\n" * 50_000,
    "braces": "{0.__class__} {request_id.__class__.__init__.__globals__} {log_source!r} {} {{ }",
    "percents": "%s %(request_id)s %n %%",
    "bytes": b"\xff\x00\n\x1b[2J",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a huge number": 10**5000,
    "what raises": Hostile(),
    "a list of it all": ["\n", b"\xff", Hostile(), float("nan"), {"\x1b": "\ud800"}],
    "a key of it all": {"\n\x1b[2J": {"\u2028": Hostile()}, Hostile: 1},
}


def test_everything_that_is_logged_is_seen_here() -> None:
    page = Path(__file__).parent.parent / "docs" / "logs.md"
    rows = re.compile(r"^\| `(\w+)` \| (?:debug|info|warn|error)\b", re.MULTILINE)
    documented = rows.findall(page.read_text(encoding="utf-8"))
    assert {call.kind for call in CALLS} == set(documented)
    assert len(documented) > 40


@pytest.mark.parametrize("name", HOSTILE)
def test_no_field_of_any_record_can_spoil_the_log(name: str) -> None:
    """Neither as JSON nor for people, whichever field of whichever type it is."""
    value = HOSTILE[name]
    machine, people = io.StringIO(), Terminal()
    observers = [
        make_observer(machine, production=True, level="debug"),
        make_observer(people, production=False, level="debug"),
    ]
    for call in CALLS:
        event = {
            "log_namespace": "claude_proxy.web",
            "log_level": LogLevel.warn,
            "log_time": NOON,
            "log_format": call.template,
            "type": call.kind,
            **dict.fromkeys(call.fields, value),
        }
        for observer in observers:
            observer(dict(event))
    written = parsed(machine)
    assert len(machine.getvalue().splitlines()) == len(CALLS)  # however lines are told apart
    machine.getvalue().encode("ascii")
    assert [(only["type"], only["level"]) for only in written] == [(c.kind, "warn") for c in CALLS]
    for call, only in zip(CALLS, written, strict=True):
        assert set(only) == {"time", "level", "component", "type", "message", *call.fields}
        assert "claude_proxy.web.logs" not in json.dumps(only), "a template looked inside"
    lines = people.getvalue().splitlines()
    assert len(lines) == len(CALLS)
    for call, line in zip(CALLS, lines, strict=True):
        assert f" \x1b[33mWARN \x1b[0m web  {call.kind}  " in line
        assert re.sub(r"\x1b\[(33|0)m", "", line).isprintable()
        assert len(line) < 300_000


@given(st.sampled_from(CALLS), st.data())
@settings(max_examples=200, deadline=None)
def test_any_values_in_the_fields_of_any_record_are_one_line(call: Call, data: Any) -> None:
    fields = {name: data.draw(values) for name in call.fields}
    event = {"log_format": call.template, "type": call.kind, "log_level": LogLevel.info, **fields}
    only = record(event)
    assert only["type"] == call.kind
    assert set(call.fields) <= set(only)
    assert len(readable(event).splitlines()) == 1

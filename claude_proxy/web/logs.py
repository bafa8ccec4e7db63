"""
Log records: one line for every event that is logged through Twisted, by us or by anybody else.

In production a line is a JSON object with `time`, `level`, `component`, `type` and `message`, then
the event's own fields; in development it is made for reading.  Whatever an event holds, exactly one
record comes of it: no value can end the line, break its syntax, raise out of it or fill the disk,
and no configured secret gets into it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import syslog
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, get_ident
from types import FrameType
from typing import TextIO, cast

from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.log import textFromEventDict
from twisted.python.logfile import LogFile
from twisted.python.reflect import qual, safe_repr, safe_str
from zope.interface import implementer

__all__ = ["level_of", "make_observer", "mask_key", "open_log_file"]

_log = Logger(namespace="claude_proxy.logs")

_LEVELS = ("debug", "info", "warn", "error")
_COLOURS = {"debug": 2, "info": 32, "warn": 33, "error": 31}

_TEXT_LIMIT = 8192  # characters of one string
_RECORD_LIMIT = 65536  # characters of all the fields of a record, roughly
_DEPTH_LIMIT = 8
_INTEGER_BITS = 64  # longer integers are no numbers to most readers of JSON
_BACKLOG = 10_000  # lines that may wait while another thread writes
_SHORTEST_SECRET = 8
_REDACTED = "[redacted]"

_MASKED_LENGTH = 8
_MASKED_SHARE = 4

# What the old and the new logging of Twisted keep in an event for themselves.
_INTERNAL = frozenset(
    ("time", "system", "isError", "format", "message", "why", "failure", "logLevel", "type")
)

# What Twisted says at level info but only its debuggers want to know: namespace and template.
_CHATTER = tuple(
    (re.compile(namespace), re.compile(template))
    for namespace, template in (
        (r"", r"(Starting|Stopping) factory "),
        (r"twisted\.web\.", r""),
        (r"twisted\.python\.log$", r"\{log_io\}"),  # access lines
        (r"twisted\.internet\.(?!base)", r""),  # base tells of signals and of the end
        (r"log_legacy$", r".* starting on |\(.* Port .* Closed\)|Load(ing|ed)\b"),
    )
)

_PATIENT = frozenset(("request", "turn_start"))
"""
Types of records that wait a moment: they are made before the agent has its message, and take as
long as all else that is done until then.
"""

_Redact = Callable[[str], str]
_Later = Callable[[Callable[[], None]], object]


def make_observer(
    file: TextIO,
    *,
    production: bool,
    level: str,
    secrets: Sequence[str] = (),
    later: _Later | None = None,
) -> ILogObserver:
    """
    An observer that writes one record for each event, and flushes it.

    It never raises: what cannot be written is lost.

    @param file: where the records go.
    @param production: JSON, or lines for reading (coloured if `file` is a terminal).
    @param level: the least serious level that is written: error, warn, info or debug.
    @param secrets: texts that are replaced wherever they appear; those shorter than 8 characters
        are not, they would make the log unreadable.
    @param later: calls what it is given a moment later; only for the thread that makes the
        observer.  What tells that a turn starts is then written a moment later, or before the next
        record; None has it written at once.
    @raise ValueError: there is no such level.
    """
    return _Observer(file, production, _LEVELS.index(level), _redactor(secrets), later)


def mask_key(key: str) -> str:
    """What may be shown of a key: its first 8 characters, but never more than a quarter of it."""
    return key[: min(_MASKED_LENGTH, len(key) // _MASKED_SHARE)] + "..." if key else ""


def open_log_file(twistd_options: Mapping[str, object]) -> TextIO:
    """
    The file to which twistd would log under these options of its own; SIGUSR1 rotates it.

    Raises SystemExit for a daemon that is to log to its terminal, as twistd does, and OSError if
    the file cannot be opened.
    """
    name = str(twistd_options.get("logfile") or "")
    if twistd_options.get("syslog"):
        return cast(TextIO, _Syslog(str(twistd_options.get("prefix") or "twisted")))
    if name == "-" and not twistd_options.get("nodaemon"):
        raise SystemExit("A daemon cannot log to the terminal: give twistd -n, or a --logfile.")
    if name == "-" or (twistd_options.get("nodaemon") and not name):
        # Without any stdout (started with it closed), Python has None there.
        return sys.stdout or Path(os.devnull).open("w")
    file = _RotatedFile(LogFile.fromFullPath(name or "twistd.log"))
    if not signal.getsignal(signal.SIGUSR1):  # neither a handler of somebody else nor ignored
        signal.signal(signal.SIGUSR1, file.rotate)
    return cast(TextIO, file)


def level_of(event: LogEvent) -> str:
    """The level at which an event is recorded: Twisted's chatter is only for those who debug."""
    level = event.get("log_level")
    if level is LogLevel.critical:
        return "error"
    name = getattr(level, "name", "error" if event.get("isError") else "info")
    if name == "info":
        namespace = safe_str(event.get("log_namespace"))
        template = safe_str(event.get("log_text") or event.get("log_format"))
        if any(a.match(namespace) and b.match(template) for a, b in _CHATTER):
            return "debug"
    return name if name in _LEVELS else "info"


@dataclass(frozen=True)
class _Record:
    """What is said of one event; every text in it is clean, capped and free of secrets."""

    when: datetime
    level: str
    component: str
    type: str
    message: str
    fields: dict[str, object]
    traceback: str | None

    def as_json(self) -> str:
        head = {
            "time": self.when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": self.level,
            "component": self.component,
            "type": self.type,
            "message": self.message,
        }
        tail = {} if self.traceback is None else {"traceback": self.traceback}
        # ASCII only: no encoding of the file and no exotic line separator can spoil it.
        return json.dumps(head | self.fields | tail)

    def as_text(self, *, coloured: bool) -> str:
        level = f"{self.level.upper():<5}"
        if coloured:
            level = f"\x1b[{_COLOURS[self.level]}m{level}\x1b[0m"
        local = self.when.astimezone().replace(tzinfo=None)
        words = [local.isoformat(" ", "milliseconds"), level]
        words += [f"{_visible(word)} " for word in (self.component, self.type, self.message)]
        words += [f"{_quoted(key)}={_quoted(value)}" for key, value in self.fields.items()]
        lines = [" ".join(words).rstrip()]
        if self.traceback is not None:
            lines += [f"    {_visible(line)}" for line in self.traceback.rstrip().split("\n")]
        return "\n".join(lines)


def _visible(text: str) -> str:
    """Show what a terminal would obey, or not show, as an escape sequence in letters."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _quoted(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"=\\\[{]+", value):
        return _visible(value)
    return _visible(json.dumps(value, ensure_ascii=False))


def _redactor(secrets: Iterable[str]) -> _Redact:
    # A secret may have been escaped before it was logged: inside a JSON text, or a repr.
    forms = {
        form
        for secret in secrets
        if len(secret) >= _SHORTEST_SECRET
        for form in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            repr(secret)[1:-1],
        )
    }
    if not forms:
        return lambda text: text
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return lambda text: pattern.sub(_REDACTED, text)


class _Cleaner:
    """Makes JSON of anything, within the limits of one record."""

    def __init__(self, redact: _Redact) -> None:
        self._redact = redact
        self._left = _RECORD_LIMIT

    def text(self, text: str, *, keep_end: bool = False) -> str:
        """The text without secrets and lone surrogates, cut at its end (or at its start)."""
        # Secrets first: cut in half, or escaped, they would not be recognised.
        clean = self._redact(str.__str__(text))
        if not clean.isascii():
            clean = clean.encode("utf-8", "backslashreplace").decode("utf-8")
        excess = len(clean) - _TEXT_LIMIT
        if excess <= 0:
            return clean
        mark = f"...[{excess} characters left out]"
        return mark + clean[excess:] if keep_end else clean[:_TEXT_LIMIT] + mark

    def fields(
        self, items: Iterable[tuple[object, object]], taken: Iterable[str] = (), depth: int = 0
    ) -> dict[str, object]:
        """An object of these items; a key that is taken already gets underscores."""
        names = set(taken)
        fields: dict[str, object] = {}
        for key, value in items:
            name = self.text(key if isinstance(key, str) else _repr(key))
            while name in names:
                name += "_"
            if self._left <= 0:
                fields[name] = "...[left out]"
                break
            names.add(name)
            self._left -= len(name)
            fields[name] = self.value(value, depth)
        return fields

    def value(self, value: object, depth: int = 0) -> object:
        """The value, or the nearest thing to it that JSON has."""
        self._left -= len('"": ')
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and value.bit_length() <= _INTEGER_BITS:
            return self._number(int.__add__(value, 0))  # of a subclass, the number alone
        if isinstance(value, float) and math.isfinite(value):
            return self._number(float.__add__(value, 0.0))
        if depth < _DEPTH_LIMIT:
            if isinstance(value, dict):
                return self.fields(dict.items(value), depth=depth + 1)
            if isinstance(value, (list, tuple)):
                return self._items(value, depth + 1)
        if isinstance(value, (bytes, bytearray)):
            value = value.decode("utf-8", "backslashreplace")
        text = self.text(value if isinstance(value, str) else _repr(value))
        self._left -= len(text)
        return text

    def _items(self, values: Iterable[object], depth: int) -> list[object]:
        items: list[object] = []
        for value in values:
            if self._left <= 0:
                return [*items, "...[left out]"]
            items.append(self.value(value, depth))
        return items

    def _number(self, number: float) -> object:
        text = str(number)
        clean = self._redact(text)  # there are keys of digits alone
        return number if clean == text else clean


def _repr(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        return hex(value)  # Python refuses to write out very long ones in decimal
    text: str = safe_repr(value)
    return text


def _record_of(event: LogEvent, level: str, redact: _Redact) -> _Record:
    cleaner = _Cleaner(redact)
    failure = event.get("log_failure", event.get("failure"))
    error, traceback = _told(failure) if isinstance(failure, Failure) else (None, None)
    head = ("time", "level", "component", "type", "message")
    own = (
        (key, value)
        for key, value in event.items()
        if not (isinstance(key, str) and (key.startswith("log_") or key in _INTERNAL))
    )
    fields = cleaner.fields(own, head if error is None else (*head, "error", "traceback"))
    if error is not None:
        fields["error"] = cleaner.text(error)
    kind = event.get("type")
    return _Record(
        when=_time_of(event),
        level=level,
        component=cleaner.text(_component_of(event)),
        type=cleaner.text(kind if kind and isinstance(kind, str) else "log"),
        message=cleaner.text(_message_of(event, failed=error is not None) or error or ""),
        fields=fields,
        traceback=cleaner.text(traceback, keep_end=True) if traceback else None,
    )


def _component_of(event: LogEvent) -> str:
    """The layer that speaks, for ours; the whole namespace for Twisted's own records."""
    namespace: str = safe_str(event.get("log_namespace") or "-")
    package, _, rest = namespace.partition(".")
    # A Logger that is a class attribute adds the module and the class to its namespace.
    return rest.partition(".")[0] if package == "claude_proxy" and rest else namespace


def _time_of(event: LogEvent) -> datetime:
    try:
        return datetime.fromtimestamp(event.get("log_time", event.get("time")), UTC)  # type: ignore[arg-type]  # what is no time raises
    except (TypeError, ValueError, OverflowError, OSError):
        return datetime.now(UTC)


def _message_of(event: LogEvent, *, failed: bool) -> str:
    if failed and "log_text" in event:  # log.err(): its text has the traceback in it
        return safe_str(event.get("why") or "Unhandled Error")
    template = event.get("log_format")
    if template is None:  # not by way of Twisted's own publisher
        return textFromEventDict({"message": (), "isError": 0, **event}) or ""
    text = formatEvent(event)
    if text.startswith(("Unable to format event", "MESSAGE LOST")):  # and then the whole event
        return f"(not formattable) {safe_str(template)}"
    return text


def _told(failure: Failure) -> tuple[str, str]:
    """What went wrong in one line, and where it did."""
    try:
        kind = qual(failure.value.__class__).removeprefix("builtins.")
        error = f"{kind}: {failure.getErrorMessage()}".removesuffix(": ")
        return error, failure.getTraceback()
    except Exception:  # noqa: BLE001  # an exception may do anything when it is looked at
        return _repr(failure), ""


@implementer(ILogObserver)
class _Observer:
    def __init__(
        self, file: TextIO, production: bool, least: int, redact: _Redact, later: _Later | None
    ) -> None:
        self._file = file
        self._production = production
        self._least = least
        self._redact = redact
        self._encoding = getattr(file, "encoding", None) or "utf-8"
        self._coloured = not production and file.isatty()
        self._lines: deque[str] = deque(maxlen=_BACKLOG)
        self._writing = Lock()
        self._later = later
        self._thread = get_ident()
        self._put_off: deque[LogEvent] = deque()

    def __call__(self, event: LogEvent) -> None:
        if self._later is not None and self._can_wait(event):
            self._put_off.append(event)
            if len(self._put_off) == 1:
                self._later(self._catch_up)
            return
        self._catch_up()
        self._record(event)

    def _can_wait(self, event: LogEvent) -> bool:
        kind = event.get("type")
        return isinstance(kind, str) and kind in _PATIENT and get_ident() == self._thread

    def _catch_up(self) -> None:
        # Another thread may do the same at this moment: each takes what the other has left.
        with suppress(IndexError):
            while True:
                self._record(self._put_off.popleft())

    def _record(self, event: LogEvent) -> None:
        try:
            level = level_of(event)
            if _LEVELS.index(level) >= self._least:
                self._write(self._line(event, level))
        except Exception as error:  # noqa: BLE001  # a record must come out, and nothing else
            reason = f"An event could not be logged: {type(error).__name__}."
            self._write(self._line({"log_format": reason}, "error"))

    def _line(self, event: LogEvent, level: str) -> str:
        record = _record_of(event, level, self._redact)
        if self._production:
            return record.as_json()
        text = record.as_text(coloured=self._coloured)
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)

    def _write(self, line: str) -> None:
        # A signal handler may log in the middle of a write, and so may another thread: whoever is
        # writing already then writes their lines too.  Waiting for it could be a deadlock.
        self._lines.append(line)
        while self._lines and self._writing.acquire(blocking=False):
            try:
                while self._lines:
                    # No space, nobody at the other end, closed: nobody can be told.
                    with suppress(Exception):
                        self._file.write(self._lines.popleft() + "\n")
                        self._file.flush()
            finally:
                self._writing.release()


class _RotatedFile(io.TextIOBase):
    """Twisted's log file as a text file."""

    encoding = "utf-8"

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._rotation_due = False

    def write(self, text: str) -> int:
        if self._rotation_due:
            self._rotation_due = False
            self._file.rotate()
        self._file.write(text.encode())
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def rotate(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle the signal: rotate before the next record, which is this one."""
        self._rotation_due = True
        _log.info("the log file was rotated", type="log_rotated")


class _Syslog(io.TextIOBase):
    """The system's log as a text file."""

    encoding = "utf-8"

    def __init__(self, prefix: str) -> None:
        syslog.openlog(prefix)

    def write(self, text: str) -> int:
        for line in text.splitlines():
            syslog.syslog(line)
        return len(text)

"""
What is said of one logged event: JSON for machines, or a line for reading.

Whatever an event holds, exactly one record comes of it: no value can end the line, break its
syntax, raise out of it or fill the disk, and no configured secret gets into it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from twisted.logger import LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.log import textFromEventDict
from twisted.python.reflect import qual, safe_repr, safe_str

__all__ = ["LEVELS", "Record", "Redact", "level_of", "record_of", "redactor"]

LEVELS = ("debug", "info", "warn", "error")
"""The levels of records, the least serious first."""

_COLOURS = {"debug": 2, "info": 32, "warn": 33, "error": 31}

_TEXT_LIMIT = 8192  # characters of one string
_RECORD_LIMIT = 65536  # characters of all the fields of a record, roughly
_DEPTH_LIMIT = 8
_INTEGER_BITS = 64  # longer integers are no numbers to most readers of JSON
_SHORTEST_SECRET = 8
_REDACTED = "[redacted]"

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

Redact = Callable[[str], str]
"""Takes secrets out of a text."""


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
    return name if name in LEVELS else "info"


@dataclass(frozen=True)
class Record:
    """What is said of one event; every text in it is clean, capped and free of secrets."""

    when: datetime
    level: str
    component: str
    type: str
    message: str
    fields: dict[str, object]
    traceback: str | None

    def as_json(self) -> str:
        """One line of JSON, in ASCII."""
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
        """One line for reading, and the lines of its traceback."""
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


def redactor(secrets: Iterable[str]) -> Redact:
    """What takes these secrets out of a text; those shorter than 8 characters stay in it."""
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

    def __init__(self, redact: Redact) -> None:
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


def record_of(event: LogEvent, level: str, redact: Redact) -> Record:
    """The record of an event; raises whatever a value raises that is looked at."""
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
    return Record(
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

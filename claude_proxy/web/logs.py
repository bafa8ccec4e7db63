"""
Log records: one line for every event that is logged through Twisted, by us or by anybody else.

In production a line is a JSON object with `time`, `level`, `component`, `type` and `message`, then
the event's own fields; in development it is made for reading.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import syslog
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, get_ident
from types import FrameType
from typing import TextIO, cast

from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.python.logfile import LogFile
from zope.interface import implementer

from claude_proxy.web.logline import LEVELS, Redact, level_of, record_of, redactor

__all__ = ["make_observer", "mask_key", "open_log_file"]

_log = Logger(namespace="claude_proxy.logs")

_BACKLOG = 10_000  # lines that may wait while another thread writes

_MASKED_LENGTH = 8
_MASKED_SHARE = 4

_PATIENT = frozenset(("request", "turn_start"))
"""
Types of records that wait a moment: they are made before the agent has its message, and take as
long as all else that is done until then.
"""

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
    return _Observer(file, production, LEVELS.index(level), redactor(secrets), later)


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


@implementer(ILogObserver)
class _Observer:
    def __init__(
        self, file: TextIO, production: bool, least: int, redact: Redact, later: _Later | None
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
            if LEVELS.index(level) >= self._least:
                self._write(self._line(event, level))
        except Exception as error:  # noqa: BLE001  # a record must come out, and nothing else
            reason = f"An event could not be logged: {type(error).__name__}."
            self._write(self._line({"log_format": reason}, "error"))

    def _line(self, event: LogEvent, level: str) -> str:
        record = record_of(event, level, self._redact)
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

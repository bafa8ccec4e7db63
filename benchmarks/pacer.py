"""
The rhythm of `many_streams`: one process that speaks for many children.

Each child is a shell that says its process id and waits for the end of its stdin.  This process
opens the child's stdout by that id and writes its events there itself, straight into the pipe that
the server (or a bare reader) reads.  So five hundred children cost no more than five hundred
sleeping shells, and nothing stands between the moment in an event and the pipe.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import SESSION, event_line

__all__ = ["MARK", "OVER", "Pacing", "child", "pacing"]

MARK = "~"
"""Stands before and after an event's number and the moment when it was written, in ns."""

OVER = b'"over"}\n'
"""How the last line of a child ends, and no other."""

_CHILD = """#!/bin/sh
case "$*" in *--version*) echo "2.1.197 (Claude Code)"; exit ;; esac
while case $1 in --session-id=*) false ;; esac do shift; done
while read -r line; do case $line in *'"user"'*) break ;; esac; done
exec 3>&1
echo "$$ ${{1#*=}}" > '{door}'
while read -r line; do :; done
"""

_TEXT = "{mark}%d{mark}%d{mark}"

_REST = 500_000_000
"""Nanoseconds between the last event of a stream and its end, where all streams go together."""


def child(folder: Path) -> Path:
    """Write a child that leaves its work to the pacer; make the FIFO where it asks for that."""
    door = _door(folder)
    os.mkfifo(door)
    path = folder / "child"
    path.write_text(_CHILD.format(door=door), encoding="utf-8")
    path.chmod(0o755)
    return path


def _door(folder: Path) -> Path:
    return folder / "door"


class Pacing:
    """A running pacer."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait_for_start(self) -> None:
        """Return when events begin."""
        self._line("begun")

    def wait_for_said(self) -> float:
        """
        Return when all events are written, and have had time to arrive.

        @return: how late, in seconds, the latest hundredth of them was written.
        """
        return float(self._line("late").split()[1])

    def _line(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line.startswith(word):
            raise SystemExit("The pacer has failed.")
        return line


@contextmanager
def pacing(
    folder: Path, streams: int, events: int, gap: float, *, together: bool
) -> Iterator[Pacing]:
    """
    Run a pacer for the children of `folder`.

    @param gap: seconds between two events of a stream.
    @param together: no stream begins before all are there; else each begins at once.
    """
    command = [sys.executable, "-m", "benchmarks.pacer", str(_door(folder)), str(streams)]
    command += [str(events), str(gap), *(["--together"] if together else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield Pacing(process)
    finally:
        process.kill()
        process.communicate()


@dataclass
class _Stream:
    """A child, and what is still to be said for it."""

    pipe: int
    session: bytes
    head: bytes
    tail: bytes
    said: int = 0


class _Pacer:
    """Writes each event when it is due."""

    def __init__(self, door: int, streams: int, events: int, gap: float, *, together: bool) -> None:
        self._door = door
        self._awaited = streams
        self._streams = streams
        self._events = events
        self._gap = int(gap * 1e9)
        self._together = together
        self._due: list[tuple[int, int, _Stream]] = []
        self._known = 0
        self._heard = b""
        self._begun = False
        self._text = _TEXT.format(mark=MARK).encode()
        self._lateness: list[int] = []

    def run(self) -> None:
        while self._awaited or self._due:
            wait = None
            if self._due and not (self._together and self._awaited):
                wait = max(0, self._due[0][0] - time.monotonic_ns()) / 1e9
            if self._awaited:
                if select.select([self._door], [], [], wait)[0]:
                    self._listen()
            elif wait:
                time.sleep(wait)
            if not (self._together and self._awaited):
                self._speak()

    def _listen(self) -> None:
        self._heard += os.read(self._door, 1 << 16)
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            pid, session = line.split()
            pipe = os.open(f"/proc/{pid.decode()}/fd/3", os.O_WRONLY | os.O_NONBLOCK)
            head, tail = event_line(1, MARK).replace(SESSION.encode(), session).split(MARK.encode())
            stream = _Stream(pipe, session, head, tail)
            os.write(pipe, _init(session.decode()))
            self._awaited -= 1
            self._known += 1
            heapq.heappush(self._due, (time.monotonic_ns() + self._gap, self._known, stream))
        if self._together and not self._awaited:
            self._spread()
        if not self._begun and (not self._together or not self._awaited):
            self._begun = True
            print("begun", flush=True)

    def _spread(self) -> None:
        """Begin now, and let no two streams speak in the same moment."""
        begin = time.monotonic_ns() + self._gap
        self._due = [
            (begin + self._gap * number // self._streams, number, stream)
            for _, number, stream in sorted(self._due, key=lambda due: due[1])
        ]
        heapq.heapify(self._due)

    def _speak(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic_ns():
            due, number, stream = self._due[0]
            if stream.said > self._events:
                if len(self._due) == (self._streams if self._together else 1):
                    self._tell_lateness()
                heapq.heappop(self._due)
                os.write(stream.pipe, _result(stream.session.decode()))
                os.close(stream.pipe)
                continue
            if stream.said == self._events:
                # Where all go together, none ends while others still have something to say.
                rest = _REST if self._together else 0
                heapq.heapreplace(self._due, (due + rest, number, stream))
                stream.said += 1
                continue
            now = time.monotonic_ns()
            os.write(stream.pipe, stream.head + self._text % (stream.said, now) + stream.tail)
            self._lateness.append(now - due)
            stream.said += 1
            heapq.heapreplace(self._due, (due + self._gap, number, stream))

    def _tell_lateness(self) -> None:
        late = sorted(self._lateness)[len(self._lateness) * 99 // 100]
        print(f"late {late / 1e9:.6f}", flush=True)


def _init(session: str) -> bytes:
    return json.dumps({"type": "system", "subtype": "init", "session_id": session}).encode() + b"\n"


def _result(session: str) -> bytes:
    result = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "session_id": session,
        "result": "over",
    }
    return json.dumps(result).encode() + b"\n"


def main() -> None:
    """Be the pacer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("door")
    parser.add_argument("streams", type=int)
    parser.add_argument("events", type=int)
    parser.add_argument("gap", type=float)
    parser.add_argument("--together", action="store_true")
    asked = parser.parse_args()
    # For writing as well: without it, each child that goes would be an end of the file.
    door = os.open(asked.door, os.O_RDWR)
    gc.disable()
    pacer = _Pacer(door, asked.streams, asked.events, asked.gap, together=asked.together)
    pacer.run()


if __name__ == "__main__":
    main()

"""
A CLI that misbehaves as its prompt says.

It is run as a program of its own, `bad_cli.py FOLDER OPTION...`, and never imported: FOLDER is
where it and the test leave notes for each other, the options are those that the server gives the
real CLI.  A prompt that is a JSON list is a script, a step each: `["say", "hello"]` calls `say`.
Any other prompt is answered with itself.  What happens before the prompt is read is chosen by
the model's name, see `EARLY`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(sys.argv[1])
OPTIONS = dict(word.partition("=")[::2] for word in sys.argv[2:])
SESSION = OPTIONS.get("--session-id") or OPTIONS.get("--resume")


def main() -> None:
    if "--version" in OPTIONS:
        write(b"2.1.197 (Claude Code)\n")
        return
    note("pid", str(os.getpid()))
    EARLY.get(OPTIONS.get("--model", ""), lambda: None)()
    prompt = read_prompt()
    try:
        script = json.loads(prompt)
    except ValueError:
        script = [["init"], ["say", prompt], ["result"], ["leave"]]
    for word, *details in script:
        STEPS[word](*details)


# Reading and writing.


def write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(1, left) :]


def line(**event: Any) -> bytes:
    return json.dumps({"session_id": SESSION, **event}, ensure_ascii=False).encode() + b"\n"


def read_line() -> dict[str, Any]:
    """The next line of stdin; empty at its end."""
    text = sys.stdin.buffer.readline()
    message: dict[str, Any] = json.loads(text) if text else {}
    return message


def read_prompt() -> str:
    while message := read_line():
        if message["type"] == "user":
            return str(message["message"]["content"])
    sys.exit(0)


def note(name: str, text: str = "") -> None:
    """Let the test know something."""
    (FOLDER / f"{name}.new").write_text(text or "yes")
    (FOLDER / f"{name}.new").replace(FOLDER / name)


def was_noted(name: str, text: str) -> bool:
    path = FOLDER / name
    return path.exists() and path.read_text() == text


def await_note(name: str) -> None:
    """Wait until the test has left a note."""
    while not (FOLDER / name).exists():
        time.sleep(0.01)


# What it says.


def init(session: str | None = None) -> None:
    write(line(type="system", subtype="init", session_id=session or SESSION))


def say(text: str) -> None:
    write(line(type="assistant", text=text))


def say_much(size: int, count: int = 1) -> None:
    """So many events of so many bytes of text."""
    event = line(type="assistant", text="m" * size)
    for _ in range(count):
        write(event)


def say_in_pieces(size: int, text: str) -> None:
    """One event, written so many bytes at a time, each by itself."""
    event = line(type="assistant", text=text)
    for start in range(0, len(event), size):
        write(event[start : start + size])
        time.sleep(0.002)


def say_for_ever(size: int, seconds: float = 0.0) -> NoReturn:
    """Events without end, with a pause after each."""
    event = line(type="assistant", text="e" * size)
    while True:
        write(event)
        time.sleep(seconds)


def say_bytes(text: str) -> None:
    """Anything, a byte for each character."""
    write(text.encode("latin-1"))


def say_size_without_end(size: int) -> None:
    """So many bytes and no newline."""
    block = b"w" * 65536
    for _ in range(size // len(block)):
        write(block)


def result(text: str = "done", session: str | None = None) -> None:
    fields = {"session_id": session or SESSION, "result": text}
    write(line(type="result", subtype="success", is_error=False, **fields))


def result_much(size: int) -> None:
    """A result of so many bytes of text."""
    result("r" * size)


def complain(text: str) -> None:
    os.write(2, text.encode() + b"\n")


def complain_much(size: int) -> None:
    left = size
    while left > 0:
        left -= os.write(2, b"x" * 1023 + b"\n")


# How it goes on, or does not.


def exit_with(code: int) -> NoReturn:
    os._exit(code)


def die(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def be_stubborn() -> None:
    """Take no notice of polite signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def hang() -> NoReturn:
    """Neither read nor write any more."""
    while True:
        time.sleep(60)


def wait_for_end() -> None:
    """Read on and answer nothing, until there is nothing to read any more."""
    while read_line():
        pass


def leave() -> NoReturn:
    """End as the real one does when its stdin is closed."""
    wait_for_end()
    sys.exit(0)


def obey() -> NoReturn:
    """End the turn when told so, as the real one does."""
    while message := read_line():
        if message.get("request", {}).get("subtype") == "interrupt":
            write(line(type="result", subtype="error_during_execution", is_error=True))
            note("interrupted")
    sys.exit(0)


def hang_up() -> None:
    """Close stdout."""
    os.close(1)


def fork(place: str, held: str) -> None:
    """
    Start something that lives on by itself and takes no notice of polite signals.

    @param place: of what it becomes a part: `group`, `own group` or `own session`.
    @param held: what it keeps open of ours: `stdout` or `nothing`.
    """
    if child := os.fork():
        while not was_noted("grandchild", str(child)):
            time.sleep(0.001)
        return
    be_stubborn()
    if place == "own group":
        os.setpgid(0, 0)
    elif place == "own session":
        os.setsid()
    for descriptor in (0, 2) if held == "stdout" else (0, 1, 2):
        os.close(descriptor)
    note("grandchild", str(os.getpid()))
    hang()


STEPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        await_note,
        be_stubborn,
        complain,
        complain_much,
        die,
        exit_with,
        fork,
        hang,
        hang_up,
        init,
        leave,
        note,
        obey,
        result,
        result_much,
        say,
        say_bytes,
        say_for_ever,
        say_in_pieces,
        say_much,
        say_size_without_end,
        time.sleep,
        wait_for_end,
    )
}


def complain_and_exit() -> NoReturn:
    complain("not today")
    exit_with(3)


def hang_stubbornly() -> NoReturn:
    be_stubborn()
    hang()


EARLY: dict[str, Callable[[], None]] = {
    "exits": lambda: exit_with(3),
    "complains": complain_and_exit,
    "hangs": hang,
    "stubbornly-hangs": hang_stubbornly,
}
"""What it does before it reads anything, by the model's name; for others it reads."""

if __name__ == "__main__":
    main()

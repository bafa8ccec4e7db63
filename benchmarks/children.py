"""Stand-ins for the CLI that cost as little as possible, so that the server is what is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["SESSION", "event_line", "flood", "instant"]

SESSION = "cbcc0b62-0e94-4708-8c01-549ec3f61be0"

_INIT = {"type": "system", "subtype": "init", "session_id": SESSION}
_RESULT = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "result": "x",
    "session_id": SESSION,
}
_TEXT = {
    "type": "assistant",
    "message": {"content": [{"type": "text", "text": "hi"}]},
    "session_id": SESSION,
}


def event_line(characters: int) -> bytes:
    """A partial message with so many characters of text, as a line of the CLI."""
    event = {
        "type": "stream_event",
        "event": {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "x" * characters},
        },
        "session_id": SESSION,
        "parent_tool_use_id": None,
        "uuid": SESSION,
    }
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


_FLOOD = """#!{python} -IS
import os, sys
if "--version" in sys.argv:
    print("2.1.197 (Claude Code)")
    sys.exit()
def put(data):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
while b'"user"' not in sys.stdin.buffer.readline():
    pass
put({init!r})
event = {event!r}
block = event * {per_block}
for _ in range({events} // {per_block}):
    put(block)
put(event * ({events} % {per_block}))
put({result!r})
sys.stdin.buffer.read()
"""


def flood(path: Path, *, events: int, characters: int = 200) -> Path:
    """Write a child that sends so many events as fast as its pipe takes them."""
    script = _FLOOD.format(
        python=sys.executable,
        init=json.dumps(_INIT).encode() + b"\n",
        event=event_line(characters),
        events=events,
        per_block=1000,
        result=json.dumps(_RESULT).encode() + b"\n",
    )
    return _executable(path, script)


def instant(path: Path) -> Path:
    """Write a child that answers the moment it runs: a shell script without any work to do."""
    lines = "\n".join(f"echo '{json.dumps(line)}'" for line in (_INIT, _TEXT, _RESULT))
    script = (
        '#!/bin/sh\ncase "$*" in *--version*) echo "2.1.197 (Claude Code)"; exit ;; esac\n'
        f"{lines}\nwhile read -r _; do :; done\n"
    )
    return _executable(path, script)


def _executable(path: Path, script: str) -> Path:
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    return path

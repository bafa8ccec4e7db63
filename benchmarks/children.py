"""Stand-ins for the CLI that cost as little as possible, so that the server is what is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["MARK", "SAID", "SESSION", "chat_flood", "event_line", "flood", "instant", "live"]

SESSION = "cbcc0b62-0e94-4708-8c01-549ec3f61be0"

_INIT = {"type": "system", "subtype": "init", "session_id": SESSION}
_RESULT = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "result": "x",
    "session_id": SESSION,
}
MARK = "~"
"""What the texts of `chat_flood` are made of; it stands nowhere else in an answer."""


SAID = "hi"
"""The answer of `instant` and `live`."""


def event_line(characters: int, text: str = "x") -> bytes:
    """A partial message with so many characters of text, as a line of the CLI."""
    delta = {"type": "text_delta", "text": text * characters}
    return _partial({"type": "content_block_delta", "index": 0, "delta": delta})


def _partial(event: dict[str, object]) -> bytes:
    return _line({"type": "stream_event", "event": event, "parent_tool_use_id": None})


def _line(event: Mapping[str, object]) -> bytes:
    named = {**event, "session_id": SESSION, "uuid": SESSION}
    return json.dumps(named, separators=(",", ":")).encode() + b"\n"


def _message(events: int, characters: int) -> bytes:
    """A message that comes in so many pieces and then whole, as the CLI tells it."""
    block = {"type": "text", "text": MARK * characters * events}
    whole = {"id": "m", "role": "assistant", "content": [block], "stop_reason": None}
    start = {"type": "content_block_start", "index": 0, "content_block": {**block, "text": ""}}
    return b"".join(
        (
            _partial({"type": "message_start", "message": {**whole, "content": []}}),
            _partial(start),
            event_line(characters, MARK) * events,
            _line({"type": "assistant", "message": whole, "parent_tool_use_id": None}),
            _partial({"type": "content_block_stop", "index": 0}),
            _partial({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
            _partial({"type": "message_stop"}),
        )
    )


_PER_BLOCK = 1000

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
block = {block!r}
for _ in range({blocks}):
    put(block)
put({rest!r})
put({result!r})
sys.stdin.buffer.read()
"""


def flood(path: Path, *, events: int, characters: int = 200) -> Path:
    """Write a child that sends so many events as fast as its pipe takes them."""
    event = event_line(characters)
    blocks, rest = divmod(events, _PER_BLOCK)
    return _flood(path, event * _PER_BLOCK, blocks, event * rest)


def chat_flood(path: Path, *, events: int, characters: int = 200) -> Path:
    """The same in whole messages: each text comes in a thousand pieces, and then once more."""
    blocks, rest = divmod(events, _PER_BLOCK)
    last = _message(rest, characters) if rest else b""
    return _flood(path, _message(_PER_BLOCK, characters), blocks, last)


def _flood(path: Path, block: bytes, blocks: int, rest: bytes) -> Path:
    script = _FLOOD.format(
        python=sys.executable,
        init=json.dumps(_INIT).encode() + b"\n",
        block=block,
        blocks=blocks,
        rest=rest,
        result=json.dumps(_RESULT).encode() + b"\n",
    )
    return _executable(path, script)


def _answer() -> list[bytes]:
    """A turn with one piece of text, as lines without their newlines."""
    block = {"type": "text", "text": SAID}
    whole = {"id": "m", "role": "assistant", "content": [block], "stop_reason": None}
    lines = (
        _line(_INIT),
        _partial({"type": "message_start", "message": {**whole, "content": []}}),
        event_line(1, SAID),
        _line({"type": "assistant", "message": whole, "parent_tool_use_id": None}),
        _line({**_RESULT, "result": SAID, "num_turns": 1}),
    )
    return [line.rstrip() for line in lines]


def instant(path: Path) -> Path:
    """
    Write a child that says its first text the moment it runs, without any work to do, and the rest
    when it has read the message: a shell script.
    """
    first, rest = (
        b"\n".join(lines).decode().replace(SESSION, "$session").replace('"', '\\"')
        for lines in (_answer()[:_FIRST], _answer()[_FIRST:])
    )
    script = (
        '#!/bin/sh\ncase "$*" in *--version*) echo "2.1.197 (Claude Code)"; exit ;; esac\n'
        'for option; do case "$option" in --session-id=*) session="${option#*=}" ;; esac; done\n'
        f'echo "{first}"\nwhile read -r line; do\n'
        f'case "$line" in *\'"type":"user"\'*) echo "{rest}" ;; esac\ndone\n'
    )
    return _executable(path, script)


_FIRST = 3
"""Lines of an answer up to its first text."""

_LIVE = """#!{python} -IS
import os, re, sys, time
if "--version" in sys.argv:
    print("2.1.197 (Claude Code)")
    sys.exit()
options = dict(word.partition("=")[::2] for word in sys.argv)
session = options.get("--session-id", {session!r}).encode()
lines = [line.replace({session!r}.encode(), session) + b"\\n" for line in {answer!r}]
replayed = b'"session_id":"%b","isReplay":true' % session
answer = b'{{"type":"control_response","response":{{"subtype":"success","request_id":"%b"}}}}\\n'
for line in sys.stdin.buffer:
    if b'"control_request"' in line:
        os.write(1, answer % re.search(rb'"request_id":"(.*?)"', line)[1])
        continue
    replay = line.replace(b'"session_id":""', replayed)
    os.write(1, b"".join(lines[:{first}]))
    time.sleep(0.002)
    os.write(1, b"".join([replay, *lines[{first}:]]))
"""


def live(path: Path) -> Path:
    """
    Write a child that takes one turn after the other and says the first text of each at once; the
    rest comes 2 ms later, as no model says it all at once.
    """
    script = _LIVE.format(python=sys.executable, session=SESSION, answer=_answer(), first=_FIRST)
    return _executable(path, script)


def _executable(path: Path, script: str) -> Path:
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    return path

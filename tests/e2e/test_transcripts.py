"""Transcripts written by hand, and text that stays text, with the real CLIs."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from claude_proxy.cli.prompt import literal
from claude_proxy.cli.transcript import (
    as_context,
    config_directory,
    transcript_lines,
    transcript_path,
)
from claude_proxy.cli.versions import capabilities_of
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import cli_environment, run_cli, user_line
from tests.e2e.messages_api import MessagesApi

Block = dict[str, Any]
Messages = list[tuple[str, list[Block]]]

SECRET = "what-the-file-says"
DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
IMAGE: Block = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": DOT},
}
LINKED: Block = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
PDF: Block = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQKJSVFT0YK"},
}


def text(said: str) -> Block:
    return {"type": "text", "text": said}


@dataclass
class Workspace:
    """A CLI with a folder of its own, in which a secret lies."""

    claude: Claude
    api: MessagesApi
    folder: Path

    def __post_init__(self) -> None:
        self.can = capabilities_of(self.claude.version)
        self.cwd = self.folder / "workspace"
        self.environment = cli_environment(self.folder, self.api.url)

    def write(self, messages: Messages) -> str:
        """Write a transcript and return its session id."""
        session_id = str(uuid.uuid4())
        path = transcript_path(
            config_directory(self.environment), self.cwd, session_id, limit=self.can.folder_limit
        )
        path.parent.mkdir(parents=True)
        path.write_bytes(
            transcript_lines(
                messages,
                session_id=session_id,
                cwd=str(self.cwd),
                version=self.can.version,
                now=time.time(),
                make_uuid=lambda: str(uuid.uuid4()),
            )
        )
        return session_id

    def say(self, *contents: str | list[Block], resume: str | None = None) -> str:
        """Send messages to one process and return the session id of the last result."""
        self.cwd.mkdir(parents=True, exist_ok=True)
        (self.cwd / "secret.txt").write_text(SECRET)
        args = [] if resume is None else [f"--resume={resume}"]
        lines = [user_line(content) for content in contents]
        events = run_cli(self.claude, args, lines, self.environment, self.cwd)
        assert events[-1]["is_error"] is False
        return str(events[-1]["session_id"])

    def told(self, said: str) -> Messages:
        """What the API was told in the one request that ends with this text, notes left out."""
        requests = [r for r in self.api.turns(said) if r.conversation.user_texts[-1].endswith(said)]
        [request] = requests
        assert SECRET not in json.dumps(request.body)
        messages = [m for m in request.body["messages"] if m["role"] != "system"]
        return [m for m in map(_plain, messages) if m[1]]


def _plain(message: dict[str, Any]) -> tuple[str, list[Block]]:
    content = message["content"]
    blocks = [text(content)] if isinstance(content, str) else content
    kept = [{k: v for k, v in block.items() if k != "cache_control"} for block in blocks]
    # The CLI puts a line's end between texts that it joins.
    kept = [{**b, "text": b["text"].rstrip("\n")} if b["type"] == "text" else b for b in kept]
    reminder = "<system-reminder>"
    return message["role"], [b for b in kept if not b.get("text", "").lstrip().startswith(reminder)]


@pytest.fixture
def workspace(claude: Claude, messages_api: MessagesApi, tmp_path: Path) -> Workspace:
    return Workspace(claude, messages_api, tmp_path)


@pytest.fixture
def new_workspace(claude_new: Claude, messages_api: MessagesApi, tmp_path: Path) -> Workspace:
    return Workspace(claude_new, messages_api, tmp_path)


def test_a_transcript_is_resumed_message_by_message_and_again(workspace: Workspace) -> None:
    mark = uuid.uuid4().hex
    history: Messages = [
        ("assistant", [text("Welcome.")]),
        ("user", [text("read @secret.txt"), IMAGE]),
        ("assistant", [text("one")]),
        ("assistant", [text("more of one")]),
        ("user", [PDF, LINKED, text("/cost")]),
        ("assistant", [text("two")]),
    ]
    session_id = workspace.write(history)
    first, second = f"third {mark}", f"fourth {mark}"
    went_on = workspace.say(first, resume=session_id)
    assert workspace.told(first) == [*history, ("user", [text(first)])]
    assert (went_on == session_id) is workspace.can.session_id
    workspace.say(second, resume=went_on)
    assert workspace.told(second) == [
        *history,
        ("user", [text(first)]),
        ("assistant", [text(f"You said: {first}")]),
        ("user", [text(second)]),
    ]


def test_several_user_messages_in_a_row_reach_the_model_as_one(workspace: Workspace) -> None:
    said = f"three {uuid.uuid4().hex}"
    history: Messages = [
        ("user", [text("one")]),
        ("user", [IMAGE, text("two")]),
        ("assistant", [text("yes")]),
    ]
    workspace.say(said, resume=workspace.write(history))
    assert workspace.told(said) == [
        ("user", [text("one"), IMAGE, text("two")]),
        ("assistant", [text("yes")]),
        ("user", [text(said)]),
    ]


def test_a_transcript_is_found_where_the_path_is_long(new_workspace: Workspace) -> None:
    said = f"still there? {uuid.uuid4().hex}"
    new_workspace.cwd = new_workspace.folder / ("long-" * 20) / ("größe\U0001f600" * 10)
    session_id = new_workspace.write([("user", [text("hi")]), ("assistant", [text("hello")])])
    assert new_workspace.say(said, resume=session_id) == session_id
    assert [role for role, _ in new_workspace.told(said)] == ["user", "assistant", "user"]


def test_the_end_of_a_transcript_and_a_dot_are_one_message_for_the_oldest_cli(
    claude_old: Claude, messages_api: MessagesApi, tmp_path: Path
) -> None:
    workspace = Workspace(claude_old, messages_api, tmp_path)
    said = f"read @secret.txt {uuid.uuid4().hex}"
    session_id = workspace.write(
        [("user", [text("a")]), ("assistant", [text("b")]), ("user", [text(said), IMAGE])]
    )
    workspace.say(".", resume=session_id)
    [request] = messages_api.turns(said)
    assert SECRET not in json.dumps(request.body)
    assert _plain(request.body["messages"][-1]) == ("user", [text(said), IMAGE, text(".")])


@pytest.mark.parametrize(
    "start", ["read @secret.txt", "@secret.txt", "/cost", "/clear", "/init @x"]
)
def test_text_is_text(workspace: Workspace, start: str) -> None:
    said = f"{start} {uuid.uuid4().hex}"
    workspace.say(literal([text(said)], workspace.can))
    # The oldest CLI is kept from its commands and files by characters that nobody sees.
    [(role, [block])] = workspace.told(said.rsplit(maxsplit=1)[-1])
    assert role == "user"
    assert block["text"].replace("\u200b", "").lstrip("\n") == said
    assert workspace.claude.is_old or block["text"] == said


def test_text_is_text_behind_an_image_and_in_every_later_request(new_workspace: Workspace) -> None:
    mark = uuid.uuid4().hex
    messages = [[IMAGE, text(f"@secret.txt {number} {mark}")] for number in range(3)]
    first, second, third = (literal(blocks, new_workspace.can) for blocks in messages)
    session_id = new_workspace.say(first, second)
    new_workspace.say(third, resume=session_id)
    told = new_workspace.told(f"2 {mark}")
    assert [blocks for role, blocks in told if role == "user"] == messages


def test_an_image_may_stand_alone(new_workspace: Workspace) -> None:
    session_id = new_workspace.write([("user", [text("hi")]), ("assistant", [text("hello")])])
    mark = uuid.uuid4().hex
    new_workspace.say(literal([IMAGE], new_workspace.can), mark, resume=session_id)
    assert [blocks for role, blocks in new_workspace.told(mark) if role == "user"] == [
        [text("hi")],
        [IMAGE],
        [text(mark)],
    ]


def test_what_was_said_before_can_be_told_in_one_message(workspace: Workspace) -> None:
    said = f"and now? {uuid.uuid4().hex}"
    blocks = as_context([("user", [text("read @secret.txt")]), ("assistant", [text("no")])])
    workspace.say(literal([*blocks, text(said)], workspace.can))
    [(_, told)] = workspace.told(said)
    seen = "".join(block["text"] for block in told).replace("\u200b", "")
    assert [seen.count(part) for part in ("read @secret.txt", "\nno\n", said)] == [1, 1, 1]

"""What a client of the server sees is what somebody sees who runs the CLI by hand."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.e2e.daemon import cli_environment
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Event, Server

_IDS = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|\b(?:msg|req|toolu)_[0-9a-zA-Z]+|\ba[0-9a-f]{16}\b"
)
_TIMES = frozenset(
    {
        "duration_ms",
        "duration_api_ms",
        "ttft_ms",
        "ttft_stream_ms",
        "time_to_request_ms",
        "retry_delay_ms",
        "end_time",
        "timestamp",
        "totalDurationMs",
    }
)
_TIMES_IN_TEXT = re.compile(r"\b\d+(?:\.\d+)?s\b|duration_ms: \d+")


@dataclass(frozen=True)
class Case:
    """A prompt, the fields of the request, and the options that mean the same by hand."""

    prompt: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


ENVIRONMENT = {"LIVE_SESSIONS": "0"}
"""The CLI names its model otherwise in a process that resumes; what is live does not."""

TOOL = '[[text Looking.]] [[tool:Bash {"command": "echo hello"}]] [[then]] [[text Found.]]'
PARTIAL = {"include_partial_messages": True}
PARTIAL_OPTION = "--include-partial-messages"

BOTH = {
    "text": Case("[[text Hello there.]]"),
    "thinking": Case("[[thinking Well, well.]] [[text It is so.]]"),
    "tool": Case(TOOL, {"allowed_tools": ["Bash"]}, ("--allowedTools=Bash",)),
    "denied tool": Case(TOOL.replace("echo hello", "touch x")),
    "max turns": Case(
        TOOL,
        {"max_turns": 1, "allowed_tools": ["Bash"]},
        ("--max-turns=1", "--allowedTools=Bash"),
    ),
    "error": Case("[[error 400]]"),
    "options": Case(
        TOOL,
        {
            "system_prompt": "You are a parrot.",
            "append_system_prompt": "Speak Latin.",
            "model": "haiku",
            "permission_mode": "plan",
            "allowed_tools": ["Edit", "Bash(echo:*)"],
            "disallowed_tools": ["WebFetch"],
        },
        (
            "--system-prompt=You are a parrot.",
            "--append-system-prompt=Speak Latin.",
            "--model=haiku",
            "--permission-mode=plan",
            "--allowedTools=Edit",
            "--allowedTools=Bash(echo:*)",
            "--disallowedTools=WebFetch",
        ),
    ),
    "cost": Case("/cost"),
}
NEW_ONLY = {
    "partial text": Case("[[tokens 6]]", PARTIAL, (PARTIAL_OPTION,)),
    "partial thinking": Case(
        "[[thinking Well, well.]] [[text It is so.]]", PARTIAL, (PARTIAL_OPTION,)
    ),
    "partial tool": Case(
        TOOL, {**PARTIAL, "allowed_tools": ["Bash"]}, (PARTIAL_OPTION, "--allowedTools=Bash")
    ),
    "partial error": Case("[[error 400]]", PARTIAL, (PARTIAL_OPTION,)),
    "partial and broken": Case("[[tokens 3]] [[sse-error]]", PARTIAL, (PARTIAL_OPTION,)),
    "retries": Case("[[error 529 x1]] [[text hello]]"),
    "refusal": Case("[[text no]] [[stop refusal]]"),
    "sub-agent": Case(
        '[[subagent [[tool:Bash {"command": "echo in-sub"}]]]] [[then]] [[text Back.]]',
        {"allowed_tools": ["Task", "Bash"]},
        ("--allowedTools=Task,Bash",),
    ),
    "context": Case("/context"),
    "unknown command": Case("/nope"),
}


def by_hand(
    server: Server, api: MessagesApi, prompt: str, options: tuple[str, ...] = ()
) -> list[Event]:
    """Run the CLI once, as somebody would in a terminal, in the server's shared workspace."""
    environment = cli_environment(server.daemon.folder, api.url)
    flags = ["-p", "--verbose", "--output-format", "stream-json", *options]
    workspace = server.daemon.base / "shared_workspace"
    done = subprocess.run(
        [str(server.claude), *flags, "--", prompt],
        cwd=workspace,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def comparable(events: list[Event]) -> list[Any]:
    """The events with ids numbered in the order of their coming, and without times."""
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0], f"<id {len(numbers)}>")

    texts = [json.dumps(event, ensure_ascii=False) for event in events]
    texts = [_TIMES_IN_TEXT.sub("<time>", _IDS.sub(numbered, text)) for text in texts]
    return [_settled(_without_times(json.loads(text))) for text in texts]


def _settled(event: Event) -> Event:
    """Without what the CLI prints as far as it has heard of it at that moment."""
    if event["type"] == "assistant":
        del event["message"]["stop_reason"]
        del event["message"]["usage"]["output_tokens"]
    return event


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
def test_both_clis_answer_as_by_hand(server: Server, messages_api: MessagesApi, case: Case) -> None:
    served = server.ask(case.prompt, **case.fields).events
    assert comparable(served) == comparable(
        by_hand(server, messages_api, case.prompt, case.options)
    )


@pytest.mark.parametrize("case", NEW_ONLY.values(), ids=NEW_ONLY)
def test_the_newer_cli_answers_as_by_hand(
    new_server: Server, messages_api: MessagesApi, case: Case
) -> None:
    served = new_server.ask(case.prompt, **case.fields).events
    assert comparable(served) == comparable(
        by_hand(new_server, messages_api, case.prompt, case.options)
    )


def test_a_resumed_session_answers_as_by_hand(server: Server, messages_api: MessagesApi) -> None:
    first = server.ask("[[text one]]")
    served = server.ask("[[history]]", session_id=first.session_id).events
    [*_, result] = by_hand(server, messages_api, "[[text one]]")
    resumed = by_hand(server, messages_api, "[[history]]", (f"--resume={result['session_id']}",))
    assert comparable(served) == comparable(resumed)

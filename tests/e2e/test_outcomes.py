"""How turns of the real CLI end, in all forms of an answer: docs/outcomes.md says how."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import StartServer
from tests.outcomes import FORMS, check, documented

_ROWS = documented("tests/e2e/test_outcomes.py")

_QUICK = {"CLAUDE_CODE_SIMPLE": "1"}
"""With few tools the CLI starts faster by a quarter; its turns end as they do otherwise."""


@dataclass(frozen=True)
class Case:
    """
    What makes a turn end so.

    @ivar script: the model's part.
    @ivar said: what the model says before the end, as the OpenAI dialect tells it in a stream.
    @ivar native: fields of the request in the native dialect.
    @ivar chat: fields of the request in the OpenAI dialect.
    @ivar environment: of a server of its own, if it needs one.
    """

    script: str
    said: str = ""
    native: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] | None = None


_LOOK = '[[text Looking.]] [[tool:Bash {"command": "ls"}]] [[then]]'
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}
}
_NOBODY = str(uuid4())


def _rejected() -> str:
    """The model provider's limit of an account, which ends in ten minutes."""
    reset = int(time.time()) + 600
    limit = {"status": "rejected", "reset": reset, "5h-status": "rejected", "5h-reset": reset}
    headers = {**limit, "representative-claim": "five_hour"}
    words = [f"[[header anthropic-ratelimit-unified-{n}: {v}]]" for n, v in headers.items()]
    return " ".join([*words, "[[error 429]]"])


CASES = {
    "The agent is done": Case("[[text Done it is.]]", "Done it is."),
    "An answer that fits the JSON schema": Case('[[structured {"a": 1}]]', '{"a":1}', chat=_JSON),
    "`max-turns` is reached": Case(
        f"{_LOOK} [[text Never.]]",
        "Looking.",
        native={"max-turns": 1},
        chat={"claude": {"max-turns": 1}},
    ),
    "An answer is longer than the model may make it, and so is all that follows": Case(
        " [[then]] ".join(f'[[text "{n} and "]] [[stop max_tokens]]' for n in range(4)),
        "0 and 1 and 2 and 3 and ",
    ),
    "An answer is longer than the model may make it, and the CLI gets the rest": Case(
        '[[text "One and "]] [[stop max_tokens]] [[then]] [[text two.]]', "One and two."
    ),
    "The model refuses to answer": Case("[[text I would]] [[stop refusal]]", "I would"),
    "The provider answers 400": Case("[[error 400]]"),
    "The provider answers 401: the key is refused": Case("[[error 401]]"),
    "The provider answers 404: it does not know the model": Case("[[error 404]]"),
    "The provider answers 429": Case("[[error 429 retry-after=1]]"),
    "The provider answers 429 and says when the account's limit ends": Case(
        _rejected(),
        environment={
            "ANTHROPIC_API_KEY": None,
            "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat-test",
            "CLAUDE_CODE_SIMPLE": None,  # which knows no such token
        },
    ),
    "The provider answers 529": Case("[[error 529]]"),
    "The provider cannot be reached": Case(
        "[[text Never.]]", environment={"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    ),
    "The provider fails when the agent has already said something": Case(
        f"{_LOOK} [[error 500]]", "Looking."
    ),
    "The provider's stream ends in an error, and its repetition begins with the same words": Case(
        "[[text One and two.]] [[sse-error]]", "One and two."
    ),
    "The provider's stream is cut, and its repetition has other words": Case(
        "[[text One and two.]] [[pause 300ms]] [[cut]] [[again One or two.]]", "One and two."
    ),
    "The provider's stream is cut, and its repetition fails": Case(
        "[[text One and two.]] [[pause 300ms]] [[cut]] [[error 500 again]]", "One and two."
    ),
    "No answer fits the JSON schema": Case(
        " [[then]] ".join(['[[structured {"a": "one"}]]'] * 5), chat=_JSON
    ),
    "The answer to a JSON schema is text": Case("[[text No.]] [[then]] [[text No!]]", chat=_JSON),
    "The CLI is not logged in": Case("[[text Never.]]", environment={"ANTHROPIC_API_KEY": None}),
    "The session does not exist": Case(
        "[[text Never.]]", native={"session-id": _NOBODY}, chat={"claude": {"session-id": _NOBODY}}
    ),
}


@pytest.fixture(scope="module")
def usual_url(
    messages_api: MessagesApi, claude_new: Claude, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The server of all cases that need no other."""
    folder = tmp_path_factory.mktemp("daemon")
    with Daemon(folder, claude_new, messages_api.url, env=_QUICK) as daemon:
        yield daemon.url


@pytest.fixture
def url_for(usual_url: str, start_server: StartServer, claude_new: Claude) -> Callable[[Case], str]:
    """Where the server for a case is."""

    def get(case: Case) -> str:
        if case.environment is None:
            return usual_url
        return start_server(claude_new, {**_QUICK, **case.environment}).daemon.url

    return get


def test_every_row_is_tested() -> None:
    assert list(_ROWS) == list(CASES)


@pytest.mark.parametrize("row", CASES)
def test_it_ends_as_the_page_says(row: str, url_for: Callable[[Case], str]) -> None:
    case, url = CASES[row], url_for(CASES[row])
    expected = {form: words for form, words in zip(FORMS, _ROWS[row], strict=True) if words}
    with ThreadPoolExecutor(2) as pool:
        turns = {
            form: pool.submit(form.ask, url, case.script, case.native, case.chat)
            for form in expected
        }
    for form, words in expected.items():
        check(form, turns[form].result(), words, case.said)

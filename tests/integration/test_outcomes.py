"""How turns end in which the CLI or the server fails: docs/outcomes.md says how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import provider

from claude_proxy.sessions.book import SessionBook
from claude_proxy.web import api
from tests.integration.bad_days import quick_ladder
from tests.integration.server import Running, in_thread, pause, serving, until
from tests.outcomes import FORMS, Form, check, documented
from tests.support import in_reactor

_ROWS = documented("tests/integration/test_outcomes.py")

_CLI = """
def init():
    write(INIT)

def say(text):
    content = [{"type": "text", "text": text}]
    write(line(type="assistant", message={"id": "m1", "content": content, "stop_reason": None}))

def result(**fields):
    write(line(type="result", **fields))

def complain(text):
    os.write(2, text.encode() + b"\\n")

def die(name):
    os.kill(os.getpid(), signal.Signals[name])

def hang():
    append("hanging", str(os.getpid()))
    leave()

def obey():
    append("hanging", str(os.getpid()))
    for text in sys.stdin:
        if json.loads(text).get("request", {}).get("subtype") == "interrupt":
            result(subtype="error_during_execution", is_error=True, errors=["That is why."])
            leave()

prompt = message()
if not isinstance(prompt, str):
    prompt = prompt[0]["text"]
steps = {"init": init, "say": say, "complain": complain, "die": die, "hang": hang, "obey": obey,
         "sleep": time.sleep, "exit": os._exit}
for word, *details in json.loads(prompt):
    if word == "result":
        result(**details[0])
        leave()
    steps[word](*details)
"""
"""The prompt is a list of what this one does."""

Step = list[Any]

_INIT: Step = ["init"]
_SAY: Step = ["say", "So far."]
_HANG: Step = ["hang"]
_OBEY: Step = ["obey"]


def _result(subtype: str, *, is_error: bool = True) -> Step:
    return ["result", {"subtype": subtype, "is_error": is_error, "errors": ["That is why."]}]


def _refused(status: int, prose: str) -> Step:
    """The CLI has given up asking the provider."""
    said = {"subtype": "success", "is_error": True, "result": prose, "api_error_status": status}
    return ["result", said]


@dataclass(frozen=True)
class Case:
    """
    What makes a turn end so.

    @ivar steps: what the CLI does.
    @ivar said: what the agent says before the end.
    @ivar settings: of the server.
    @ivar patience: seconds for which the head of a chat's stream waits.
    @ivar stops: the server stops when the CLI does nothing any more.
    @ivar chat: fields of the request in the OpenAI dialect.
    """

    steps: list[Step]
    said: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    patience: float = api.HEAD_PATIENCE
    stops: bool = False
    chat: Mapping[str, Any] = field(default_factory=dict)


_TOTAL = {"CLAUDE_TOTAL_TIMEOUT_MS": "1500"}
_SILENCE = {"CLAUDE_INACTIVITY_TIMEOUT_MS": "1000"}
_CRASH: list[Step] = [["complain", "Out of luck."], ["exit", 1]]

CASES = {
    "`max-turns` is reached, CLI 1.0.24": Case(
        [_INIT, _SAY, _result("error_max_turns", is_error=False)], "So far."
    ),
    "The budget of the turn is used up": Case(
        [_INIT, _SAY, _result("error_max_budget_usd")], "So far."
    ),
    "The provider answers 403": Case(
        [_INIT, _refused(403, "Failed to authenticate. API Error: 403 No")]
    ),
    "The provider answers 413": Case([_INIT, _refused(413, "Request too large (max 32MB).")]),
    "The provider answers 500": Case([_INIT, _refused(500, "API Error: 500 No")]),
    "The provider fails after more than 5 seconds, nothing was said": Case(
        [_INIT, ["sleep", 0.3], _refused(500, "API Error: 500 No")], patience=0.1
    ),
    "The answer to `json_object` is no JSON object": Case(
        [_INIT, _SAY, ["result", {"subtype": "success", "result": "So far."}]],
        chat={"response_format": {"type": "json_object"}},
    ),
    "The CLI gives up (`error_during_execution`), nothing was said": Case(
        [_INIT, _result("error_during_execution")]
    ),
    "The CLI gives up (`error_during_execution`) in mid-answer": Case(
        [_INIT, _SAY, _result("error_during_execution")], "So far."
    ),
    "The CLI tells an end that this server does not know": Case(
        [_INIT, _result("error_of_the_future")]
    ),
    "The CLI crashes before its first event": Case(_CRASH),
    "The CLI crashes, nothing was said": Case([_INIT, *_CRASH]),
    "The CLI crashes in mid-answer": Case([_INIT, _SAY, *_CRASH], "So far."),
    "A signal ends the CLI in mid-answer": Case([_INIT, _SAY, ["die", "SIGKILL"]], "So far."),
    "The CLI ends without a result, exit code 0, nothing was said": Case([_INIT, ["exit", 0]]),
    "The CLI ends without a result, exit code 0, in mid-answer": Case(
        [_INIT, _SAY, ["exit", 0]], "So far."
    ),
    "The CLI is missing": Case([], settings={"CLAUDE_CLI": "/nowhere/claude"}),
    "The turn takes too long, nothing was said": Case([_INIT, _HANG], settings=_TOTAL),
    "The turn takes too long, in mid-answer": Case(
        [_INIT, _SAY, _HANG], "So far.", settings=_TOTAL
    ),
    "The CLI is silent for too long from the first": Case([_HANG], settings=_SILENCE),
    "The CLI is silent for too long, nothing was said": Case([_INIT, _HANG], settings=_SILENCE),
    "The CLI is silent for too long, in mid-answer": Case(
        [_INIT, _SAY, _HANG], "So far.", settings=_SILENCE
    ),
    "The server stops before the CLI's first event": Case([_HANG], stops=True),
    "The server stops, nothing was said": Case([_INIT, _HANG], stops=True),
    "The server stops in mid-answer": Case([_INIT, _SAY, _HANG], "So far.", stops=True),
}

BUSY = {
    "An earlier turn of the session does not end in time": {"QUEUE_TIMEOUT_MS": "100"},
    "Too many requests wait for their sessions": {"QUEUE_LENGTH": "0"},
}

_INTERRUPT, _DELETE = ("POST", "/interrupt"), ("DELETE", "")

STOPPED = {
    "The turn is interrupted, nothing was said": (_INTERRUPT, Case([_INIT, _OBEY])),
    "The turn is interrupted in mid-answer": (_INTERRUPT, Case([_INIT, _SAY, _OBEY], "So far.")),
    "The session is deleted before the CLI's first event": (_DELETE, Case([_HANG])),
    "The session is deleted, nothing was said": (_DELETE, Case([_INIT, _HANG])),
    "The session is deleted in mid-answer": (_DELETE, Case([_INIT, _SAY, _HANG], "So far.")),
}
"""What somebody else asks of the session while the turn runs."""

FAULT = "A fault of this server"
LEAVES = "The client leaves"


def _ask(
    server: Running,
    form: Form,
    steps: list[Step],
    native: Mapping[str, Any] | None = None,
    chat: Mapping[str, Any] | None = None,
) -> Any:
    """A turn, in a thread; the Deferred of its answer."""
    url = f"http://127.0.0.1:{server.port}"
    prompt = json.dumps(steps)
    return Deferred.fromCoroutine(in_thread(form.ask, url, prompt, native or {}, chat or {}))


async def _check_all(row: str, turns: Mapping[Form, Any], said: str = "") -> list[httpx.Response]:
    expected = dict(zip(FORMS, _ROWS[row], strict=True))
    answers = []
    for form, turn in turns.items():
        answer: httpx.Response = await turn
        check(form, answer, expected[form], said)
        answers.append(answer)
    return answers


def test_every_row_is_tested() -> None:
    assert sorted(_ROWS) == sorted([*CASES, *BUSY, *STOPPED, FAULT, LEAVES])


@in_reactor
@pytest.mark.parametrize("row", CASES)
async def test_it_ends_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    case = CASES[row]
    asked = [form for form, words in zip(FORMS, _ROWS[row], strict=True) if words]
    monkeypatch.setattr(api, "HEAD_PATIENCE", case.patience)
    with quick_ladder(0.05):
        async with serving(tmp_path, _CLI, **case.settings) as server:
            turns = {form: _ask(server, form, case.steps, chat=case.chat) for form in asked}
            if not case.stops:
                await _check_all(row, turns, case.said)
            else:
                await until(lambda: server.told("hanging").count("\n") == 3, "all turns hang")
                await pause(0.1)  # what they have said before is read meanwhile
    if case.stops:
        await _check_all(row, turns, case.said)


@in_reactor
@pytest.mark.parametrize("row", BUSY)
async def test_who_waits_for_a_session_in_vain_is_told_so(tmp_path: Path, row: str) -> None:
    session = {"session-id": str(uuid4())}
    async with serving(tmp_path, _CLI, **BUSY[row]) as server:
        first = _ask(server, FORMS[0], [_INIT, _SAY, _HANG], session)
        await until(lambda: server.told("hanging"), "the first turn runs")
        turns = {form: _ask(server, form, [], session, {"claude": session}) for form in FORMS}
        await _check_all(row, turns)
    await first


@in_reactor
@pytest.mark.parametrize("row", STOPPED)
async def test_who_has_a_turn_that_somebody_stops_is_told_so(tmp_path: Path, row: str) -> None:
    (method, action), case = STOPPED[row]

    def stop_all(url: str) -> None:
        with httpx.Client(base_url=url, trust_env=False) as client:
            sessions = [session["id"] for session in client.get("/api/sessions").json()["sessions"]]
            assert len(sessions) == len(FORMS)
            for session in sessions:
                told = client.request(method, f"/api/sessions/{session}{action}")
                assert told.status_code == 200, told.text

    with quick_ladder(0.05):
        async with serving(tmp_path, _CLI) as server:
            turns = {form: _ask(server, form, case.steps) for form in FORMS}
            await until(lambda: server.told("hanging").count("\n") == 3, "all turns hang")
            await pause(0.1)  # what they have said before is read meanwhile
            await in_thread(stop_all, f"http://127.0.0.1:{server.port}")
            answers = await _check_all(row, turns, case.said)
            assert server.is_idle
    for answer in answers:
        if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            # Nobody wants to see again what was just interrupted.
            assert answer.headers["x-should-retry"] == "false"


@in_reactor
async def test_a_fault_of_ours_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(SessionBook, "resolve", fail)
    async with serving(tmp_path, _CLI) as server:
        await _check_all(FAULT, {form: _ask(server, form, []) for form in FORMS})


@in_reactor
@pytest.mark.parametrize("form", FORMS, ids=str)
async def test_who_leaves_is_told_nothing_and_the_turn_is_stopped(
    tmp_path: Path, form: Form
) -> None:
    ended: list[LogEvent] = []

    @provider(ILogObserver)
    def note(event: LogEvent) -> None:
        if event.get("type") == "turn_end":
            ended.append(event)

    def leave(url: str) -> None:
        with pytest.raises(httpx.ReadTimeout):
            form.ask(url, json.dumps([_INIT, _SAY, _HANG]), {}, {}, seconds=0.5)

    globalLogPublisher.addObserver(note)
    try:
        with quick_ladder(0.05):
            async with serving(tmp_path, _CLI) as server:
                await in_thread(leave, f"http://127.0.0.1:{server.port}")
                await until(lambda: ended, "the turn has ended")
                assert ended[0]["outcome"] == "abandoned"
                await until(lambda: server.is_idle, "nothing of it is left")
    finally:
        globalLogPublisher.removeObserver(note)

"""The models that the CLI names: asked for in a process that the test plays."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorProcess
from twisted.logger import capturedLogs
from zope.interface.verify import verifyObject

from claude_proxy.cli.catalogue import ModelCatalogue, _Question
from claude_proxy.cli.control import ControlAnswer
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IAgentListener
from tests.support import FakeChild, FakeReactor, result_of

MODELS = [
    {"value": "default", "displayName": "Default", "resolvedModel": "claude-opus-4-8[1m]"},
    {"value": "opus[1m]", "resolvedModel": "claude-opus-4-8[1m]"},
    {"value": "sonnet"},
    {"value": "haiku"},
]
NAMES = ("opus[1m]", "sonnet", "haiku")
DISTRUST = [
    '--settings={"disableAllHooks":true,"env":{"CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD":"1"}}',
    "--setting-sources=user",
]


class Probe:
    """Knows what it is told to know."""

    def __init__(self) -> None:
        self.version = "2.1.197"
        self.error: ProxyError | None = None

    async def capabilities(self) -> Capabilities:
        if self.error is not None:
            raise self.error
        return capabilities_of(self.version)

    def resolve(self) -> list[str]:
        return ["/opt/claude", "--first"]


class Fixture:
    """
    A catalogue whose processes are played.

    @ivar swept: markers, in order.
    """

    def __init__(self, directory: Path) -> None:
        self.reactor = FakeReactor()
        self.probe = Probe()
        self.swept: list[str] = []
        self._markers = 0
        self.catalogue = ModelCatalogue(
            cast(IReactorProcess, self.reactor),
            self.reactor,
            cast(CliProbe, self.probe),
            environment={"PATH": ".:/bin", "HOME": "/home/me"},
            directory=str(directory),
            kill_timeout=5.0,
            next_marker=self._next_marker,
            sweep=self.swept.append,
        )

    def _next_marker(self) -> str:
        self._markers += 1
        return f"run.{self._markers}"

    @property
    def child(self) -> FakeChild:
        """The last process."""
        return self.reactor.children[-1]

    def ask(self) -> Deferred[tuple[str, ...]]:
        return Deferred.fromCoroutine(self.catalogue.names())

    def answers(self, models: object = MODELS, **response: Any) -> None:
        """Answer the last process's request as the CLI does, and leave when stdin is closed."""
        payload = {"commands": [], "models": models, "account": {"email": "me@example.com"}}
        self.child.says({"type": "control_response", "response": {**success(payload), **response}})

    def passes(self, seconds: float) -> None:
        self.reactor.pump([0.25] * int(seconds / 0.25))


def success(payload: object) -> dict[str, Any]:
    return {"subtype": "success", "request_id": "req_1", "response": payload}


@pytest.fixture(name="fixture")
def _fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    def killpg(group: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "killpg", killpg)
    fixture = Fixture(tmp_path)
    yield fixture
    for child in fixture.reactor.children:
        if child.pid is not None:
            child.exits()
    assert fixture.reactor.getDelayedCalls() == [], "a timer was left behind"
    assert fixture.swept == [f"run.{n + 1}" for n in range(len(fixture.reactor.children))]


def test_the_process_that_is_asked_has_no_session_and_no_message(
    fixture: Fixture, tmp_path: Path
) -> None:
    asking = fixture.ask()
    child = fixture.child
    assert str(tmp_path) in child.argv
    own = child.argv[child.argv.index("/opt/claude") :]
    assert own == [
        "/opt/claude",
        "--first",
        "-p",
        "--verbose",
        "--input-format=stream-json",
        "--output-format=stream-json",
        "--include-partial-messages",
        "--replay-user-messages",
        "--strict-mcp-config",
        *DISTRUST,
        f"--add-dir={tmp_path}",
    ]
    assert child.environment == {
        "PATH": "/bin",
        "HOME": "/home/me",
        "CLAUDE_PROXY_AGENT": "run.1",
    }
    assert child.lines == [
        {
            "type": "control_request",
            "request_id": "req_1",
            "request": {"subtype": "initialize"},
        }
    ]
    assert not child.stdin_closed
    fixture.answers()
    assert child.stdin_closed
    assert result_of(asking) == NAMES
    assert fixture.swept == []
    child.exits()
    assert fixture.swept == ["run.1"]


def test_an_answer_serves_everyone_until_the_version_changes(fixture: Fixture) -> None:
    asking = [fixture.ask() for _ in range(3)]
    assert len(fixture.reactor.children) == 1
    fixture.answers()
    assert [result_of(asked) for asked in asking] == [NAMES] * 3
    fixture.child.exits()
    fixture.passes(120)
    assert result_of(fixture.ask()) == NAMES
    assert len(fixture.reactor.children) == 1
    fixture.probe.version = "2.1.330"
    asking_again = fixture.ask()
    assert len(fixture.reactor.children) == 2
    fixture.answers([{"value": "fable"}])
    assert result_of(asking_again) == ("fable",)


def test_a_caller_who_gives_up_does_not_disturb_the_others(fixture: Fixture) -> None:
    impatient, patient = fixture.ask(), fixture.ask()
    impatient.cancel()
    with pytest.raises(CancelledError):
        result_of(impatient)
    fixture.answers()
    assert result_of(patient) == NAMES


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([], ()),
        ([{"value": "default"}], ()),
        (["sonnet", {"value": 7}, {}, None, {"value": ""}, {"value": "a\nb"}], ()),
        ([{"value": "a"}, {"value": "b"}, {"value": "a"}], ("a", "b")),
        ([{"value": "x" * 257}, {"value": "x" * 256}], ("x" * 256,)),
        (
            [{"value": f"m{n}"} for n in range(10_000)],
            tuple(f"m{n}" for n in range(200)),
        ),
    ],
)
def test_of_a_list_what_can_be_a_name_is_taken(
    fixture: Fixture, models: list[object], names: tuple[str, ...]
) -> None:
    asking = fixture.ask()
    fixture.answers(models)
    assert result_of(asking) == names
    assert result_of(fixture.ask()) == names
    assert len(fixture.reactor.children) == 1, "an empty list is an answer, too"


def test_a_cli_without_a_control_channel_is_not_asked(fixture: Fixture) -> None:
    fixture.probe.version = "1.0.24"
    assert result_of(fixture.ask()) == ()
    assert fixture.reactor.children == []


# Failures.


def unknown(logs: Sequence[Any]) -> list[str]:
    return [log["error"] for log in logs if log["type"] == "models_unknown"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"subtype": "error", "error": "no"}, "no"),
        ({"response": {}}, "its answer has no list of models"),
        ({"response": {"models": "all"}}, "its answer has no list of models"),
        ({"response": None}, "its answer has no list of models"),
    ],
)
def test_an_answer_without_models_is_a_failure(
    fixture: Fixture, answer: dict[str, object], error: str
) -> None:
    with capturedLogs() as logs:
        asking = fixture.ask()
        fixture.answers(**answer)
        assert result_of(asking) == ()
    assert unknown(logs) == [error]


def test_a_failure_is_remembered_for_a_minute(fixture: Fixture) -> None:
    with capturedLogs() as logs:
        asking = fixture.ask()
        fixture.child.complains("Credit balance is too low\n")
        fixture.child.exits(1)
        assert result_of(asking) == ()
    assert unknown(logs) == ["it ended: exit code 1 (Credit balance is too low)"]
    fixture.passes(59.75)
    assert result_of(fixture.ask()) == ()
    assert len(fixture.reactor.children) == 1
    fixture.passes(0.25)
    asking = fixture.ask()
    assert len(fixture.reactor.children) == 2
    fixture.answers()
    assert result_of(asking) == NAMES


def test_after_a_failure_another_version_is_asked_at_once(fixture: Fixture) -> None:
    first = fixture.ask()
    fixture.child.exits(1)
    assert result_of(first) == ()
    fixture.probe.version = "1.0.128"
    second = fixture.ask()
    fixture.answers()
    assert result_of(second) == NAMES


def test_a_cli_that_does_not_answer_is_given_ten_seconds_and_ended(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda _, number: signals.append(number))
    asking = fixture.ask()
    fixture.child.says({"type": "system", "subtype": "init"}, {"type": "result"})
    fixture.passes(9.75)
    assert not asking.called
    assert not fixture.child.stdin_closed
    with capturedLogs() as logs:
        fixture.passes(0.25)
        assert result_of(asking) == ()
    assert unknown(logs) == ["no answer within 10 seconds"]
    assert fixture.child.stdin_closed
    fixture.passes(1)
    assert signals == [signal.SIGTERM]
    fixture.answers()
    fixture.passes(5)
    assert signals == [signal.SIGTERM, signal.SIGKILL]
    fixture.child.exits(number=signal.SIGKILL)
    assert result_of(fixture.ask()) == (), "what came too late does not count"


def test_a_line_without_end_is_a_failure(fixture: Fixture) -> None:
    asking = fixture.ask()
    fixture.child.protocol.outReceived(b"x" * (4 * 1024 * 1024 + 1))
    fixture.child.exits(number=signal.SIGTERM)
    assert result_of(asking) == ()


def test_a_start_that_the_system_refuses_is_a_failure(fixture: Fixture) -> None:
    fixture.reactor.spawn_error = OSError(12, "Cannot allocate memory")
    with capturedLogs() as logs:
        assert result_of(fixture.ask()) == ()
    assert unknown(logs) == ["[Errno 12] Cannot allocate memory"]


def test_a_fault_of_ours_is_logged_and_holds_nobody_up(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise ValueError("broken")

    monkeypatch.setattr(fixture.probe, "resolve", broken)
    with capturedLogs() as logs:
        assert result_of(fixture.ask()) == ()
    assert [log["type"] for log in logs] == ["internal_error", "models_unknown"]


@pytest.mark.parametrize("failure", [Failure.CLI_NOT_FOUND, Failure.CLI_FAILED])
def test_without_a_cli_there_is_nothing_to_show_but_a_reason_to_give(
    fixture: Fixture, failure: Failure
) -> None:
    fixture.probe.error = ProxyError(failure)
    assert result_of(fixture.ask()) == ()
    with pytest.raises(ProxyError) as caught:
        result_of(fixture.catalogue.required_names())
    assert caught.value.failure is failure


# What turns tell, and the end.


def test_an_answer_in_a_turn_saves_the_question(fixture: Fixture) -> None:
    with capturedLogs() as logs:
        for _ in range(2):
            fixture.catalogue.learn("2.1.197", ControlAnswer("req_1", None, {"models": MODELS}))
        fixture.catalogue.learn("2.1.197", ControlAnswer("req_1", "no"))
        fixture.catalogue.learn("2.1.197", ControlAnswer("req_1", None, {"models": [{}, "x"]}))
        fixture.catalogue.learn("2.1.197", ControlAnswer("req_1", None, {"models": MODELS}))
    assert result_of(fixture.ask()) == NAMES
    assert fixture.reactor.children == []
    assert [(log["type"], log["models"], log["version"]) for log in logs] == [
        ("models_known", list(NAMES), "2.1.197"),
        ("models_known", [], "2.1.197"),
        ("models_known", list(NAMES), "2.1.197"),
    ]


def test_an_answer_in_a_turn_helps_those_whose_question_fails(fixture: Fixture) -> None:
    asking = fixture.ask()
    fixture.catalogue.learn("2.1.197", ControlAnswer("req_1", None, {"models": MODELS}))
    with capturedLogs() as logs:
        fixture.child.exits(1)
        assert result_of(asking) == NAMES
    assert unknown(logs) == []


def test_nothing_of_the_account_is_logged(fixture: Fixture) -> None:
    with capturedLogs() as logs:
        fixture.ask()
        fixture.answers()
    assert "me@example.com" not in str(logs)


def test_the_end_of_the_server_ends_the_process_and_the_wait(fixture: Fixture) -> None:
    asking = fixture.ask()
    with capturedLogs() as logs:
        closing = Deferred.fromCoroutine(fixture.catalogue.close())
        assert fixture.child.stdin_closed
        assert not closing.called
        fixture.child.exits()
        assert result_of(closing) is None
        assert result_of(asking) == ()
    assert fixture.swept == ["run.1"]
    assert unknown(logs) == []
    assert result_of(fixture.ask()) == ()
    assert len(fixture.reactor.children) == 1


def test_a_process_that_has_answered_is_waited_for_at_the_end(fixture: Fixture) -> None:
    asking = fixture.ask()
    fixture.answers()
    assert result_of(asking) == NAMES
    closing = Deferred.fromCoroutine(fixture.catalogue.close())
    assert not closing.called
    fixture.child.exits()
    assert result_of(closing) is None
    assert result_of(fixture.ask()) == NAMES


def test_closing_with_nothing_under_way_ends_at_once(fixture: Fixture) -> None:
    assert result_of(fixture.catalogue.close()) is None


def test_the_question_is_a_listener(fixture: Fixture) -> None:
    verifyObject(IAgentListener, _Question(fixture.reactor, 1.0))

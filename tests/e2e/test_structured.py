"""Answers to a JSON schema: the executor with the real CLIs, below all dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from zope.interface import implementer

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.cli.turn import Limits
from claude_proxy.errors import Failure
from claude_proxy.interfaces import ITurnObserver
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.context import RunContext, RunSettings
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.mcp import McpServers
from claude_proxy.sessions.store import Store
from claude_proxy.sessions.turns import TurnRequest
from claude_proxy.sessions.waiting import WaitingRoom
from claude_proxy.sessions.workspaces import Workspaces
from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import cli_environment
from tests.e2e.messages_api import MessagesApi
from tests.support import in_reactor

REACTOR = cast(Any, reactor)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@implementer(ITurnObserver)
class Observer:
    """Waits for the outcome."""

    def __init__(self) -> None:
        self.ended: Deferred[Outcome] = Deferred()

    def turn_planned(
        self, session_id: str | None, workspace: str | None, parameters: Mapping[str, object]
    ) -> None:
        """Only the outcome counts."""

    def turn_events(self, events: list[Event]) -> None:
        """Only the outcome counts."""

    def turn_ended(self, outcome: Outcome) -> None:
        self.ended.callback(outcome)


@asynccontextmanager
async def running_executor(
    claude: Claude, api: MessagesApi, folder: Path
) -> AsyncIterator[Executor]:
    environment = cli_environment(folder, api.url)
    settings = RunSettings(
        limits=Limits(60, 60),
        kill_timeout=5,
        line_limit=1_000_000,
        environment=environment,
        allow_skip_permissions=False,
        workspace_hooks=False,
        run_directory=folder,
        marker=folder.name,
        concurrent_turns=16,
        starts_at_once=8,
        spare_processes=0,
        live_sessions=0,
        live_idle=0,
    )
    store = Store(None, REACTOR)
    await store.open()
    context = RunContext(
        REACTOR,
        REACTOR,
        settings,
        book=SessionBook(store, adopt_unknown=True),
        waiting_room=WaitingRoom(1, 1),
        workspaces=Workspaces(folder / "base"),
        mcp=McpServers(folder / "mcp-config.json", named=False),
        probe=CliProbe(REACTOR, REACTOR, [str(claude)], environment),
        sweeper=Sweeper(REACTOR, REACTOR),
    )
    executor = Executor(context)
    try:
        yield executor
    finally:
        await executor.shut_down(30)
        await store.close()


async def ask(executor: Executor, prompt: str) -> Outcome:
    """Ask for an answer to the schema."""
    request = TurnRequest(
        content=prompt, tenant="t", request_id="r", received=0, json_schema=SCHEMA
    )
    observer = Observer()
    executor.run(request, observer)
    return await observer.ended


@in_reactor
async def test_an_answer_to_a_schema_is_in_the_result(
    claude_new: Claude, messages_api: MessagesApi, tmp_path: Path
) -> None:
    async with running_executor(claude_new, messages_api, tmp_path) as executor:
        outcome = await ask(executor, '[[text Here it is.]] [[structured {"a": 1}]]')
    assert outcome.kind is OutcomeKind.SUCCESS
    assert outcome.result is not None
    assert outcome.result.fields()["structured_output"] == {"a": 1}


@in_reactor
async def test_an_answer_that_does_not_fit_the_schema_is_asked_for_again(
    claude_new: Claude, messages_api: MessagesApi, tmp_path: Path
) -> None:
    script = '[[structured {"a": "one"}]] [[then]] [[structured {"a": 2}]]'
    async with running_executor(claude_new, messages_api, tmp_path) as executor:
        outcome = await ask(executor, script)
    assert outcome.result is not None
    assert outcome.result.fields()["structured_output"] == {"a": 2}


@in_reactor
async def test_a_model_that_never_fits_the_schema_has_failed(
    claude_new: Claude, messages_api: MessagesApi, tmp_path: Path
) -> None:
    script = " [[then]] ".join(['[[structured {"a": "one"}]]'] * 10)
    async with running_executor(claude_new, messages_api, tmp_path) as executor:
        outcome = await ask(executor, script)
    assert outcome.kind is OutcomeKind.FAILURE
    assert outcome.error is not None
    assert outcome.error.failure is Failure.UPSTREAM_ERROR
    assert "structured" in outcome.error.message


@in_reactor
async def test_an_old_cli_cannot_answer_to_a_schema(
    claude_old: Claude, messages_api: MessagesApi, tmp_path: Path
) -> None:
    async with running_executor(claude_old, messages_api, tmp_path) as executor:
        outcome = await ask(executor, '[[structured {"a": 1}]]')
    assert outcome.error is not None
    assert outcome.error.failure is Failure.INVALID_VALUE
    assert "1.0.24" in outcome.error.message

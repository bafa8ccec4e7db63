"""
A server that is told to stop in the midst of fifty turns.

Clients of every kind have half an answer, or wait for a whole one.  Some of the agent processes
end when they are asked to, some obey nothing, and some have started processes of their own that
went into the background.  The clients of the OpenAI dialect are those of the openai package.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from httpx_sse import aconnect_sse
from openai import AsyncOpenAI

from benchmarks import load_cli
from tests.e2e.chat_frames import Tap
from tests.e2e.processes import processes_with_env
from tests.integration.ship import Ship, cleared, program

EACH = (13, 13, 12, 12)
"""Streams and whole answers of the native dialect, then of OpenAI's."""

DRAIN, KILL = 1.5, 1.0
MCP = json.dumps({"mcpServers": {}})
SETTINGS = {
    "LOG_LEVEL": "info",
    "MAX_CONCURRENT_TURNS": "64",
    "DRAIN_TIMEOUT_MS": str(int(DRAIN * 1000)),
    "PROCESS_KILL_TIMEOUT_MS": str(int(KILL * 1000)),
}

# The interrupt and the end of its input have a second each, TERM has KILL, and KILL a second.
LADDER = 1.0 + 1.0 + KILL + 1.0

MARGIN = 3.0
"""Seconds for the work itself, on a machine that has other work, too."""

SENTENCE = "The server is stopping. Try again in a moment."


@dataclass
class Clients:
    """
    Those who ask, and how it ended for them.

    @ivar url: for the native dialect.
    @ivar chat_url: for OpenAI's.
    @ivar begun: how many have read a part of their answer.
    @ivar ends: the kind of client, and what it was told; so many times.
    @ivar told: when the last of them was.
    """

    url: str
    chat_url: str
    begun: int = 0
    ends: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    told: float = 0.0

    async def ask(self) -> None:
        """Have all of them ask, and wait until each has its end."""
        kinds: list[Callable[[str], Coroutine[Any, Any, tuple[Any, ...]]]] = [
            self._native_stream,
            self._native_whole,
            self._chat_stream,
            self._chat_whole,
        ]
        prompts = (_prompt(number) for number in range(sum(EACH)))
        self._openai = AsyncOpenAI(
            base_url=f"{self.chat_url}/v1", api_key="none", max_retries=0, timeout=60
        )
        async with (
            self._openai,
            httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as self._client,
            asyncio.TaskGroup() as group,
        ):
            for kind, count in zip(kinds, EACH, strict=True):
                for _ in range(count):
                    group.create_task(self._note(kind(next(prompts))))

    async def _note(self, asking: Coroutine[Any, Any, tuple[Any, ...]]) -> None:
        self.ends[await asking] += 1
        self.told = time.monotonic()

    async def _native_stream(self, prompt: str) -> tuple[Any, ...]:
        body = {"prompt": prompt, "include-partial-messages": True}
        events = []
        async with aconnect_sse(self._client, "POST", "/api/claude", json=body) as source:
            async for event in source.aiter_sse():
                events.append(event.json())
                self.begun += len(events) == 5
        last = events[-1]
        assert [event["type"] for event in events].count("result") == 1
        assert last["session_id"] == events[0]["session_id"]
        told = (last["type"], last["subtype"], last["is_error"], last["result"])
        return ("native stream", *told, last["error"]["code"])

    async def _native_whole(self, prompt: str) -> tuple[Any, ...]:
        body = {"prompt": prompt, "stream": False}
        answer = await self._client.post("/api/claude", json=body)
        error = answer.json()["error"]
        told = (answer.status_code, answer.headers["retry-after"])
        return ("native whole", *told, error["code"], error["message"])

    async def _chat_stream(self, prompt: str) -> tuple[Any, ...]:
        stream = await self._openai.chat.completions.create(
            model="claude-code", messages=[{"role": "user", "content": prompt}], stream=True
        )
        count = 0
        try:
            async for _ in stream:
                count += 1
                self.begun += count == 5
        except openai.APIError as error:
            return ("chat stream", type(error).__name__, error.code, error.message)
        return ("chat stream", "ended well")

    async def _chat_whole(self, prompt: str) -> tuple[Any, ...]:
        try:
            await self._openai.chat.completions.create(
                model="claude-code", messages=[{"role": "user", "content": prompt}]
            )
        except openai.APIStatusError as error:
            told = (error.status_code, error.response.headers["retry-after"])
            return ("chat whole", type(error).__name__, *told, error.code)
        return ("chat whole", "ended well")


def _prompt(number: int) -> str:
    """An order for an answer of some minutes; a third of its processes obey nothing."""
    order = {
        "token": f"t{number}",
        "do": "good",
        "size": 40_000,
        "pieces": 2000,
        "first": 0,
        "gap": 0.1,
        "breaks": 0,
        "stubborn": number % 3 == 0,
        "orphans": number % 5 == 0,
    }
    return json.dumps(order)


async def _stop_when_all_run(ship: Ship, clients: Clients) -> float:
    """Ask, and tell the server to stop as soon as each turn is in its midst; return when."""
    asking = asyncio.create_task(clients.ask())
    running = sum(EACH[::2])
    while clients.begun < running or ship.held()["slots"] < sum(EACH) or not _all_said(ship):
        assert not asking.done(), clients.ends
        await asyncio.sleep(0.05)
    ship.process.send_signal(signal.SIGTERM)
    stopped = time.monotonic()
    await asking
    return stopped


def _all_said(ship: Ship) -> bool:
    """Whether every agent process has taken its message."""
    sessions = ship.folder / "config" / "sessions"
    return len([path for path in sessions.iterdir() if not path.suffix]) == sum(EACH)


def test_fifty_clients_are_told_the_truth_and_nothing_is_left(tmp_path: Path) -> None:
    with (
        cleared(tmp_path),
        Ship(tmp_path, program(load_cli.__name__), SETTINGS, MCP) as ship,
        Tap(ship.url) as tap,
    ):
        clients = Clients(ship.url, tap.url)
        stopped = asyncio.run(_stop_when_all_run(ship, clients))
        assert clients.ends == {
            ("native stream", "result", "error", True, SENTENCE, "shutting_down"): EACH[0],
            ("native whole", 503, "5", "shutting_down", SENTENCE): EACH[1],
            ("chat stream", "APIError", "shutting_down", SENTENCE): EACH[2],
            ("chat whole", "InternalServerError", 503, "5", "shutting_down"): EACH[3],
        }
        tap.check()
        assert tap.checked == EACH[2] + EACH[3]
        # Nobody waits for a process to end, and no turn was cut off before the time was up.
        assert DRAIN <= clients.told - stopped < DRAIN + MARGIN
        assert ship.wait(30) == -signal.SIGTERM
        assert time.monotonic() - stopped < DRAIN + LADDER + MARGIN
        killed = ship.records("process_signal", signal="SIGKILL")
        assert len(killed) == len(range(0, sum(EACH), 3))
        assert processes_with_env(str(tmp_path)) == []
        assert ship.journal.processes == set()
        assert len(ship.journal.of("turn_end")) == sum(EACH)
        assert not any((ship.state / "run").glob("*"))
        assert list((tmp_path / "tmp").iterdir()) == []
        assert ship.records("server_stopped")
        ship.check_log({})

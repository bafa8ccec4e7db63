"""
The clients of the load run, all in one process: an event loop that notes when which bytes come.

    python -m benchmarks.load_clients PORT CLIENTS SECONDS SEED NAME RESULTS

Each client asks, waits for the end of the answer or leaves before it, judges it, pauses, and asks
again.  After so many seconds no turn is begun any more; those under way are waited for.

Beside them, some start the same CLI themselves and read its pipe, in the same loop: what an event
and a start take without the server, on a machine that is as busy.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shlex
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks import load_cli
from benchmarks.load_plan import Talk, Times, body_of, check, draw, left, new_talk, times_of
from claude_proxy.cli.control import user_message
from tests.integration.ship import PATIENCE, program, request_bytes
from tests.integration.soak_plan import Plan

__all__ = ["Report", "Told", "read_report"]

_RAMP = 8.0
"""Seconds over which the clients come: as many starts in a second as later on."""

_ANEW = 0.3
"""The share of turns that begin a conversation though another one could go on."""

_AT_ONCE, _LATER = (0.02, 0.3), (2.0, 8.0)
"""Seconds of a pause: of a program that has its next message ready, and of a person who reads."""

_PROGRAMS = 0.6

_BARE = 8
"""How many do without the server."""


@dataclass(frozen=True)
class Told:
    """
    One turn, as its client saw it.

    @ivar dialect: that of its plan, or `bare` without the server.
    @ivar end: a failure's code; `left`; empty if it ended well.
    @ivar asked: when, in nanoseconds of the monotonic clock.
    @ivar heard: when its CLI had the message; 0 if that is not known, as of whole answers.
    @ivar first: nanoseconds between the writing and the reading of the first piece.
    @ivar latencies: the same for each piece of a stream.
    """

    token: str
    dialect: str
    end: str
    asked: int
    heard: int = 0
    first: int = 0
    latencies: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """
    What the clients have seen.

    @ivar turns: all that were asked for.
    @ivar wrong: what was wrong, in words.
    @ivar most: how many were waiting for an answer, or reading one, at the same time.
    @ivar busy: the longest that the event loop was kept from reading, in nanoseconds.
    """

    turns: list[Told]
    wrong: list[str]
    most: int
    busy: int


def read_report(path: Path) -> Report:
    """What was written down."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Report(**{**found, "turns": [Told(**turn) for turn in found["turns"]]})


class _Answer(asyncio.SubprocessProtocol, asyncio.Protocol):
    """What comes in on a connection, or out of a process, and when."""

    def __init__(self) -> None:
        self.received: list[tuple[int, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.received.append((time.monotonic_ns(), data))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self.data_received(data)
            if b'"type": "result"' in data:
                self._finish()

    def connection_lost(self, _: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.received)


class _Clients:
    """All of them."""

    def __init__(self, port: int, end: float, seed: int, name: str, folder: Path) -> None:
        self.turns: list[Told] = []
        self.wrong: list[str] = []
        self.most = self.busy = 0
        self._port = port
        self._end = end
        self._seed = seed
        self._name = name
        self._folder = folder
        self._under_way = 0
        self._numbers = count(1)

    async def client(self, number: int) -> None:
        """One client."""
        chance = self._chance(number)
        talk = None
        await asyncio.sleep(chance.uniform(0, _RAMP))
        while time.monotonic() < self._end and len(self.wrong) < 10:
            if talk is None or not talk.goes_on or chance.random() < _ANEW:
                talk = new_talk(chance, next(self._numbers))
            # A number of its own for each: what a turn costs follows from it.
            plan = draw(chance, talk, f"t{self._name}{next(self._numbers)}")
            try:
                self.turns.append(await self._turn(plan, talk))
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                self._complain(plan, error)
                talk = None
            pause = _AT_ONCE if chance.random() < _PROGRAMS else _LATER
            await asyncio.sleep(chance.uniform(*pause))

    def _chance(self, number: int) -> random.Random:
        seed = f"{self._seed} {self._name} {number}"
        return random.Random(seed)  # noqa: S311 - to be repeated, not to be secret

    async def bare(self, number: int) -> None:
        """One that does without the server."""
        chance = self._chance(-number)
        await asyncio.sleep(chance.uniform(0, _RAMP))
        while time.monotonic() < self._end:
            talk = Talk(is_chat=False, number=0, fields={})
            plan = draw(chance, talk, f"t{self._name}{next(self._numbers)}")
            if plan.act == "" and not plan.order["fails"]:
                self.turns.append(await self._bare_turn(plan))

    async def _bare_turn(self, plan: Plan) -> Told:
        environment = {
            "PATH": os.environ["PATH"],
            "CLAUDE_CONFIG_DIR": str(self._folder / "bare"),
        }
        argv = [*shlex.split(program(load_cli.__name__)), f"--session-id={uuid4()}"]
        asked = time.monotonic_ns()
        transport, answer = await asyncio.get_running_loop().subprocess_exec(
            _Answer, *argv, env=environment
        )
        stdin: Any = transport.get_pipe_transport(0)
        stdin.write(user_message(plan.prompt, plan.token))
        await asyncio.wait_for(answer.over, PATIENCE)
        transport.close()
        times = times_of(answer.received)
        assert times is not None, answer.data
        return _told(plan.token, "bare", "", asked, times)

    async def _turn(self, plan: Plan, talk: Talk) -> Told:
        talk.turns += 1
        path = "/v1/chat/completions" if plan.is_chat else "/api/claude"
        request = request_bytes(body_of(plan, talk), plan.token, path=path)
        loop = asyncio.get_running_loop()
        transport, answer = await loop.create_connection(_Answer, "127.0.0.1", self._port)
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            asked = time.monotonic_ns()
            transport.write(request)
            if plan.act == "leave":
                await self._leave(plan, talk, transport, answer)
                return Told(plan.token, plan.dialect, "left", asked)
            await asyncio.wait_for(answer.over, PATIENCE)
        finally:
            self._under_way -= 1
            transport.abort()
        begin = time.monotonic_ns()
        told = self._judge(plan, talk, answer, asked)
        self.busy = max(self.busy, time.monotonic_ns() - begin)
        return told

    @staticmethod
    async def _leave(plan: Plan, talk: Talk, transport: asyncio.Transport, answer: _Answer) -> None:
        """At any moment: before the answer or within it."""
        chance = plan.chance
        await asyncio.sleep(chance.choice([0.01, 0.1, chance.uniform(0, 1), chance.uniform(0, 4)]))
        left(plan, talk, answer.data)
        if chance.random() < 0.5:
            transport.close()
            await answer.over

    def _judge(self, plan: Plan, talk: Talk, answer: _Answer, asked: int) -> Told:
        code = check(plan, talk, answer.data)
        times = times_of(answer.received) if plan.dialect in ("partials", "chats") else None
        return _told(plan.token, plan.dialect, code, asked, times)

    def _complain(self, plan: Plan, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        what = (plan.order["do"], plan.order["fails"], plan.dialect, plan.act)
        self.wrong.append(f"{plan.token} {what}: {error!r} at {frames[-1].name}: {frames[-1].line}")


def _told(token: str, dialect: str, end: str, asked: int, times: Times | None) -> Told:
    if times is None:
        return Told(token, dialect, end, asked)
    latencies = [read - written for written, read in zip(times.written, times.read, strict=True)]
    return Told(token, dialect, end, asked, times.heard, latencies[0], latencies)


async def _run(crew: _Clients, clients: int) -> Report:
    bare = [crew.bare(number) for number in range(1, _BARE + 1)]
    await asyncio.gather(*bare, *(crew.client(number) for number in range(clients)))
    return Report(crew.turns, crew.wrong, crew.most, crew.busy)


def main() -> None:
    """Be the clients."""
    port, clients, seconds, seed, name, path = sys.argv[1:]
    gc.freeze()
    gc.set_threshold(100_000)
    end = time.monotonic() + float(seconds)
    crew = _Clients(int(port), end, int(seed), name, Path(path).parent)
    report = asyncio.run(_run(crew, int(clients)))
    Path(path).write_text(json.dumps(asdict(report)), encoding="utf-8")


if __name__ == "__main__":
    main()

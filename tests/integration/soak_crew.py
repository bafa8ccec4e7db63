"""
The clients of the soak in soak.py: conversations in both dialects, and what is done to them.
"""

from __future__ import annotations

import random
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tests.e2e.processes import wait_until
from tests.integration.ship import PATIENCE, Ship, read_for, request_bytes, reset
from tests.integration.soak_plan import INHERITED, Fields, Plan, judge
from tests.integration.storm_plan import Entry
from tests.support import Answer

__all__ = ["Crew"]


@dataclass
class Voyage:
    """
    A conversation, as its client knows it.

    @ivar session: its session, if there is one that was not deleted.
    @ivar last: the last session that it had.
    @ivar messages: its history, in the OpenAI dialect.
    @ivar tokens: those of the user's messages in it.
    @ivar remembered: the fields of its last turn, if the next one surely finds them in its session.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    session: str | None = None
    last: str | None = None
    messages: list[Fields] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    remembered: Fields | None = None


class Crew:
    """
    The clients of one soak.

    @ivar plans: all turns so far, by their tokens.
    @ivar deleted: sessions that were deleted.
    @ivar killed: processes that were sent a signal.
    @ivar edition: what stands in the instructions of the shared workspace.
    """

    def __init__(self, ship: Ship) -> None:
        self.entries: list[Entry] = []
        self.plans: dict[str, Plan] = {}
        self.deleted: set[str] = set()
        self.killed: set[int] = set()
        self.edition = ""
        self.done: Counter[str] = Counter()
        self._ship = ship
        self._voyages: dict[int, Voyage] = {}
        self._acts = {
            "delete": self._delete_turn,
            "early_kill": self._kill_turn,
            "interrupt": self._interrupt_turn,
            "kill": self._kill_turn,
            "spare_kill": self._kill_spares,
        }

    def attempt(self, plan: Plan) -> str:
        """Perform one turn; say what was wrong with it."""
        voyage = self._voyages.setdefault(plan.voyage, Voyage())
        try:
            with voyage.lock:
                self._before(plan, voyage)
                if plan.beside is None:
                    self._sail(plan, voyage)
                else:
                    self._sail_together(plan, plan.beside, voyage)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            what = (plan.order["do"], plan.dialect, plan.act, plan.before)
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{plan.token} {what}: {error!r} at line {place.lineno}, {place.line}"
        return ""

    def _sail_together(self, one: Plan, other: Plan, voyage: Voyage) -> None:
        """Two turns in the same session at the same time, or two new ones."""
        other = replace(other, fields=one.fields)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._sail, other, replace(voyage))
            self._sail(one, voyage)
            asked.result()
        self.done["meetings"] += 1

    def _sail(self, plan: Plan, voyage: Voyage) -> None:
        """Perform one turn and judge what comes of it."""
        self.plans[plan.token] = plan
        fork = plan.fork and voyage.session is not None
        entry = Entry(
            plan.token,
            session=None if fork or plan.is_chat else voyage.session,
            source=voyage.last if fork or plan.is_chat else None,
            started=time.monotonic(),
        )
        self.entries.append(entry)
        inherits = plan.is_chat and plan.inherits and voyage.remembered is not None
        fields = plan.fields
        if inherits and voyage.remembered is not None:
            old = voyage.remembered
            fields = {**fields, **{name: old.get(name) for name in INHERITED}}
            self.done["inherited"] += 1
        if plan.is_chat:
            body = plan.chat(voyage.messages, inherits=inherits)
        else:
            body = plan.native(voyage.session)
        path = "/v1/chat/completions" if plan.is_chat else "/api/claude"
        voyage.remembered = None
        try:
            answer = self._send(plan, request_bytes(body, plan.token, path=path))
        finally:
            entry.ended = time.monotonic()
        if isinstance(answer, Answer):
            session = answer.headers.get("x-claude-session-id")
            if session is not None and session not in self.deleted:
                self._learn(entry, voyage, session)
            self._judge(plan, voyage, entry, answer, fields)
        elif answer is not None and not plan.is_chat:
            self._learn(entry, voyage, answer)
        if voyage.session in self.deleted:
            voyage.session = None

    @staticmethod
    def _learn(entry: Entry, voyage: Voyage, session: str) -> None:
        assert entry.session in (None, session), "another session has answered"
        entry.session = voyage.session = voyage.last = session

    def _judge(
        self, plan: Plan, voyage: Voyage, entry: Entry, answer: Answer, fields: Fields
    ) -> None:
        verdict = judge(plan, answer, fields)
        self.done[f"{plan.order['do']} {plan.act} {verdict.code or 'success'}"] += 1
        is_well = verdict.code in ("", "limit")
        entry.begun = is_well or plan.order["do"] == "wait"
        if plan.order["do"] == "command":
            entry.begun = False  # the CLI does not remember it
        if not verdict.text:
            return
        entry.told = verdict.head["told"]
        self._check_reading(verdict.head)
        if plan.is_chat:
            voyage.tokens = [*voyage.tokens, plan.token]
            assert entry.told == voyage.tokens, (entry.told, voyage.tokens)
            said = [("user", plan.prompt), ("assistant", verdict.text)]
            voyage.messages += [{"role": role, "content": text} for role, text in said]
            voyage.remembered = fields

    def _check_reading(self, head: Mapping[str, Any]) -> None:
        """A process that began with this turn knows what there was to read then."""
        if head["force"]["place"] == "shared_workspace":
            assert head["read"] <= self.edition
            assert head["turn"] > 1 or head["read"] == self.edition, "it has read what is old"

    # What happens before a turn.

    def _before(self, plan: Plan, voyage: Voyage) -> None:
        if plan.before == "kill" and voyage.session is not None:
            starts = self._ship.records("turn_start", session_id=voyage.session)
            if starts:
                self._kill(starts[-1]["pid"], plan.number)
            time.sleep(plan.chance.choice([0, 0, 0.001, 0.003, 0.05]))
        elif plan.before == "delete" and voyage.session is not None:
            self._delete(voyage.session)
            voyage.session = voyage.remembered = None
        elif plan.before == "ghost" and voyage.session is None and voyage.last is not None:
            if voyage.last in self.deleted:
                self.check_ghost(voyage.last)
        elif plan.before == "rewind" and len(voyage.tokens) > 1:
            kept = plan.chance.randrange(len(voyage.tokens))
            voyage.tokens, voyage.messages = voyage.tokens[:kept], voyage.messages[: 2 * kept]
            voyage.remembered = None
            self.done["rewound"] += 1

    def check_ghost(self, session: str) -> None:
        """A session that was deleted is none."""
        body = {"prompt": "Are you there?", "session-id": session}
        answer = self._ship.ask(request_bytes(body, f"ghost-{session}"))
        assert (answer.status, answer.error["code"]) == (404, "session_not_found"), answer
        self.done["ghosts"] += 1

    # What happens in the midst of one.

    def _send(self, plan: Plan, request: bytes) -> Answer | str | None:
        """The answer; of a client that leaves, the session's id if it has seen that."""
        if plan.act == "leave":
            return self._leave(plan, request)
        if not plan.act:
            return self._ship.ask(request)
        with ThreadPoolExecutor(1) as pool:
            acted = pool.submit(self._acts[plan.act], plan)
            answer = self._ship.ask(request)
            acted.result()
        return answer

    def _leave(self, plan: Plan, request: bytes) -> str | None:
        with self._ship.connect() as client:
            client.sendall(request)
            received = read_for(client, plan.chance.choice([0, 0.01, 0.03, 0.1, 0.3]))
            if plan.chance.random() < 0.5:
                reset(client)
        self.done["left"] += 1
        head = re.search(rb"X-Claude-Session-Id: (\S+)\r\n", received, re.IGNORECASE)
        return head[1].decode() if head is not None else None

    def _wait_for_turn(self, plan: Plan) -> dict[str, Any]:
        """Wait until the turn is where it is to be acted on; its last start."""
        self._ship.journal.wait_for("turn_start", plan.token)
        if plan.order["do"] == "wait":
            mark = self._ship.folder / "config" / "sessions" / f"begun.{plan.token}"
            wait_until(mark.exists, f"{plan.token} has begun", PATIENCE)
        else:
            time.sleep(plan.chance.choice([0, plan.chance.uniform(0, 0.15)]))
        return self._ship.records("turn_start", request_id=plan.token)[-1]

    def _interrupt_turn(self, plan: Plan) -> None:
        session = self._wait_for_turn(plan)["session_id"]
        path = f"/api/sessions/{session}/interrupt"
        answer = self._ship.ask(request_bytes(b"", f"stop-{plan.token}", path=path))
        assert answer.status == 200, answer
        assert answer.json["interrupted"] or plan.order["do"] != "wait", answer
        self.done["interrupts"] += answer.json["interrupted"]

    def _delete_turn(self, plan: Plan) -> None:
        self._delete(self._wait_for_turn(plan)["session_id"])

    def _delete(self, session: str) -> None:
        path = f"/api/sessions/{session}"
        answer = self._ship.ask(request_bytes(b"", "x", method="DELETE", path=path))
        assert answer.status == 200, answer
        self.deleted.add(session)
        self.done["deletes"] += 1

    def _kill_turn(self, plan: Plan) -> None:
        self._kill(self._wait_for_turn(plan)["pid"], plan.number)

    def _kill_spares(self, plan: Plan) -> None:
        time.sleep(plan.chance.uniform(0, 0.006))
        for pid in self.spares():
            self._kill(pid, plan.number)

    def spares(self) -> set[int]:
        """The processes that were started ahead and wait."""
        started = {record["pid"] for record in self._ship.journal.of("spare_started")}
        used = {record["pid"] for record in self._ship.journal.of("turn_start")}
        return (started - used) & self._ship.journal.processes

    def kill_some(self, pids: set[int], chance: random.Random) -> None:
        """Kill some of those that wait."""
        for pid in sorted(pids):
            if chance.random() < 0.7:
                self._kill(pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))

    def _kill(self, pid: int, number: signal.Signals) -> None:
        self.killed.add(pid)
        self._ship.signal_child(pid, number)

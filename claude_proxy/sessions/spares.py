"""
Spares: agent processes that are started ahead of need, for new sessions.

A new session whose process has been started already saves the CLI's start.  Spares are started when
nothing else is to be done, for what was asked for last, one after the other.  One that would not
know what a new process knows is never used.

A failure here is no failure of anybody's turn: that starts a process of its own then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum, auto

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure as TwistedFailure
from zope.interface import implementer

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending
from claude_proxy.errors import ProxyError
from claude_proxy.interfaces import IAgentListener
from claude_proxy.sessions.deferreds import branch
from claude_proxy.sessions.pool import Agent, Setup

__all__ = ["REST", "RETRY", "Spares"]

REST = 1.0
"""Seconds without a turn before a spare is started, and between two starts."""

RETRY = 60.0
"""Seconds without another start for a setup whose spare has failed."""

_FEWEST_USES = 4
"""Of how many turns the setups count as in use, at least; otherwise twice the number of spares."""


class _State(Enum):
    """Where a spare stands."""

    STARTING = auto()
    DOOMED = auto()
    """Still starting, and not wanted any more."""
    WAITING = auto()
    CLAIMED = auto()
    """Somebody wants it, and what it has read is being compared."""
    TAKEN = auto()
    LEAVING = auto()
    GONE = auto()


class _Input(Enum):
    """What happens to a spare."""

    STARTED = auto()
    FAILED = auto()
    """No process has come of it."""
    CLAIM = auto()
    TAKE = auto()
    PUT_BACK = auto()
    UNWANTED = auto()
    ENDED = auto()
    """Its process ended by itself."""
    CLEARED = auto()
    """Its process is gone, and what it left is removed."""


class _Action(Enum):
    """What is to be done."""

    NOTHING = auto()
    END = auto()
    """Let the process leave, and see it off."""
    SEE_OFF = auto()
    """Remove what a process leaves that ended by itself."""
    FORGET = auto()


_TO_LEAVING = (_State.LEAVING, _Action.END)
_LOST = (_State.LEAVING, _Action.SEE_OFF)
_TO_GONE = (_State.GONE, _Action.FORGET)

# Whatever pair of state and input is not in the table changes nothing.
_TABLE: dict[tuple[_State, _Input], tuple[_State, _Action]] = {
    (_State.STARTING, _Input.STARTED): (_State.WAITING, _Action.NOTHING),
    (_State.STARTING, _Input.FAILED): _TO_GONE,
    (_State.STARTING, _Input.UNWANTED): (_State.DOOMED, _Action.NOTHING),
    (_State.DOOMED, _Input.STARTED): _TO_LEAVING,
    (_State.DOOMED, _Input.FAILED): _TO_GONE,
    (_State.WAITING, _Input.CLAIM): (_State.CLAIMED, _Action.NOTHING),
    (_State.WAITING, _Input.UNWANTED): _TO_LEAVING,
    (_State.WAITING, _Input.ENDED): _LOST,
    (_State.CLAIMED, _Input.TAKE): (_State.TAKEN, _Action.FORGET),
    (_State.CLAIMED, _Input.PUT_BACK): (_State.WAITING, _Action.NOTHING),
    (_State.CLAIMED, _Input.UNWANTED): _TO_LEAVING,
    (_State.CLAIMED, _Input.ENDED): _LOST,
    (_State.LEAVING, _Input.CLEARED): _TO_GONE,
}


@implementer(IAgentListener)
class _Spare:
    """One of them, from the decision to start it to its end."""

    def __init__(self, setup: Setup, session: str, stamp: object) -> None:
        self.setup = setup
        self.session = session
        self.stamp = stamp
        self.state = _State.STARTING
        self.agent: Agent | None = None
        self.ended: Callable[[_Spare, str], None] = lambda _spare, _ending: None

    def events_received(self, events: list[Event]) -> None:
        """Before its first message it has nothing to say that concerns anybody."""

    def agent_ended(self, ending: Ending) -> None:
        self.ended(self, ending.describe())

    def step(self, happened: _Input) -> _Action:
        self.state, action = _TABLE.get((self.state, happened), (self.state, _Action.NOTHING))
        return action


class Spares:
    """The spares of the server."""

    _log = Logger(namespace="claude_proxy.sessions")

    def __init__(
        self,
        clock: IReactorTime,
        *,
        count: int,
        start: Callable[[Setup, str], Awaitable[Agent]],
        gone: Callable[[Agent], Awaitable[None]],
        stamp: Callable[[Setup], Awaitable[object]],
        room: Callable[[], int],
        is_busy: Callable[[], bool],
        make_id: Callable[[], str],
    ) -> None:
        """
        @param count: how many there are at most.
        @param room: how many there may be beside the processes that run turns or wait for them.
        @param start: starts a process for a new session of this id.
        @param gone: called when one that nobody took is gone: removes what it leaves behind.
        @param stamp: what tells the present state of all that a process reads at its start; None if
            that is not known, and then there are no spares.
        @param is_busy: whether a turn is under way.
        @param make_id: makes ids of sessions.
        """
        self._clock = clock
        self._count, self._room = count, room
        self._is_busy, self._make_id = is_busy, make_id
        self._start, self._gone, self._stamp = start, gone, stamp
        self._uses: deque[Setup] = deque(maxlen=max(_FEWEST_USES, 2 * count))
        self._spares: list[_Spare] = []  # oldest first
        self._failed: dict[Setup, float] = {}
        self._rest_timer: IDelayedCall | None = None
        self._filling: Deferred[None] | None = None
        self._leaving: dict[_Spare, Deferred[None]] = {}
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many processes wait."""
        return sum(spare.state in (_State.WAITING, _State.CLAIMED) for spare in self._spares)

    def used(self, setup: Setup) -> None:
        """A turn has begun with this setup: now nothing is started, and later, what it needs."""
        self._pause()
        if self._count == 0 or self._closed:
            return
        self._uses.append(setup)
        for other in set(self._uses) | {spare.setup for spare in self._spares}:
            if _is_older(other, setup):
                self._discard(other)

    async def take(self, setup: Setup) -> Agent | None:
        """
        A spare that is as good as a process that is started now, for the caller to own.

        Its session is that of its `cli_session`.  It may still be starting: what is written to it
        is read when it is up.
        """
        while (spare := self._find(setup)) is not None:
            self._happened(spare, _Input.CLAIM)
            try:
                is_fresh = await self._is_fresh(spare)
            except CancelledError:
                self._happened(spare, _Input.PUT_BACK)
                raise
            if not is_fresh:
                self._end(spare, "what it has read is old")
            self._happened(spare, _Input.TAKE)
            if spare.state is _State.TAKEN:
                self._failed.pop(setup, None)
                break
        return None if spare is None else spare.agent

    def rested(self) -> None:
        """Nothing is to be done any more: what is missing is started a little later."""
        self._stop_timer()
        if self._count > 0 and not self._closed:
            self._rest_timer = self._clock.callLater(REST, self._rest_over)

    def make_room(self, most: int = 0) -> None:
        """End the oldest, until no more than this number is left; others come after a rest."""
        self._pause()
        kept = self._kept()
        for spare in kept[: max(len(kept) - most, 0)]:
            self._end(spare, "its room is needed")

    def drop_where(self, is_outdated: Callable[[Setup], bool]) -> None:
        """End those with such a setup, and start none like them."""
        for setup in {*self._uses, *(spare.setup for spare in self._spares)}:
            if is_outdated(setup):
                self._discard(setup)

    def drop(self, reason: str) -> None:
        """End all; others come after the next turns, for what those use."""
        self._pause()
        self._uses.clear()
        self._failed.clear()
        for spare in self._kept():
            self._end(spare, reason)

    async def close(self) -> None:
        """Start no more, end all, and wait until they are gone."""
        self._closed = True
        self.drop("the server stops")
        if self._filling is not None:
            await branch(self._filling)
        await DeferredList([branch(leaving) for leaving in self._leaving.values()])

    # What is started, and when.

    def _pause(self) -> None:
        self._stop_timer()
        if self._filling is not None:
            self._filling.cancel()

    def _stop_timer(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        self._rest_timer = None

    def _rest_over(self) -> None:
        self._rest_timer = None
        if self._filling is not None:
            self.rested()  # what was broken off is not over yet
        elif not self._is_busy():
            filling = self._filling = Deferred.fromCoroutine(self._fill())
            filling.addCallbacks(self._filled, self._not_filled)

    def _not_filled(self, failure: TwistedFailure) -> None:
        self._filling = None
        if not isinstance(failure.value, CancelledError):
            self._log.failure("spares were not started", failure, type="internal_error")

    def _filled(self, _: None) -> None:
        self._filling = None
        if self._next() is not None and not self._is_busy():
            self.rested()

    async def _fill(self) -> None:
        """End what is out of use or old, and start one that is missing."""
        for spare in self._kept():
            if spare.setup not in self._uses:
                self._end(spare, "others were used more recently")
            elif not await self._is_fresh(spare):
                self._end(spare, "what it has read is old")
        setup = self._next()
        if setup is not None:
            try:
                await self._start_one(setup)
            except CancelledError:
                raise
            except ProxyError as error:
                self._has_failed(setup, error.message)
            except Exception:
                self._has_failed(setup, "there is a fault in this server")
                raise

    async def _start_one(self, setup: Setup) -> None:
        stamp = await self._stamp(setup)
        if stamp is None:
            self._has_failed(setup, "the CLI reads more at its start than can be looked after")
        elif not self._is_busy():
            spare = _Spare(setup, self._make_id(), stamp)
            self._spares.append(spare)
            try:
                self._started(spare, await self._start(setup, spare.session))
            finally:
                self._happened(spare, _Input.FAILED)  # does nothing to one that has started

    def _started(self, spare: _Spare, agent: Agent) -> None:
        agent.cli_session = spare.session
        spare.agent = agent
        spare.ended = self._has_ended
        agent.process.attach(spare)
        self._log.info(
            "a spare agent process was started",
            type="spare_started",
            pid=agent.process.pid,
        )
        self._happened(spare, _Input.STARTED)
        if agent.process.ended:
            self._has_ended(spare, "at once")

    def _next(self) -> Setup | None:
        """The setup that the next spare is for: that with the fewest, of those the latest."""
        kept = [spare.setup for spare in self._kept()]
        now = self._clock.seconds()
        setups = [
            setup
            for setup in dict.fromkeys(reversed(self._uses))
            if setup not in self._failed or now - self._failed[setup] >= RETRY
        ]
        if len(kept) >= min(self._count, self._room()) or not setups:
            return None
        return min(setups, key=kept.count)

    async def _is_fresh(self, spare: _Spare) -> bool:
        try:
            return bool(await self._stamp(spare.setup) == spare.stamp)
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001 - a spare is never worth a turn
            self._log.failure("a spare could not be checked", type="internal_error")
            return False

    # What becomes of one.

    def _kept(self) -> list[_Spare]:
        """Those that take room and may be used."""
        states = (_State.STARTING, _State.WAITING, _State.CLAIMED)
        return [spare for spare in self._spares if spare.state in states]

    def _find(self, setup: Setup) -> _Spare | None:
        """The oldest that waits for a turn with this setup."""
        waiting = (spare for spare in self._spares if spare.state is _State.WAITING)
        return next((spare for spare in waiting if spare.setup == setup), None)

    def _discard(self, setup: Setup) -> None:
        """Forget a setup that nobody can ask for any more."""
        while setup in self._uses:
            self._uses.remove(setup)
        self._failed.pop(setup, None)
        for spare in self._kept():
            if spare.setup == setup:
                self._end(spare, "the CLI or its MCP servers have changed")

    def _end(self, spare: _Spare, reason: str) -> None:
        if spare.agent is not None and spare.state in (_State.WAITING, _State.CLAIMED):
            self._log.info(
                "a spare is no longer kept: {reason}",
                type="spare_dropped",
                reason=reason,
                pid=spare.agent.process.pid,
            )
        self._happened(spare, _Input.UNWANTED)

    def _has_ended(self, spare: _Spare, ending: str) -> None:
        if spare.state in (_State.WAITING, _State.CLAIMED):
            self._has_failed(spare.setup, f"its process ended by itself ({ending})")
        self._happened(spare, _Input.ENDED)

    def _has_failed(self, setup: Setup, reason: str) -> None:
        is_new = setup not in self._failed
        self._failed = {known: when for known, when in self._failed.items() if known in self._uses}
        self._failed[setup] = self._clock.seconds()
        if is_new:
            self._log.warn(
                "a spare failed: {reason}; new sessions wait for the CLI's start",
                type="spare_failed",
                reason=reason,
            )

    def _happened(self, spare: _Spare, happened: _Input) -> None:
        action = spare.step(happened)
        if action is _Action.FORGET:
            self._spares.remove(spare)
        elif action is not _Action.NOTHING and spare.agent is not None:
            leaving = self._leaving[spare] = Deferred()
            leaving.addCallback(self._left, spare)
            if action is _Action.END:
                spare.agent.process.finish()
            Deferred.fromCoroutine(self._bury(spare.agent)).chainDeferred(leaving)

    async def _bury(self, agent: Agent) -> None:
        await agent.process.when_gone()
        try:
            await self._gone(agent)
        except Exception:  # noqa: BLE001 - it must not keep the server from stopping
            self._log.failure("what an agent left was not removed", type="internal_error")

    def _left(self, _: None, spare: _Spare) -> None:
        del self._leaving[spare]
        self._happened(spare, _Input.CLEARED)


def _is_older(known: Setup, new: Setup) -> bool:
    """Whether a setup is of a CLI or an MCP configuration that was there before this one's."""
    is_mcp_older = 0 not in (known.mcp, new.mcp) and known.mcp != new.mcp
    return known.cli != new.cli or is_mcp_older

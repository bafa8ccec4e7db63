"""Running turns: knows which are under way, and how to stop taking more."""

from __future__ import annotations

from twisted.internet.defer import Deferred, DeferredList
from zope.interface import implementer

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ISessionControl, ITurnObserver
from claude_proxy.sessions.agents import make_spares
from claude_proxy.sessions.context import COME_BACK, RunContext
from claude_proxy.sessions.deferreds import branch
from claude_proxy.sessions.pool import Setup
from claude_proxy.sessions.run import Run
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["Executor"]


@implementer(ISessionControl)
class Executor:
    """
    Runs turns.

    @ivar context: what they share.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self._runs: dict[Run, Deferred[None]] = {}
        self._closed = False
        self._drained: Deferred[None] | None = None
        context.spares = make_spares(context, lambda: bool(self._runs))

    @property
    def running(self) -> int:
        """How many turns are under way, the waiting ones included."""
        return len(self._runs)

    def run(self, request: TurnRequest, observer: ITurnObserver) -> IRunningTurn:
        """
        Start a turn.  The observer is told everything else; also why, if it cannot be started.

        @raise ProxyError: SHUTTING_DOWN.
        """
        if self._closed:
            raise ProxyError(Failure.SHUTTING_DOWN, retry_after=COME_BACK)
        run = Run(self.context, request, observer)
        work = self._runs[run] = Deferred()
        work.addCallback(self._forget, run)
        run.start().chainDeferred(work)
        return run

    def _forget(self, _: None, run: Run) -> None:
        del self._runs[run]
        if not self._runs and not self._closed:
            self.context.spares.rested()

    # What its owner may ask of a session.

    def state(self, session_id: str) -> str:
        if self._runs_on(session_id):
            return "running"
        return "live" if session_id in self.context.pool else "idle"

    def interrupt(self, session_id: str) -> Deferred[bool]:
        asked = [run.interrupt() for run in self._runs_on(session_id)]
        some: Deferred[bool] = DeferredList(asked).addCallback(
            lambda results: any(interrupted for _, interrupted in results)
        )
        return some

    def end(self, session_id: str, reason: ProxyError) -> Deferred[None]:
        return Deferred.fromCoroutine(self._end(session_id, reason))

    async def _end(self, session_id: str, reason: ProxyError) -> None:
        runs = self._runs_on(session_id)
        for run in runs:
            run.stop(reason)
        await DeferredList([branch(self._runs[run]) for run in runs if run in self._runs])
        await self.context.pool.end(session_id)

    def _runs_on(self, session_id: str) -> list[Run]:
        return [run for run in self._runs if run.is_on(session_id)]

    def mcp_changed(self) -> None:
        """The MCP configuration was read anew: what has the old one is of no use any more."""
        current = self.context.mcp.generation

        def is_outdated(setup: Setup) -> bool:
            return setup.mcp not in (0, current)

        self.context.pool.drop_where(is_outdated, "the MCP configuration was read again")
        self.context.spares.drop_where(is_outdated)

    async def shut_down(self, drain: float) -> None:
        """
        Take no more turns, give the running ones `drain` seconds, then end them truthfully.

        Returns when their processes are gone and what they left behind is swept.
        """
        self._closed = True
        everything = DeferredList([branch(work) for work in self._runs.values()])
        drained: Deferred[None] = Deferred()
        self._drained = drained
        drain_timer = self.context.clock.callLater(drain, self.hurry)
        everything.addCallback(lambda _: self.hurry())
        await drained
        if drain_timer.active():
            drain_timer.cancel()
        for run in list(self._runs):
            run.stop(ProxyError(Failure.SHUTTING_DOWN, retry_after=COME_BACK))
        await DeferredList([branch(work) for work in self._runs.values()])
        await self.context.spares.close()
        await self.context.pool.close()
        await self.context.sweeper.finish()

    def hurry(self) -> None:
        """Wait no longer for running turns to finish by themselves."""
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)

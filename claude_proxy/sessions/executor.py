"""Running turns: knows which are under way, and how to stop taking more."""

from __future__ import annotations

from twisted.internet.defer import Deferred, DeferredList

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IRunningTurn, ITurnObserver
from claude_proxy.sessions.context import COME_BACK, RunContext
from claude_proxy.sessions.run import Run
from claude_proxy.sessions.turns import TurnRequest

__all__ = ["Executor"]


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

    async def shut_down(self, drain: float) -> None:
        """
        Take no more turns, give the running ones `drain` seconds, then end them truthfully.

        Returns when their processes are gone and what they left behind is swept.
        """
        self._closed = True
        everything = DeferredList([_branch(work) for work in self._runs.values()])
        drained: Deferred[None] = Deferred()
        self._drained = drained
        drain_timer = self.context.clock.callLater(drain, self.hurry)
        everything.addCallback(lambda _: self.hurry())
        await drained
        if drain_timer.active():
            drain_timer.cancel()
        for run in list(self._runs):
            run.stop(ProxyError(Failure.SHUTTING_DOWN, retry_after=COME_BACK))
        await DeferredList([_branch(work) for work in self._runs.values()])
        await self.context.sweeper.finish()

    def hurry(self) -> None:
        """Wait no longer for running turns to finish by themselves."""
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)


def _branch(work: Deferred[None]) -> Deferred[None]:
    """A Deferred that fires when `work` has, without touching its result."""
    branch: Deferred[None] = Deferred()

    def fired(result: None) -> None:
        branch.callback(None)
        return result

    work.addBoth(fired)
    return branch

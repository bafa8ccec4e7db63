"""
The models that the CLI itself names.

They stand in its answer to ``initialize``.  Any turn's answer will do; if nobody has run a turn
yet, a process is started for the question alone, without a session and without a message, so that
no model is asked.  The names are remembered as long as the CLI's version stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorProcess, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from claude_proxy.cli import command
from claude_proxy.cli.control import ControlAnswer
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.process import AgentProcess
from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import ProxyError
from claude_proxy.interfaces import IAgentListener

__all__ = ["ModelCatalogue"]

_LIMIT = 10.0
"""Seconds that the answer may take (1.0.128 needs about one)."""

_PATIENCE = 60.0
"""Seconds after a failure before the CLI is asked again."""

_LINE_LIMIT = 4 * 1024 * 1024
"""Longest line accepted, in bytes; the answer has some ten thousand."""

_DEFAULT = "default"
"""The CLI's own word for its default model, which clients know by another name."""

_NAMES_KEPT = 200
_LONGEST_NAME = 256


@implementer(IAgentListener)
class _Question:
    """
    One process that is asked for its models.

    @ivar done: fires with the answer, or with words about why there is none; never fails.
    """

    def __init__(self, clock: IReactorTime, kill_timeout: float) -> None:
        self.done: Deferred[ControlAnswer | str] = Deferred()
        self.agent = AgentProcess(
            clock,
            self,
            has_control=True,
            kill_timeout=kill_timeout,
            line_limit=_LINE_LIMIT,
            log_context={},
            purpose="models",
        )
        self._clock = clock
        self._timer: IDelayedCall | None = None

    def ask(self) -> None:
        """Send the request; its process has been started."""
        self._timer = self._clock.callLater(_LIMIT, self._took_too_long)
        self.agent.request("initialize", answered=self._settle)

    def _settle(self, what: ControlAnswer | str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.done.called:
            self.done.callback(what)
        # Nothing was begun in it: without stdin it leaves by itself.
        self.agent.finish()

    def _took_too_long(self) -> None:
        self._timer = None
        self._settle(f"no answer within {_LIMIT:g} seconds")

    def events_received(self, events: list[Event]) -> None:
        """Nothing that it says without being asked matters here."""

    def agent_ended(self, ending: Ending) -> None:
        said = f" ({ending.stderr})" if ending.stderr else ""
        self._settle(f"it ended: {ending.describe()}{said}")


class ModelCatalogue:
    """Knows the names of the CLI's models, and asks for them where need be."""

    _log = Logger(namespace="claude_proxy.cli")

    def __init__(
        self,
        reactor: IReactorProcess,
        clock: IReactorTime,
        probe: CliProbe,
        *,
        environment: Mapping[str, str],
        directory: str,
        kill_timeout: float,
        next_marker: Callable[[], str],
        sweep: Callable[[str], None],
    ) -> None:
        """
        @param environment: what agent processes see, before our marker.
        @param directory: an absolute directory in which nothing can lead the CLI astray.
        @param kill_timeout: seconds between TERM and KILL.
        @param next_marker: gives a marker for one more agent process.
        @param sweep: ends, soon, what carries a marker.
        """
        self._reactor = reactor
        self._clock = clock
        self._probe = probe
        self._environment = environment
        self._directory = directory
        self._kill_timeout = kill_timeout
        self._next_marker = next_marker
        self._sweep = sweep
        self._known: tuple[str, tuple[str, ...]] | None = None
        self._failed: tuple[str, float] | None = None
        self._waiting: list[Deferred[None]] | None = None
        self._agent: AgentProcess | None = None
        self._closed = False

    async def names(self) -> tuple[str, ...]:
        """What there is to show: none also if the CLI cannot be asked; never raises."""
        try:
            return await self.required_names()
        except ProxyError:
            return ()

    async def required_names(self) -> tuple[str, ...]:
        """
        The names that the CLI gives, for a turn that depends on them.

        They are none if it has no control channel, or gave none just now.

        @raise ProxyError: CLI_NOT_FOUND or CLI_FAILED: no turn could be run at all.
        """
        can = await self._probe.capabilities()
        if can.control and not self._is_settled(can.version):
            await self._ask_once(can)
        return self._names_of(can.version)

    def learn(self, version: str, answer: ControlAnswer) -> None:
        """Take the names from an answer to ``initialize`` that a CLI of this version gave."""
        names = _names_in(answer)
        if names is None:
            return
        if self._known != (version, names):
            self._log.info(
                "the CLI names these models: {models}",
                type="models_known",
                models=list(names),
                version=version,
            )
        self._known = version, names

    async def close(self) -> None:
        """End the process that is being asked, if there is one; none is started any more."""
        self._closed = True
        agent = self._agent
        if agent is not None:
            agent.finish()
            await agent.when_gone()

    def _names_of(self, version: str) -> tuple[str, ...]:
        return self._known[1] if self._known is not None and self._knows(version) else ()

    def _knows(self, version: str) -> bool:
        return self._known is not None and self._known[0] == version

    def _is_settled(self, version: str) -> bool:
        """Whether there is no use in asking now."""
        if self._closed or self._knows(version):
            return True
        if self._failed is None or self._failed[0] != version:
            return False
        return self._clock.seconds() - self._failed[1] < _PATIENCE

    async def _ask_once(self, can: Capabilities) -> None:
        """Ask, or share the question that is under way; a caller who gives up disturbs none."""
        mine: Deferred[None] = Deferred()
        if self._waiting is not None:
            self._waiting.append(mine)
        else:
            self._waiting = [mine]
            Deferred.fromCoroutine(self._ask(can)).addCallback(self._asked)
        await mine

    def _asked(self, _: None) -> None:
        waiting, self._waiting = self._waiting or [], None
        for waiter in waiting:
            if not waiter.called:
                waiter.callback(None)

    async def _ask(self, can: Capabilities) -> None:
        """Ask now; whatever happens is written down, and nothing is raised."""
        try:
            question = self._start(can)
            question.ask()
            told = await question.done
        except (OSError, ProxyError) as error:
            told = str(error)
        except Exception:  # noqa: BLE001 - those who wait must hear of it, whatever it was
            self._log.failure(
                "the question for the models failed by a fault of ours", type="internal_error"
            )
            told = "a fault of this server"
        if isinstance(told, ControlAnswer):
            self.learn(can.version, told)
            told = told.error or "its answer has no list of models"
        if self._closed or self._knows(can.version):
            return
        self._failed = can.version, self._clock.seconds()
        self._log.warn(
            "the CLI did not name its models: {error}", type="models_unknown", error=told
        )

    def _start(self, can: Capabilities) -> _Question:
        marker = self._next_marker()
        argv = command.build_argv(
            self._probe.resolve(),
            command.LaunchKey(workspace=self._directory),
            command.TurnSettings(),
            command.SessionStart(command.StartKind.NEW, None),
            can,
            mcp_config=None,
            hooks=False,
        )
        full = [*command.launch_prefix(self._directory), *argv]
        environment: Any = command.build_environment(self._environment, marker)
        question = _Question(self._clock, self._kill_timeout)
        self._reactor.spawnProcess(question.agent, full[0], full, env=environment)
        self._agent = question.agent
        question.agent.when_gone().addCallback(lambda _: self._ended(question.agent, marker))
        return question

    def _ended(self, agent: AgentProcess, marker: str) -> None:
        if self._agent is agent:
            self._agent = None
        self._sweep(marker)


def _names_in(answer: ControlAnswer) -> tuple[str, ...] | None:
    """The names in an answer to ``initialize``; None if it has no list of them."""
    models = answer.payload.get("models")
    if not isinstance(models, list):
        return None
    values = (model.get("value") for model in models if isinstance(model, dict))
    names = (value for value in values if isinstance(value, str) and _is_name(value))
    return tuple(dict.fromkeys(names))[:_NAMES_KEPT]


def _is_name(value: str) -> bool:
    return value != _DEFAULT and 0 < len(value) <= _LONGEST_NAME and value.isprintable()

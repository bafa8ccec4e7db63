"""
Asking the CLI for its version.

The answer decides what may be sent to it, and is the health check's proof that it can be run at
all.  It is remembered by the program's path, time and size, and for the health check for some
seconds: a probe must not cost a process each time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorProcess, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.cli.command import (
    build_environment,
    clean_stderr,
    launch_prefix,
    resolve_program,
)
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError

__all__ = ["CliProbe", "VersionReport"]

_LIMIT = 5.0
"""Seconds that ``--version`` may take (1.0.24 needs about one)."""

_DRAIN = 0.5
"""Seconds for which its pipes may stay open after its exit: what it left behind may hold them."""

_REMEMBERED = 10.0
"""Seconds for which a report serves the health check."""

_OUTPUT_KEPT = 4096


@dataclass(frozen=True, slots=True)
class VersionReport:
    """
    What ``claude --version`` did.

    @ivar version: its output, or None if it gave none.
    @ivar exit_code: None if it did not exit by itself, or was not started.
    @ivar error: what to tell a client whose turn needs this CLI; None if all is well.
    """

    version: str | None
    exit_code: int | None
    error: ProxyError | None


class _VersionProtocol(ProcessProtocol):
    """Collects the output of ``--version`` within a time limit."""

    def __init__(self, clock: IReactorTime) -> None:
        self.done: Deferred[VersionReport] = Deferred()
        self._output = b""
        self._errors = b""
        self._clock = clock
        self._timer: IDelayedCall | None = None
        self._pid: int | None = None

    def connectionMade(self) -> None:
        assert self.transport is not None  # noqa: S101 - Twisted sets it before this call
        self._pid = self.transport.pid
        self.transport.closeStdin()
        self._timer = self._clock.callLater(_LIMIT, self._took_too_long)

    def outReceived(self, data: bytes) -> None:
        self._output = (self._output + data)[:_OUTPUT_KEPT]

    def errReceived(self, data: bytes) -> None:
        self._errors = (self._errors + data)[-_OUTPUT_KEPT:]

    def processExited(self, reason: TwistedFailure) -> None:  # noqa: ARG002 - told again at the end
        if self._timer is not None:
            self._timer.cancel()
            self._kill_group()  # only what it may have left there
            # What it wrote may still be in the pipe.
            self._timer = self._clock.callLater(_DRAIN, self._close_pipes)

    def processEnded(self, reason: TwistedFailure) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.done.called:
            self._report(getattr(reason.value, "exitCode", None))

    def _report(self, exit_code: int | None) -> None:
        text = self._output.decode("utf-8", "replace").strip()
        said = clean_stderr(self._errors.decode("utf-8", "replace"))
        error = None
        if exit_code in (126, 127):
            error = ProxyError(
                Failure.CLI_NOT_FOUND, f"{Failure.CLI_NOT_FOUND.sentence} The system said: {said}"
            )
        elif exit_code != 0:
            how = f"exit code {exit_code}" if exit_code is not None else "a signal"
            error = ProxyError(
                Failure.CLI_FAILED,
                f"The Claude CLI did not tell its version ({how}). {said}".strip(),
            )
        self.done.callback(VersionReport(text or None, exit_code, error))

    def _took_too_long(self) -> None:
        self._kill_group()
        self._close_pipes()
        message = f"The Claude CLI did not tell its version within {_LIMIT:g} seconds."
        self.done.callback(VersionReport(None, None, ProxyError(Failure.CLI_FAILED, message)))

    def _close_pipes(self) -> None:
        self._timer = None
        if self.transport is not None:
            self.transport.loseConnection()

    def _kill_group(self) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)


class CliProbe:
    """Knows which program the CLI is, its version, and so what it can do."""

    def __init__(
        self,
        reactor: IReactorProcess,
        clock: IReactorTime,
        cli: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """
        @param cli: the program and the arguments that always come first.
        @param environment: what the CLI will see, for the search on PATH.
        """
        self._reactor = reactor
        self._clock = clock
        self._cli = tuple(cli)
        self._environment = environment
        self._known: tuple[tuple[str, int, int], Capabilities] | None = None
        self._report: VersionReport | None = None
        self._report_time = 0.0
        self._waiting: list[Deferred[VersionReport]] | None = None

    def resolve(self) -> list[str]:
        """
        The CLI as it has to be started: absolute program, then its first arguments.

        @raise ProxyError: CLI_NOT_FOUND.
        """
        program = resolve_program(self._cli[0], self._environment.get("PATH", os.defpath))
        return [program, *self._cli[1:]]

    async def capabilities(self) -> Capabilities:
        """
        What the CLI can do.

        @raise ProxyError: CLI_NOT_FOUND or CLI_FAILED.
        """
        identity = _identity(self.resolve()[0])
        if self._known is not None and self._known[0] == identity:
            return self._known[1]
        report = await self.ask()
        if report.error is not None:
            raise report.error
        return capabilities_of(report.version or "")

    async def report(self) -> VersionReport:
        """The last report if it is fresh, else a new one; simultaneous callers share it."""
        age = self._clock.seconds() - self._report_time
        if self._report is not None and age < _REMEMBERED:
            return self._report
        return await self.ask()

    async def ask(self) -> VersionReport:
        """Run ``--version`` now, or share the run that is under way; never raises."""
        mine: Deferred[VersionReport] = Deferred()
        if self._waiting is not None:
            self._waiting.append(mine)
            return await mine
        self._waiting = [mine]
        run = Deferred.fromCoroutine(self._run())
        run.addCallback(self._reported)
        return await mine

    def _reported(self, report: VersionReport) -> None:
        self._report, self._report_time = report, self._clock.seconds()
        waiting, self._waiting = self._waiting or [], None
        for waiter in waiting:
            if not waiter.called:
                waiter.callback(report)

    async def _run(self) -> VersionReport:
        try:
            cli = self.resolve()
            identity = _identity(cli[0])
        except ProxyError as error:
            return VersionReport(None, None, error)
        command = [*launch_prefix("/"), *cli, "--version"]
        protocol = _VersionProtocol(self._clock)
        environment: Any = build_environment(self._environment, "probe")
        try:
            self._reactor.spawnProcess(protocol, command[0], command, env=environment)
        except OSError as error:
            message = f"{Failure.CLI_NOT_FOUND.sentence} The system said: {error.strerror}"
            return VersionReport(None, None, ProxyError(Failure.CLI_NOT_FOUND, message))
        report = await protocol.done
        if report.error is None:
            self._known = identity, capabilities_of(report.version or "")
        return report


def _identity(program: str) -> tuple[str, int, int]:
    try:
        status = os.stat(program)  # noqa: PTH116 - for every turn: a Path costs four times as much
    except OSError:
        raise ProxyError(Failure.CLI_NOT_FOUND) from None
    return program, status.st_mtime_ns, status.st_size

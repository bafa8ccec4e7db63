"""
The daemon's life: what happens at its start, at a reload and at its end, and in which order.

`tap.py` builds the parts; this module starts and stops them.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any

from twisted.application.service import Service
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolNegotiationFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.logger import ILogObserver, Logger, globalLogPublisher
from twisted.protocols.policies import WrappingFactory
from twisted.python.components import Componentized
from twisted.python.failure import Failure as TwistedFailure
from zope.interface import implementer

from claude_proxy import __version__
from claude_proxy.cli.catalogue import ModelCatalogue
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.mcp import McpConfigError, McpServers
from claude_proxy.sessions.statelock import StateLock
from claude_proxy.sessions.store import Store, StoreError
from claude_proxy.settings import Settings
from claude_proxy.web.direct import DirectConnection
from claude_proxy.web.metrics import LagMeter, Metrics
from claude_proxy.web.site import ProxySite

__all__ = ["ProxyService", "StartError", "is_public"]

_FLUSH = 2.0
"""Seconds that a stopping server gives the connections to take their last bytes."""

_SHORT_KEY = 16
"""Characters; shorter keys can be guessed, or found from what logs show of them."""


@implementer(IProtocolNegotiationFactory)
class _Connections(WrappingFactory):
    """
    All connections.

    Clients that offer protocols over TLS must find one of theirs accepted, or the handshake fails;
    WrappingFactory by itself accepts none.  The site speaks HTTP/1.1, whatever is installed.
    """

    protocol = DirectConnection

    def acceptableProtocols(self) -> list[bytes]:
        return [b"http/1.1"]


class StartError(Exception):
    """The server cannot start; the text is the sentence to print."""


class ProxyService(Service):
    """Everything that runs."""

    name = "claude-proxy"
    _log = Logger(namespace="claude_proxy.service")

    def __init__(
        self,
        clock: IReactorTime,
        settings: Settings,
        endpoint: IStreamServerEndpoint,
        site: ProxySite,
        *,
        executor: Executor,
        book: SessionBook,
        probe: CliProbe,
        catalogue: ModelCatalogue,
        mcp: McpServers,
        sweeper: Sweeper,
        store: Store,
        make_memory_store: Callable[[], Store],
        state_lock: StateLock | None,
        run_directory: Path,
        observer: ILogObserver | None,
        metrics: Metrics,
        demo: bool,
    ) -> None:
        """
        @param make_memory_store: makes the store that serves when the real one cannot be opened.
        @param state_lock: held since the parts were built; None if there is no usable state.
        @param run_directory: for files of this run; made at the start, removed at the end.
        @param observer: where all log records go; None to leave that to twistd.
        @param metrics: what counts them.
        """
        self._clock = clock
        self._settings = settings
        self._endpoint = endpoint
        self._connections = _Connections(site)
        self._executor = executor
        self._book = book
        self._probe = probe
        self._catalogue = catalogue
        self._mcp = mcp
        self._sweeper = sweeper
        self._store = store
        self._make_memory_store = make_memory_store
        self._state_lock = state_lock
        self._run_directory = run_directory
        self._observer = observer
        self._metrics = metrics
        self._lag_meter = LagMeter(clock, metrics.lagged)
        self._demo = demo
        self._port: IListeningPort | None = None

    def setServiceParent(self, parent: Any) -> None:
        if isinstance(parent, Componentized) and self._observer is not None:
            # Twistd asks its application for an observer before it makes one of its own.
            parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)

    def privilegedStartService(self) -> None:
        super().privilegedStartService()
        if self._state_lock is not None:
            self._state_lock.record_owner()
        failures: list[TwistedFailure] = []
        listening = self._endpoint.listen(self._connections)
        listening.addCallbacks(self._listens, failures.append)
        if failures:
            sys.excepthook = print_start_error
            raise StartError(_why_not(self._settings.listen, failures[0]))

    def _listens(self, port: IListeningPort) -> None:
        self._port = port

    def startService(self) -> None:
        super().startService()
        shutil.rmtree(self._run_directory, ignore_errors=True)
        self._run_directory.mkdir(mode=0o700)
        self._measure()
        address: Any = self._port.getHost() if self._port is not None else None
        self._log.info(
            "claude-proxy {version} is listening on {listen}",
            type="server_listening",
            version=__version__,
            listen=self._settings.listen,
            port=getattr(address, "port", None),
            workspace_base=str(self._settings.workspace_base),
            state=str(self._settings.state_path),
            keys=len(self._settings.keys),
            mcp_servers=list(self._mcp.config.names),
        )
        self._warn()
        signal.signal(signal.SIGHUP, lambda _number, _frame: self._hang_up())
        Deferred.fromCoroutine(self._open_store())
        Deferred.fromCoroutine(self._look_around())

    def _warn(self) -> None:
        if self._demo:
            self._log.warn(
                "this is the built-in demonstration: no model is asked, and every answer says so",
                type="demonstration",
            )
        if not self._settings.keys:
            self._log.warn(
                "no API key is configured: whoever can reach this server can use it. "
                "A fresh key to put into .env: API_KEY={suggestion}",
                type="open_server",
                suggestion=f"sk-{secrets.token_urlsafe(32)}",
            )
        short = [key.name for key in self._settings.keys if len(key.secret) < _SHORT_KEY]
        if short:
            self._log.warn(
                "API keys of fewer than {least} characters can be guessed; replace those of "
                "{tenants}, for example by what `openssl rand -hex 32` prints",
                type="short_keys",
                tenants=short,
                least=_SHORT_KEY,
            )
        if not self._settings.keys and is_public(self._port):
            self._log.warn(
                "without an API key, {listen} may be reached from other machines: "
                "anyone there can run commands on this one",
                type="public_without_keys",
                listen=self._settings.listen,
            )

    def _measure(self) -> None:
        # Beside the observer that writes, and not behind it: what is not written counts as well.
        globalLogPublisher.addObserver(self._metrics)
        self._metrics.watch_connections(lambda: len(self._connections.protocols))
        self._lag_meter.start()

    async def _open_store(self) -> None:
        try:
            await self._store.open()
        except StoreError as error:
            self._log.error(
                "{error} Sessions are remembered until the server stops, no longer.",
                type="store_failed",
                error=str(error),
            )
            self._store = self._make_memory_store()
            self._book.use(self._store)
            await self._store.open()

    async def _look_around(self) -> None:
        """What takes a moment: sweep what an earlier run left, and meet the CLI."""
        lock = self._state_lock
        if lock is not None:
            own, ours = f"{lock.state_id}.{lock.run_id}.", f"{lock.state_id}."
            await self._sweeper.sweep_where(
                lambda marker: marker.startswith(ours) and not marker.startswith(own)
            )
        report = await self._probe.ask()
        if report.error is not None:
            self._log.warn(
                "{error}",
                type="cli_unavailable",
                error=report.error.message,
            )
        else:
            self._log.info("the CLI is {cli}", type="cli_found", cli=report.version)

    def _hang_up(self) -> None:
        # A signal handler runs between any two instructions: the work waits for the reactor.
        reactor: Any = self._clock
        reactor.callFromThread(self.reload)

    def reload(self) -> None:
        """Read the MCP configuration again; a broken one changes nothing."""
        try:
            self._mcp.reload()
        except McpConfigError as error:
            self._log.error(
                "{error}\nThe configuration read before stays in force.",
                type="mcp_reload_failed",
                error=str(error),
            )
            return
        self._executor.mcp_changed()
        self._log.info(
            "the MCP configuration was read again",
            type="mcp_reloaded",
            mcp_servers=list(self._mcp.config.names),
        )

    def _expect_impatience(self) -> Callable[[], None]:
        """
        Let a second signal end the waiting; return what takes that back.

        Twisted would try to stop what is stopping already, and log a traceback.
        """
        reactor: Any = self._clock
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, lambda _n, _f: reactor.callFromThread(self._executor.hurry))

        def take_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return take_back

    async def _stop(self) -> None:
        be_patient = self._expect_impatience()
        self._log.info(
            "stopping; {turns} turns are running",
            type="server_stopping",
            turns=self._executor.running,
        )
        if self._port is not None:
            await _maybe(self._port.stopListening())
        closing = Deferred.fromCoroutine(self._catalogue.close())
        await self._executor.shut_down(self._settings.drain_timeout)
        await closing
        await self._sweeper.finish()
        await self._let_connections_go()
        await self._store.close()
        shutil.rmtree(self._run_directory, ignore_errors=True)
        if self._state_lock is not None:
            self._state_lock.release()
        self._log.info("stopped", type="server_stopped")
        self._lag_meter.stop()
        globalLogPublisher.removeObserver(self._metrics)
        be_patient()

    async def _let_connections_go(self) -> None:
        """The reactor would drop what is still to be sent."""
        for connection in list(self._connections.protocols):
            connection.loseConnection()
        end = self._clock.seconds() + _FLUSH
        while self._connections.protocols and self._clock.seconds() < end:
            moment: Deferred[None] = Deferred()
            self._clock.callLater(0.02, moment.callback, None)
            await moment
        for connection in list(self._connections.protocols):
            with suppress(AttributeError):  # not every kind of transport can be aborted
                connection.transport.abortConnection()

    def stopService(self) -> Deferred[None]:
        super().stopService()
        return Deferred.fromCoroutine(self._stop())


def is_public(port: IListeningPort | None) -> bool:
    """
    Whether other machines may reach what listens there; what is not known to be local counts.

    The address decides, not the description of the endpoint: a socket that was passed by a service
    manager says nothing of its address in LISTEN.
    """
    address: Any = port.getHost() if port is not None else None
    if isinstance(address, UNIXAddress):
        return False
    try:
        return not ip_address(getattr(address, "host", "")).is_loopback
    except ValueError:
        return True


async def _maybe(result: Any) -> None:
    if isinstance(result, Deferred):
        await result


def _why_not(listen: str, failure: TwistedFailure) -> str:
    cause = failure.getErrorMessage()
    if isinstance(failure.value, CannotListenError):
        reason = failure.value.socketError
        cause = getattr(reason, "strerror", None) or str(reason)
    # The cause comes first: of a daemon's message twistd shows 100 characters.
    return (
        f"{cause}: claude-proxy cannot listen on {listen}. "
        "Set another PORT, HOST or LISTEN, or stop what is using it."
    )


def print_start_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a `StartError` as one sentence (an exception hook); anything else as usual."""
    if isinstance(error, StartError):
        # By now twistd has made sys.stderr a part of the log.
        print(error, file=sys.__stderr__)
    else:
        sys.__excepthook__(kind, error, trace)

"""
``twistd claude-proxy``: its options, and the one place where everything is wired together.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast
from uuid import uuid4

from twisted.application.service import IService
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.threads import deferToThreadPool
from twisted.logger import ILogObserver, Logger
from twisted.python import usage

from claude_proxy import __version__
from claude_proxy.cli.catalogue import ModelCatalogue
from claude_proxy.cli.probe import CliProbe
from claude_proxy.cli.sweep import Sweeper
from claude_proxy.cli.turn import Limits
from claude_proxy.dialects.completion import Activity
from claude_proxy.service import ProxyService
from claude_proxy.sessions.book import SessionBook
from claude_proxy.sessions.context import RunContext, RunSettings
from claude_proxy.sessions.executor import Executor
from claude_proxy.sessions.mcp import McpConfigError, McpServers
from claude_proxy.sessions.register import SessionRegister
from claude_proxy.sessions.statelock import StateInUse, StateLock
from claude_proxy.sessions.store import Store
from claude_proxy.sessions.waiting import WaitingRoom
from claude_proxy.sessions.workspaces import Workspaces
from claude_proxy.settings import (
    SETTINGS,
    Setting,
    Settings,
    SettingsError,
    load_settings,
    read_dotenv,
)
from claude_proxy.web.api import JSON_PATHS, PUBLIC_PATHS, Api, ChatRules
from claude_proxy.web.auth import Authenticator, Origins
from claude_proxy.web.connections import connections_that_fit
from claude_proxy.web.gate import Gate
from claude_proxy.web.health import Check, HealthReport, check_cli, check_mcp, check_workspace
from claude_proxy.web.logs import make_observer, open_log_file
from claude_proxy.web.metrics import Metrics, RouteNames
from claude_proxy.web.site import ProxySite

__all__ = ["Options", "makeService"]

_log = Logger(namespace="claude_proxy.service")

_LINE_LIMIT = 64 * 1024 * 1024
"""The longest line accepted from the CLI, in bytes; more if larger bodies are: it repeats them."""

_COLLECTED = (10_000, 1, 1)
"""
How many new objects make the collector look at them, how often it then looks at older ones, too,
and at all: every third time, and every third time of those.  Python begins with 700, 10 and 10.

A turn leaves some 140 objects that refer to each other, and most have grown old by then.  Looked at
as seldom as Python does, they would be a million, and some 20 MB, before anybody does.
"""

_MOMENT = 0.01
"""
Seconds for which it may wait to tell the log that a turn starts: it is written while the agent
thinks, not while the agent waits.
"""

_THREADS = 4
"""For files and sweeps, which are short; the database has a thread of its own."""

_M_ARENA_MAX = -8
"""The GNU C library's number for `mallopt` (malloc.h)."""

_NO_SOCKET = (
    "it needs a domain (INET, INET6 or UNIX) and the index or the name of a socket that a service "
    "manager passed (LISTEN_FDS, LISTEN_FDNAMES), and no such socket was passed to this process. "
    "Start the server by its .socket unit, or set HOST and PORT instead."
)
"""Twisted's own words for it are "list index out of range"."""

_BACKLOG = 1024
"""Connections that the system holds until this process gets to them."""

_DEMO_CLI = Path(__file__).parent / "cli" / "demo.py"

_SECRET_VARIABLES = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_BEARER_TOKEN_BEDROCK",
)
"""What is blotted out wherever it should ever appear in a log record."""


def _describe(setting: Setting) -> str:
    facts = [setting.variable]
    if setting.unit:
        facts.append(f"in {setting.unit}")
    if setting.default:
        facts.append(f"default {setting.default}")
    return f"{setting.help} [{'; '.join(facts)}]"


class Options(usage.Options):
    """The command line; each option has an environment variable that means the same."""

    synopsis = "[options]"
    optFlags: ClassVar[list[list[str | None]]] = [
        ["demo", None, "Serve the built-in demonstration instead of the Claude CLI."],
    ]
    # No defaults here: a flag that is not given must not win over the environment.
    optParameters: ClassVar[list[list[str | None]]] = [
        [setting.flag, None, None, _describe(setting)]
        for setting in SETTINGS
        if setting.flag is not None
    ]
    longdesc = (
        "Every setting can be given as an option, as an environment variable (in brackets), or in "
        "a file .env in the working directory; the option wins, then the environment. "
        "Keys have no option, because options show in ps: "
    ) + " ".join(
        f"{setting.variable}: {setting.help}" for setting in SETTINGS if setting.flag is None
    )

    def opt_version(self) -> None:
        """Display the version of claude-proxy and exit."""
        print(f"claude-proxy {__version__}")  # noqa: T201 - what was asked for
        sys.exit(0)


def makeService(options: Options) -> IService:
    """
    Build the service.

    @raise SystemExit: something in the settings is wrong; its text names all of it.
    """
    from twisted.internet import reactor as the_reactor  # noqa: PLC0415 - only touched here

    reactor: Any = the_reactor  # it has more than the interface that its module declares
    try:
        flags = {name: options[name] for name in options if name != "demo"}
        settings = load_settings(flags, os.environ, read_dotenv(Path(".env")), Path.cwd())
        mcp = McpServers(settings.mcp_config_path, named=settings.mcp_config_named)
        endpoint = _endpoint(reactor, settings.listen)
    except (SettingsError, McpConfigError) as error:
        raise SystemExit(f"claude-proxy did not start. {error}") from None
    demo = bool(options["demo"])
    if demo:
        settings = _for_demonstration(settings)
    service = _Builder(reactor, settings, mcp, demo=demo).build(
        endpoint, _observer(reactor, settings, options.parent)
    )
    reactor.suggestThreadPoolSize(_THREADS)
    _spare_the_collector()
    _spare_memory()
    return service


def _spare_the_collector() -> None:
    """
    Keep Python's collector from looking at all of the server again and again.

    It stops everything while it looks: 0.1 seconds for the code that is loaded now, and more for
    some hundred turns.  What is there now stays for good; the rest is looked at less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTED)


def _spare_memory() -> None:
    """
    Have all threads share what the C library keeps of freed memory.

    It would keep some 2 MB for each of them.  Only one of them runs Python at a time, so they
    hardly ever wait for each other here.
    """
    with suppress(AttributeError, OSError):  # other systems have other allocators
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _endpoint(reactor: Any, listen: str) -> IStreamServerEndpoint:
    if listen.startswith("tcp:") and ":backlog=" not in listen:
        # Twisted's own 50 are not enough for a rush: those beyond wait a second at least.
        listen = f"{listen}:backlog={_BACKLOG}"
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, listen)
    except Exception as error:  # noqa: BLE001 - every kind of endpoint has errors of its own
        cause = _NO_SOCKET if listen.startswith("systemd:") else error
        raise SettingsError([f"LISTEN={listen} is no usable endpoint: {cause}"]) from None
    return endpoint


def _for_demonstration(settings: Settings) -> Settings:
    """The demonstration has its own program and its own state: the two never mix."""
    state = settings.state_path / "demo"
    environment = {
        **settings.child_environment,
        "CLAUDE_PROXY_DEMO_DIR": str(state / "transcripts"),
        "CLAUDE_CONFIG_DIR": str(state / "config"),
    }
    return replace(
        settings,
        claude_cli=(sys.executable, "-I", "-S", str(_DEMO_CLI)),
        state_path=state,
        child_environment=environment,
    )


def _observer(reactor: Any, settings: Settings, twistd_options: Any) -> ILogObserver | None:
    """All records in our format; unless twistd was told where else they go."""
    if twistd_options is None or twistd_options.get("logger"):
        return None
    named = (settings.child_environment.get(name, "") for name in _SECRET_VARIABLES)
    return make_observer(
        open_log_file(twistd_options),
        production=settings.production,
        level=settings.log_level,
        secrets=[*(key.secret for key in settings.keys), *filter(None, named)],
        later=partial(reactor.callLater, _MOMENT),
    )


class _Builder:
    """Puts the parts together, lower layers first."""

    def __init__(self, reactor: Any, settings: Settings, mcp: McpServers, *, demo: bool) -> None:
        self._reactor = reactor
        self._settings = settings
        self._mcp = mcp
        self._demo = demo
        self._workspaces = Workspaces(settings.workspace_base)
        self._probe = CliProbe(reactor, reactor, settings.claude_cli, settings.child_environment)
        self._sweeper = Sweeper(reactor, reactor)
        self._started = reactor.seconds()

    def build(self, endpoint: IStreamServerEndpoint, observer: ILogObserver | None) -> ProxyService:
        settings, reactor = self._settings, self._reactor
        lock = self._lock_state()
        later = partial(reactor.callLater, 0)  # when the turn's message, or answer, is on its way
        path = settings.state_path / "state.sqlite3" if lock else None
        store = Store(path, reactor, later=later)
        book = SessionBook(store, adopt_unknown=len(settings.keys) <= 1)
        run_directory = (
            settings.state_path / "run"
            if lock
            else Path(tempfile.gettempdir(), f"claude-proxy-{uuid4().hex}")
        )
        executor = self._executor(book, lock, run_directory)
        catalogue = self._catalogue(executor.context, run_directory)
        metrics = Metrics(RouteNames(Api.app.url_map), executor.context)
        api = Api(
            executor,
            SessionRegister(book, executor),
            self._health(),
            reactor,
            stall_timeout=settings.client_stall_timeout,
            in_thread=executor.context.in_thread,
            chat_rules=ChatRules(
                text_parameters=settings.chat_text_parameters,
                activity=cast(Activity, settings.chat_activity),  # the settings are checked
                aliases=settings.model_aliases,
            ),
            catalogue=catalogue,
            metrics=metrics,
        )
        connections, overflow = self._connections()
        site = ProxySite(
            api.app.resource(),
            self._gate(),
            reactor,
            max_connections=connections,
            overflow=overflow,
            max_bodies=settings.max_bodies_bytes,
        )
        return ProxyService(
            reactor,
            settings,
            endpoint,
            site,
            executor=executor,
            book=book,
            probe=self._probe,
            catalogue=catalogue,
            mcp=self._mcp,
            sweeper=self._sweeper,
            store=store,
            make_memory_store=lambda: Store(None, reactor, later=later),
            state_lock=lock,
            run_directory=run_directory,
            observer=observer,
            metrics=metrics,
            demo=self._demo,
        )

    def _lock_state(self) -> StateLock | None:
        """Take the state directory for this process; None, and a record, if it is not usable."""
        lock = StateLock(self._settings.state_path)
        try:
            lock.acquire()
        except StateInUse as error:
            raise SystemExit(f"claude-proxy did not start. {error}") from None
        except OSError as error:
            _log.error(
                "{path} cannot hold the server's state: {error}. Sessions are remembered until "
                "the server stops, no longer. Make it writable, or set STATE_PATH.",
                type="state_unusable",
                path=str(self._settings.state_path),
                error=error.strerror,
            )
            return None
        return lock

    def _executor(self, book: SessionBook, lock: StateLock | None, run: Path) -> Executor:
        settings = self._settings
        state_id, run_id = (lock.state_id, lock.run_id) if lock else (uuid4().hex, uuid4().hex)
        context = RunContext(
            self._reactor,
            self._reactor,
            RunSettings(
                limits=Limits(settings.total_timeout, settings.inactivity_timeout),
                kill_timeout=settings.kill_timeout,
                line_limit=max(_LINE_LIMIT, 2 * settings.max_body_bytes),
                environment=settings.child_environment,
                allow_skip_permissions=settings.allow_skip_permissions,
                workspace_hooks=settings.workspace_hooks,
                run_directory=run,
                marker=f"{state_id}.{run_id}",
                concurrent_turns=settings.max_concurrent_turns,
                starts_at_once=4 * (os.cpu_count() or 1),
                spare_processes=settings.spare_processes,
                live_sessions=settings.live_sessions,
                live_idle=settings.live_idle,
            ),
            book=book,
            waiting_room=WaitingRoom(settings.queue_length, settings.queue_timeout),
            workspaces=self._workspaces,
            mcp=self._mcp,
            probe=self._probe,
            sweeper=self._sweeper,
        )
        return Executor(context)

    def _catalogue(self, context: RunContext, run_directory: Path) -> ModelCatalogue:
        catalogue = ModelCatalogue(
            self._reactor,
            self._reactor,
            self._probe,
            environment=self._settings.child_environment,
            directory=str(run_directory),
            kill_timeout=self._settings.kill_timeout,
            next_marker=context.next_marker,
            sweep=self._sweeper.sweep,
        )
        context.learn = catalogue.learn  # what each turn's process says of itself anyway
        return catalogue

    def _connections(self) -> tuple[int, int]:
        """As many as are wanted, if the system lets this process have them; and some more."""
        settings = self._settings
        processes = (
            settings.max_concurrent_turns + settings.live_sessions + settings.spare_processes
        )
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        fitting, overflow = connections_that_fit(settings.max_connections, processes, descriptors)
        if fitting < settings.max_connections:
            _log.warn(
                "MAX_CONNECTIONS is {wanted}, but with {descriptors} descriptors for everything "
                "there is room for {connections}. Raise the limit (ulimit -n, or LimitNOFILE of "
                "systemd), or set less",
                type="descriptors_scarce",
                wanted=settings.max_connections,
                connections=fitting,
                descriptors=descriptors,
            )
        return fitting, overflow

    def _gate(self) -> Gate:
        settings = self._settings
        authenticator = Authenticator(settings.keys)
        return Gate(
            authenticator=authenticator,
            origins=Origins(
                allowed=settings.cors_origins,
                hosts=settings.allowed_hosts,
                open=not authenticator.required,
            ),
            public=PUBLIC_PATHS,
            json_paths=JSON_PATHS,
            max_body=settings.max_body_bytes,
        )

    def _health(self) -> HealthReport:
        async def cli() -> Check:
            return check_cli(await self._probe.report(), demo=self._demo)

        async def workspace() -> Check:
            pool = self._reactor.getThreadPool()
            return check_workspace(
                await deferToThreadPool(self._reactor, pool, self._workspaces.probe)
            )

        async def mcp() -> Check:
            return check_mcp(self._mcp.config)

        return HealthReport(
            {"claudeCli": cli, "workspace": workspace, "mcpConfig": mcp},
            uptime=lambda: self._reactor.seconds() - self._started,
        )

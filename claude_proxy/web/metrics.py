"""
Figures for monitoring: what Prometheus reads at ``GET /metrics``.

`Metrics` counts what the log records tell.  It observes all of them, whatever level is written, so
log and figures cannot tell different stories.  What has a present state is read when it is asked
for.

Every label has a fixed set of values, and none of them is a client's word: of a path only its route
is told.  Tenants, sessions, workspaces and models are no labels, because whoever has any key may
read the figures, and because their number has no bound.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Iterable
from http import HTTPStatus
from importlib.metadata import version as installed_version
from signal import Signals
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    generate_latest,
)
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import ILogObserver, LogEvent
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from zope.interface import implementer

from claude_proxy import __version__
from claude_proxy.cli.outcomes import Ending, OutcomeKind
from claude_proxy.errors import Failure
from claude_proxy.sessions.context import RunContext
from claude_proxy.web.gate import canonical_path

__all__ = ["CONTENT_TYPE", "LagMeter", "Metrics", "Route", "RouteNames"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

OTHER = "other"
"""The value of a label for all that has no value of its own."""

NONE = "none"
"""The value of a label where there is nothing to tell."""

LINES = ("session", "slot")
"""What a turn may wait for, before it is given to a process."""

PROCESSES = ("new", "spare", "live")
PURPOSES = ("turn", "spare", "models")

_TOKENS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_input_tokens",
    "cache_creation": "cache_creation_input_tokens",
}

_OUTCOMES = frozenset(
    {kind.value for kind in OutcomeKind if kind is not OutcomeKind.FAILURE}
    | {failure.code for failure in Failure}
)

_STATUS_BY_CODE = {failure.code: str(failure.status) for failure in Failure}
_STATUSES = frozenset(str(status.value) for status in HTTPStatus)
_SIGNALS = frozenset(number.name for number in Signals)

_TURN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    *(60, 120, 300, 600, 1800, 3600),
)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

LAG_INTERVAL = 1.0
"""Seconds between two looks at how late the reactor is."""


class Route(NamedTuple):
    """What is told of a path: the route's pattern, and its dialect."""

    pattern: str
    dialect: str


_UNKNOWN = Route(OTHER, NONE)


class RouteNames:
    """Finds the route of a path, whatever the method, in the same way as the router does."""

    def __init__(self, rules: Map) -> None:
        """
        @param rules: the router's.
        """
        patterns = dict.fromkeys(rule.rule for rule in rules.iter_rules())
        self._names = Map([Rule(pattern, endpoint=_named(pattern)) for pattern in patterns])
        self._router = self._names.bind("localhost")

    def find(self, path: str) -> Route:
        """
        The route of a path.

        @param path: as it stood in the request, or as it was routed.
        """
        known = canonical_path(path.encode("latin-1", "replace"))
        if known is None:
            return _UNKNOWN
        try:
            route, _ = self._router.match(known)
        except HTTPException:
            return _UNKNOWN
        return route if isinstance(route, Route) else _UNKNOWN


def _named(pattern: str) -> Route:
    """A rule as the documents write it, ``/api/sessions/ID``, and whose dialect it speaks."""
    words = ["ID" if word.startswith("<") else word for word in pattern.split("/")]
    dialect = {"v1": "openai", "api": "native"}.get(words[1], NONE)
    return Route("/".join(words), dialect)


class _Registry(CollectorRegistry):
    """A registry without a second series for each counter that tells when it was made."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


@implementer(ILogObserver)
class Metrics:
    """
    The figures of one server.

    @ivar registry: where they are kept.
    """

    def __init__(self, routes: RouteNames, context: RunContext) -> None:
        """
        @param context: of which the present state is told.
        """
        self._routes = routes
        self.registry = _Registry()
        self._count_requests()
        self._count_turns()
        self._count_processes()
        self._read_state(context)
        self._describe_server()
        self._takers: dict[str, Callable[[LogEvent], None]] = {
            "response": self._request_over,
            "connection_closed": self._connection_closed,
            "turn_start": self._turn_started,
            "turn_end": self._turn_over,
            "queue_left": self._queue_left,
            "session_interrupted": self._session_interrupted,
            "process_start": self._process_started,
            "process_signal": self._process_signalled,
            "process_exit": self._process_over,
            "sweep": self._swept,
            "internal_error": self._faulty,
        }

    def __call__(self, event: LogEvent) -> None:
        """Count what a log record tells; in any thread."""
        kind = event.get("type")
        if isinstance(kind, str) and kind in self._takers:
            self._takers[kind](event)

    def render(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)

    def lagged(self, seconds: float) -> None:
        """The reactor came to something so much later than it should have."""
        self._lag.observe(seconds)

    def watch_connections(self, count: Callable[[], float]) -> None:
        """Tell from now on how many connections there are."""
        self._connections.set_function(count)

    # What there is.

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"claude_proxy_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"claude_proxy_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _TURN_BUCKETS
    ) -> Histogram:
        full = f"claude_proxy_{name}"
        return Histogram(full, text, labels, registry=self.registry, buckets=buckets)

    def _count_requests(self) -> None:
        self._requests = self._counter(
            "http_requests", "Requests that are over.", "route", "dialect", "status"
        )
        self._cut = self._counter(
            "http_requests_cut",
            "Requests whose client left before the end of the answer.",
            "route",
            "dialect",
        )
        self._connections = self._gauge("http_connections", "Open connections.")

    def _count_turns(self) -> None:
        self._turns = self._counter("turns", "Turns that are over.", "outcome")
        self._turn_starts = self._counter(
            "turn_starts", "Turns given to an agent process of some kind.", "process"
        )
        self._durations = self._histogram(
            "turn_duration_seconds", "Time from a request to the end of its turn.", "outcome"
        )
        self._first_tokens = self._histogram(
            "turn_first_token_seconds",
            "Time from a request to the first text, thinking or tool call of its turn.",
            "process",
        )
        self._waits = self._histogram(
            "queue_wait_seconds", "Time for which a turn that had to wait did so.", "line"
        )
        self._interrupts = self._counter("interrupts", "Turns interrupted on request.")
        self._tokens = self._counter("tokens", "Tokens that the CLI reported for turns.", "kind")
        self._cost = self._counter("cost_dollars", "Cost in USD that the CLI reported for turns.")
        _prepare(self._turns, (kind.value for kind in OutcomeKind if kind.value in _OUTCOMES))
        _prepare(self._turn_starts, PROCESSES)
        _prepare(self._first_tokens, PROCESSES)
        _prepare(self._waits, LINES)
        _prepare(self._tokens, _TOKENS)

    def _count_processes(self) -> None:
        self._starts = self._counter("process_starts", "Agent processes started.", "purpose")
        self._signals = self._counter(
            "process_signals", "Signals sent to agent processes.", "signal"
        )
        self._exits = self._counter("process_exits", "Agent processes that ended.", "ending")
        self._swept_processes = self._counter(
            "processes_swept", "Processes that agents had left behind and that were ended."
        )
        _prepare(self._starts, PURPOSES)
        _prepare(self._signals, ("SIGTERM", "SIGKILL"))
        _prepare(self._exits, Ending.KINDS)

    def _read_state(self, context: RunContext) -> None:
        room, capacity = context.waiting_room, context.capacity
        state: list[tuple[str, str, Callable[[], float]]] = [
            ("turns_running", "Turns that have a slot.", lambda: capacity.running),
            ("turn_slots", "How many turns may run at once.", lambda: capacity.turns),
            ("queue_slots", "How many turns may wait at once.", lambda: room.length),
            (
                "live_sessions",
                "Agent processes that wait for the next turn of their session.",
                lambda: context.pool.waiting,
            ),
            (
                "spare_processes",
                "Agent processes that wait for a new session.",
                lambda: context.spares.waiting,
            ),
            (
                "process_starts_queued",
                "Starts of agent processes that wait because others are starting.",
                lambda: context.pace.waiting,
            ),
        ]
        for name, text, read in state:
            self._gauge(name, text).set_function(read)
        queued = self._gauge("turns_queued", "Turns that wait.", "line")
        queued.labels("session").set_function(lambda: context.leases.waiting)
        queued.labels("slot").set_function(lambda: capacity.waiting)

    def _describe_server(self) -> None:
        self._faults = self._counter("internal_errors", "Faults of this server.")
        self._lag = self._histogram(
            "reactor_lag_seconds",
            "How late the event loop came to what was due, looked at each second.",
            buckets=_LAG_BUCKETS,
        )
        build = Info("claude_proxy_build", "Versions.", registry=self.registry)
        build.info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "twisted": installed_version("twisted"),
            }
        )
        ProcessCollector(registry=self.registry)

    # What the records tell.

    def _request_over(self, event: LogEvent) -> None:
        route = self._routes.find(str(event.get("path")))
        status = event.get("status")
        told = NONE if status is None else _one_of(str(status), _STATUSES)
        self._requests.labels(*route, told).inc()
        if event.get("complete") is False:
            self._cut.labels(*route).inc()

    def _connection_closed(self, event: LogEvent) -> None:
        # With an answer of the connection's own, or without any.
        status = _STATUS_BY_CODE.get(str(event.get("reason")))
        if status is not None:
            self._requests.labels(*_UNKNOWN, status).inc()

    def _turn_started(self, event: LogEvent) -> None:
        self._turn_starts.labels(_one_of(event.get("process"), PROCESSES)).inc()

    def _turn_over(self, event: LogEvent) -> None:
        outcome = _one_of(event.get("outcome"), _OUTCOMES)
        self._turns.labels(outcome).inc()
        _observe(self._durations, outcome, event.get("duration_ms"))
        process = _one_of(event.get("process"), PROCESSES)
        _observe(self._first_tokens, process, event.get("first_token_ms"))
        for kind, field in _TOKENS.items():
            self._tokens.labels(kind).inc(_amount(event.get(field)) or 0)
        self._cost.inc(_amount(event.get("total_cost_usd")) or 0)

    def _queue_left(self, event: LogEvent) -> None:
        _observe(self._waits, _one_of(event.get("line"), LINES), event.get("waited_ms"))

    def _session_interrupted(self, event: LogEvent) -> None:
        if event.get("interrupted") is True:
            self._interrupts.inc()

    def _process_started(self, event: LogEvent) -> None:
        self._starts.labels(_one_of(event.get("purpose"), PURPOSES)).inc()

    def _process_signalled(self, event: LogEvent) -> None:
        self._signals.labels(_one_of(event.get("signal"), _SIGNALS)).inc()

    def _process_over(self, event: LogEvent) -> None:
        self._exits.labels(_one_of(event.get("kind"), Ending.KINDS)).inc()

    def _swept(self, event: LogEvent) -> None:
        self._swept_processes.inc(_amount(event.get("count")) or 0)

    def _faulty(self, _event: LogEvent) -> None:
        self._faults.inc()


class LagMeter:
    """Looks each second how late the reactor is."""

    def __init__(self, clock: IReactorTime, tell: Callable[[float], None]) -> None:
        """
        @param tell: given the seconds, each time.
        """
        self._clock = clock
        self._tell = tell
        self._due = 0.0
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        """Look from now on."""
        self._due = self._clock.seconds() + LAG_INTERVAL
        self._timer = self._clock.callLater(LAG_INTERVAL, self._look)

    def stop(self) -> None:
        """Look no more; does nothing if it does not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._tell(max(0.0, self._clock.seconds() - self._due))
        self.start()


def _prepare(metric: Counter | Histogram, values: Iterable[str]) -> None:
    """Begin series at zero: of one that begins at one, Prometheus does not see the first step."""
    for value in values:
        metric.labels(value)


def _one_of(value: object, known: Collection[str]) -> str:
    return value if isinstance(value, str) and value in known else OTHER


def _observe(histogram: Histogram, label: str, milliseconds: object) -> None:
    amount = _amount(milliseconds)
    if amount is not None:
        histogram.labels(label).observe(amount / 1000)


def _amount(value: object) -> float | None:
    """A number that can be added; what the CLI writes may be any."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        amount = float(value)
    except OverflowError:
        return None
    return amount if math.isfinite(amount) and amount >= 0 else None

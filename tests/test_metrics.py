"""What is counted of what the server tells, and how Prometheus reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, globalLogPublisher

from claude_proxy.cli.outcomes import Ending, Outcome, OutcomeKind
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.web.api import Api
from claude_proxy.web.metrics import LagMeter, Metrics, Route, RouteNames
from tests.scrape import figures_in, make_metrics, promtool
from tests.support import Connection
from tests.test_api import INIT, KEY, SUCCESS, World

_PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
_API_SOURCE = Path(__file__).parent.parent / "claude_proxy" / "web" / "api.py"


@pytest.fixture
def world() -> Iterator[World]:
    """The API on a site, whose records are counted."""
    made = World()
    globalLogPublisher.addObserver(made.metrics)
    yield made
    globalLogPublisher.removeObserver(made.metrics)


def changed(metrics: Metrics, *events: dict[str, Any]) -> dict[str, float]:
    """What some records add to the figures."""
    before = figures_in(metrics.render())
    for event in events:
        metrics(event)
    after = figures_in(metrics.render())
    return {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0) and name.startswith("claude_proxy_")
    }


def requests(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    """How many requests were counted, by route, dialect and status."""
    pattern = re.compile(
        r'claude_proxy_http_requests_total\{dialect="(.*)",route="(.*)",status="(.*)"\}'
    )
    found = ((pattern.fullmatch(name), n) for name, n in figures_in(metrics.render()).items())
    return {(match[2], match[1], match[3]): n for match, n in found if match is not None}


# The format.


def test_a_fresh_server_tells_prometheus_what_it_understands() -> None:
    text = make_metrics().render()
    assert promtool("check", "metrics", given=text) == ""
    assert "_created" not in text.decode()


def test_a_busy_server_does_so_too() -> None:
    metrics = make_metrics()
    for name in OUTCOMES:
        metrics({"type": "turn_end", "outcome": name, "duration_ms": 1, "first_token_ms": 1})
    metrics({"type": "response", "path": "/api/claude", "status": 200, "complete": False})
    metrics({"type": "process_signal", "signal": "SIGTERM"})
    metrics.lagged(0.5)
    assert promtool("check", "metrics", given=metrics.render()) == ""


def test_each_server_has_figures_of_its_own() -> None:
    one, other = make_metrics(), make_metrics()
    one({"type": "internal_error"})
    assert figures_in(one.render())["claude_proxy_internal_errors_total"] == 1
    assert figures_in(other.render())["claude_proxy_internal_errors_total"] == 0
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith("claude_proxy")]


def test_versions_are_told() -> None:
    [build] = [n for n in figures_in(make_metrics().render()) if n.startswith("claude_proxy_build")]
    assert re.fullmatch(r'.*_info\{python="3\..+",twisted="\d.+",version="\d.+"\}', build)


def test_the_process_is_described() -> None:
    figures = figures_in(make_metrics().render())
    assert figures["process_open_fds"] > 2
    assert figures["process_resident_memory_bytes"] > 1e6


# Turns.

OUTCOMES = sorted(
    {kind.value for kind in OutcomeKind if kind is not OutcomeKind.FAILURE}
    | {Outcome(OutcomeKind.FAILURE, ProxyError(failure)).code for failure in Failure}
)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_turn_is_counted_by_its_outcome(outcome: str) -> None:
    added = changed(make_metrics(), {"type": "turn_end", "outcome": outcome, "duration_ms": 70.0})
    assert added[f'claude_proxy_turns_total{{outcome="{outcome}"}}'] == 1
    duration = "claude_proxy_turn_duration_seconds"
    assert added[f'{duration}_sum{{outcome="{outcome}"}}'] == pytest.approx(0.07)
    assert f'{duration}_bucket{{le="0.05",outcome="{outcome}"}}' not in added
    assert added[f'{duration}_bucket{{le="0.1",outcome="{outcome}"}}'] == 1


def test_what_a_turn_used_and_cost_is_added_up() -> None:
    told = {
        "input_tokens": 100,
        "output_tokens": 50,
        "cache_read_input_tokens": 3000,
        "cache_creation_input_tokens": 400,
        "total_cost_usd": 0.25,
    }
    event = {"type": "turn_end", "outcome": "success", **told}
    added = changed(make_metrics(), event, event)
    kinds = ("input", "output", "cache_read", "cache_creation")
    tokens = [added[f'claude_proxy_tokens_total{{kind="{kind}"}}'] for kind in kinds]
    assert tokens == [200, 100, 6000, 800]
    assert added["claude_proxy_cost_dollars_total"] == 0.5


@pytest.mark.parametrize(
    "figure", [None, "12", True, -1, math.nan, math.inf, -math.inf, 10**400, [1], {}]
)
def test_what_is_no_amount_is_not_added(figure: object) -> None:
    fields = ("input_tokens", "total_cost_usd", "duration_ms", "first_token_ms")
    event = {"type": "turn_end", "outcome": "success", **dict.fromkeys(fields, figure)}
    added = changed(make_metrics(), event)
    assert added == {'claude_proxy_turns_total{outcome="success"}': 1}


@pytest.mark.parametrize("process", ["new", "spare", "live"])
def test_the_first_token_is_told_by_the_kind_of_process(process: str) -> None:
    metrics = make_metrics()
    end = {"type": "turn_end", "outcome": "success", "process": process, "first_token_ms": 31.5}
    added = changed(metrics, {"type": "turn_start", "process": process}, end)
    name = "claude_proxy_turn_first_token_seconds"
    assert added[f'{name}_sum{{process="{process}"}}'] == pytest.approx(0.0315)
    assert added[f'claude_proxy_turn_starts_total{{process="{process}"}}'] == 1


def test_a_turn_without_a_token_is_not_in_the_times_of_first_tokens() -> None:
    added = changed(make_metrics(), {"type": "turn_end", "outcome": "cli_not_found"})
    assert added == {'claude_proxy_turns_total{outcome="cli_not_found"}': 1}


def test_waiting_is_told_by_what_was_waited_for() -> None:
    metrics = make_metrics()
    added = changed(metrics, {"type": "queue_left", "line": "slot", "waited_ms": 2500.0})
    assert added['claude_proxy_queue_wait_seconds_sum{line="slot"}'] == 2.5
    assert added['claude_proxy_queue_wait_seconds_bucket{le="2.5",line="slot"}'] == 1


def test_only_what_was_interrupted_counts_as_interrupted() -> None:
    asked = {"type": "session_interrupted"}
    added = changed(make_metrics(), {**asked, "interrupted": False}, {**asked, "interrupted": True})
    assert added == {"claude_proxy_interrupts_total": 1}


# Processes.


@pytest.mark.parametrize(
    ("event", "name"),
    [
        ({"type": "process_start", "purpose": "spare"}, 'process_starts_total{purpose="spare"}'),
        (
            {"type": "process_signal", "signal": "SIGKILL"},
            'process_signals_total{signal="SIGKILL"}',
        ),
        ({"type": "process_exit", "kind": "fault"}, 'process_exits_total{ending="fault"}'),
        ({"type": "sweep", "count": 1}, "processes_swept_total"),
    ],
)
def test_what_becomes_of_processes_is_counted(event: dict[str, Any], name: str) -> None:
    assert changed(make_metrics(), event) == {f"claude_proxy_{name}": 1}


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (Ending(exit_code=0), "success"),
        (Ending(exit_code=3), "failure"),
        (Ending(signal=15), "signal"),
        (Ending(exit_code=0, fault="it wrote too much"), "fault"),
        (Ending(lost=True), "lost"),
    ],
)
def test_each_way_to_end_is_one_of_the_kinds(ending: Ending, kind: str) -> None:
    assert ending.kind == kind
    assert kind in Ending.KINDS


# The present state.


def test_the_state_is_read_when_it_is_asked_for() -> None:
    capacity = SimpleNamespace(running=0, turns=16, waiting=0)
    metrics = make_metrics(
        capacity=capacity,
        leases=SimpleNamespace(waiting=2),
        pace=SimpleNamespace(waiting=3),
        pool=SimpleNamespace(waiting=4),
        spares=SimpleNamespace(waiting=5),
    )
    assert figures_in(metrics.render())["claude_proxy_turns_running"] == 0
    capacity.running, capacity.waiting = 16, 1
    metrics.watch_connections(lambda: 7)
    figures = figures_in(metrics.render())
    names = {
        "turns_running": 16,
        "turn_slots": 16,
        "queue_slots": 100,
        'turns_queued{line="session"}': 2,
        'turns_queued{line="slot"}': 1,
        "process_starts_queued": 3,
        "live_sessions": 4,
        "spare_processes": 5,
        "http_connections": 7,
    }
    assert {name: figures[f"claude_proxy_{name}"] for name in names} == names


def test_the_lag_is_what_a_look_comes_too_late() -> None:
    clock, lags = Clock(), list[float]()
    meter = LagMeter(clock, lags.append)
    meter.start()
    clock.advance(1.0)
    clock.advance(3.5)
    clock.advance(1.0)
    assert lags == [0.0, 2.5, 0.0]
    meter.stop()
    meter.stop()
    assert clock.getDelayedCalls() == []


# Requests.


@pytest.mark.parametrize(
    ("path", "route", "dialect"),
    [
        ("/health", "/health", "none"),
        ("/metrics", "/metrics", "none"),
        ("/api/claude", "/api/claude", "native"),
        ("/api//claude", "/api/claude", "native"),
        ("/%61pi/claude", "/api/claude", "native"),
        ("/api/sessions", "/api/sessions", "native"),
        ("/api/sessions/abc", "/api/sessions/ID", "native"),
        ("/api/sessions/abc/interrupt", "/api/sessions/ID/interrupt", "native"),
        ("/v1/chat/completions", "/v1/chat/completions", "openai"),
        ("/v1/models/a/b", "/v1/models/ID", "openai"),
        ("/", "other", "none"),
        ("/api/claude/", "other", "none"),
        ("/api/claude/x", "other", "none"),
        ("/%ff", "other", "none"),
        ("*", "other", "none"),
        ("\xff", "other", "none"),
        ("\u2028", "other", "none"),
        ("/v1/models/" + "x" * 60000, "/v1/models/ID", "openai"),
    ],
)
def test_a_path_is_told_by_its_route(path: str, route: str, dialect: str) -> None:
    assert RouteNames(Api.app.url_map).find(path) == Route(route, dialect)


def test_every_request_is_counted_with_its_status(world: World) -> None:
    asked = [
        ("GET", "/health", {}, 200),
        ("HEAD", "/metrics", {}, 200),
        ("GET", "/api/sessions", {}, 200),
        ("GET", "/api/sessions/nobody", {}, 404),
        ("GET", "/api/claude", {}, 405),
        ("POST", "/api/claude", {"Content_Type": "application/json"}, 400),
        ("POST", "/v1/chat/completions", {"Content_Type": "application/json"}, 400),
        ("GET", "/nothing/here", {}, 404),
        ("BREW", "/coffee", {}, 404),
        ("OPTIONS", "/api/claude", {"Access_Control_Request_Method": "POST"}, 204),
    ]
    for method, path, headers, status in asked:
        body = b"{" if method == "POST" else None
        assert world.ask(method, path, body, **headers).status == status
    assert requests(world.metrics) == {
        ("/health", "none", "200"): 1,
        ("/metrics", "none", "200"): 1,
        ("/api/sessions", "native", "200"): 1,
        ("/api/sessions/ID", "native", "404"): 1,
        ("/api/claude", "native", "405"): 1,
        ("/api/claude", "native", "400"): 1,
        ("/api/claude", "native", "204"): 1,
        ("/v1/chat/completions", "openai", "400"): 1,
        ("other", "none", "404"): 2,
    }


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /api/sessions HTTP/1.1\r\nX-Api-Key: wrong", "401"),
        (f"POST /api/sessions HTTP/1.1\r\nX-Api-Key: {KEY}\r\nContent-Length: 99999999", "413"),
    ],
)
def test_an_early_refusal_is_counted_once(world: World, head: str, status: str) -> None:
    world.connection.send(f"{head}\r\nHost: x\r\n\r\n".encode())
    world.connection.lose()
    assert requests(world.metrics) == {("/api/sessions", "native", status): 1}
    assert "claude_proxy_http_requests_cut_total{" not in world.metrics.render().decode()


def test_a_cut_stream_is_counted_with_its_status_and_as_cut(world: World) -> None:
    world.post()
    world.turn.observer.turn_events([INIT])
    assert requests(world.metrics) == {}
    world.connection.lose()
    assert requests(world.metrics) == {("/api/claude", "native", "200"): 1}
    figures = figures_in(world.metrics.render())
    cut = 'claude_proxy_http_requests_cut_total{dialect="native",route="/api/claude"}'
    assert figures[cut] == 1


def test_who_leaves_before_any_answer_has_no_status(world: World) -> None:
    world.chat()
    world.connection.lose()
    assert requests(world.metrics) == {("/v1/chat/completions", "openai", "none"): 1}


def test_a_whole_stream_is_counted_once_at_its_end(world: World) -> None:
    world.post()
    world.turn.observer.turn_events([INIT])
    world.turn.observer.turn_ended(SUCCESS)
    world.connection.lose()
    assert requests(world.metrics) == {("/api/claude", "native", "200"): 1}
    assert "claude_proxy_http_requests_cut_total{" not in world.metrics.render().decode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno header\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20000 + b"\r\n\r\n", "431"),
    ],
)
def test_what_the_connection_itself_refuses_is_counted(
    world: World, data: bytes, status: str
) -> None:
    world.connection.send(data)
    assert b" %s " % status.encode() in world.connection.received
    world.connection.lose()
    assert requests(world.metrics) == {("other", "none", status): 1}


def test_a_body_that_breaks_the_rules_is_counted_once(world: World) -> None:
    head = f"POST /api/claude HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    world.connection.send(head.encode() + b"no size\r\n")
    world.connection.lose()
    assert requests(world.metrics) == {("/api/claude", "native", "400"): 1}


def test_a_connection_that_is_only_closed_is_no_request() -> None:
    assert changed(make_metrics(), {"type": "connection_closed", "reason": "idle"}) == {}


# The route.


def test_the_figures_need_a_key(world: World) -> None:
    answer = Connection(world.site).request("GET", "/metrics")
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_figures_are_text_that_nobody_keeps(world: World, method: str) -> None:
    answer = world.ask(method, "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert int(answer.headers["content-length"]) > 5000
    assert (answer.body == b"") == (method == "HEAD")


def test_the_figures_can_only_be_read(world: World) -> None:
    answer = world.ask("POST", "/metrics", b"")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_wrong_path_is_told_of_this_one(world: World) -> None:
    assert "GET /metrics" in str(world.ask("GET", "/metric").error["message"])


# What is counted does not depend on what is written.


def test_records_count_whatever_their_level() -> None:
    metrics = make_metrics()
    log = Logger(namespace="claude_proxy.web", observer=metrics)
    for level in LogLevel.iterconstants():
        log.emit(level, "{path}", type="response", path="/health", status=200, complete=True)
    assert requests(metrics) == {("/health", "none", "200"): 5}


# Hostile input.

_HOSTILE = st.one_of(
    st.none(),
    st.text(max_size=30),
    st.integers(),
    st.floats(),
    st.binary(max_size=10),
    st.lists(st.text(max_size=5), max_size=2),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    st.sampled_from(["other", "none", "success", 'a"b', "a\nb", "\ud800", "200", "SIGTERM"]),
)
_FIELDS = (
    *("path", "status", "complete", "reason", "outcome", "process", "line", "waited_ms", "kind"),
    *("duration_ms", "first_token_ms", "input_tokens", "total_cost_usd", "interrupted", "purpose"),
    *("signal", "count"),
)
_TYPES = (
    *("response", "connection_closed", "turn_start", "turn_end", "queue_left", "internal_error"),
    *("session_interrupted", "process_start", "process_signal", "process_exit", "sweep"),
)


def shapes(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Each series: its name and its labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in metrics.registry.collect()
        for sample in family.samples
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.one_of(st.sampled_from(_TYPES), _HOSTILE)},
            optional=dict.fromkeys(_FIELDS, _HOSTILE),
        ),
        max_size=20,
    )
)
def test_nothing_that_is_logged_makes_a_label_of_its_own(events: list[dict[str, Any]]) -> None:
    metrics = make_metrics()
    for event in events:
        metrics(event)
    text = metrics.render()
    figures_in(text)
    allowed = {
        "outcome": {*OUTCOMES, "other"},
        "process": {"new", "spare", "live", "other"},
        "line": {"session", "slot", "other"},
        "purpose": {"turn", "spare", "models", "other"},
        "ending": {*Ending.KINDS, "other"},
        "kind": {"input", "output", "cache_read", "cache_creation"},
        "dialect": {"native", "openai", "none"},
        "route": {*(_routes()), "other"},
    }
    for name, labels in shapes(metrics):
        for label, value in labels:
            if label in allowed:
                assert value in allowed[label], name
            elif label == "status":
                assert value in ("other", "none") or 100 <= int(value) < 600
            elif label == "signal":
                assert value == "other" or re.fullmatch(r"SIG[A-Z0-9]+", value)
            else:
                assert label in ("le", "version", "python", "twisted")


def _routes() -> set[str]:
    patterns = re.findall(r'@app\.route\("([^"]+)"', _API_SOURCE.read_text(encoding="utf-8"))
    return {re.sub(r"<[^>]+>", "ID", pattern) for pattern in patterns}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=40)))
def test_a_thousand_paths_make_no_more_series_than_there_are_routes(paths: list[str]) -> None:
    metrics = make_metrics()
    for path in paths:
        metrics({"type": "response", "path": f"/{path}", "status": 404, "complete": True})
    assert {route for route, _, _ in requests(metrics)} <= {*_routes(), "other"}


def test_a_client_cannot_name_a_series(world: World) -> None:
    before = len(shapes(world.metrics))
    for number in range(50):
        name = f"secret{number}"
        world.ask(f"M{name}", f"/{name}", None, X_Request_Id=name, X_Api_Key=KEY, User_Agent=name)
        world.ask("GET", f"/api/sessions/{name}?{name}", None, X_Claude_Session_Id=name)
    assert len(shapes(world.metrics)) - before <= 2
    assert "secret" not in world.metrics.render().decode()


# The page.


def _told() -> list[tuple[str, str, tuple[str, ...]]]:
    """Each metric's name, type and labels, from the page."""
    rows = re.findall(
        r"^\| `((?:claude_proxy|process)_\w+)` \| (\w+) \|([^|]*)\|", _PAGE, re.MULTILINE
    )
    return [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]


def test_every_metric_is_documented_as_it_is() -> None:
    metrics = make_metrics()
    suffixes = {"counter": "_total", "info": "_info"}
    kinds = {"info": "gauge"}
    labels = {
        getattr(collector, "_name", ""): getattr(collector, "_labelnames", ())
        for collector in metrics.registry._collector_to_names
    }
    exist = [
        (
            family.name + suffixes.get(family.type, ""),
            kinds.get(family.type, family.type),
            tuple(labels.get(family.name, ())) or _build_labels(family.name),
        )
        for family in metrics.registry.collect()
    ]
    assert sorted(_told()) == sorted(exist)


def _build_labels(name: str) -> tuple[str, ...]:
    return ("version", "python", "twisted") if name == "claude_proxy_build" else ()


def test_every_value_of_a_label_is_documented() -> None:
    values = set(re.findall(r"`(\w+)`", _PAGE))
    known = {"new", "spare", "live", "session", "slot", "turn", "models", "cache_read"}
    assert known | set(Ending.KINDS) | {"other", "none", "native", "openai"} <= values


def _yaml(first: str) -> str:
    [block] = re.findall(rf"```yaml\n({first}:\n.*?)```", _PAGE, re.DOTALL)
    return str(block)


def test_the_scrape_configuration_is_one(tmp_path: Path) -> None:
    key, file = tmp_path / "key", tmp_path / "prometheus.yml"
    key.write_text("sk-0123456789")
    text, count = re.subn(r"(?<=credentials_file: ).*", str(key), _yaml("scrape_configs"))
    assert count == 1
    file.write_text(text)
    assert "SUCCESS" in promtool("check", "config", str(file))


def test_the_alert_rules_are_rules_about_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(_yaml("groups"))
    assert "SUCCESS" in promtool("check", "rules", str(file))


def test_the_queries_are_queries_about_what_there_is(tmp_path: Path) -> None:
    queries = [
        q
        for block in re.findall(r"```promql\n(.*?)```", _PAGE, re.DOTALL)
        for q in block.split("\n\n")
    ]
    assert len(queries) >= 8
    lines = ["groups:", "- name: examples", "  rules:"]
    for number, query in enumerate(queries):
        indented = "\n".join("      " + line for line in query.strip().splitlines())
        lines += [f"  - record: example:{number}", f"    expr: |\n{indented}"]
    file = tmp_path / "queries.yml"
    file.write_text("\n".join(lines) + "\n")
    assert "SUCCESS" in promtool("check", "rules", str(file))


def test_the_page_speaks_of_no_other_metric() -> None:
    names = set(re.findall(r"\b(?:claude_proxy|process)_[a-z_]+\b(?!\.)", _PAGE))
    series = {
        sample.name for family in make_metrics().registry.collect() for sample in family.samples
    }
    exist = {name for name, _, _ in _told()} | series
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} - exist == set()

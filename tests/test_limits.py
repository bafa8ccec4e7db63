"""The page about limits has the values that hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactor

from claude_proxy import tap
from claude_proxy.dialects import barejson, completion
from claude_proxy.settings import SETTINGS
from claude_proxy.web import bodies, channel, connections, guesses, request, site

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = (_ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
_ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in _PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| limit |", "| --- |"))
]
_DEFAULTS = {setting.variable: int(setting.default) for setting in SETTINGS if setting.unit} | {
    setting.variable: int(setting.default)
    for setting in SETTINGS
    if setting.variable == "MAX_CONNECTIONS"
}

VALUES = {
    "Connections at once": f"`MAX_CONNECTIONS` ({_DEFAULTS['MAX_CONNECTIONS']})",
    "Connections beyond that": (f"{connections.OVERFLOW}, less if there are too few descriptors"),
    "Connections that wait for the server": f"{tap._BACKLOG}",
    "Time for the head": f"{channel.HEAD_TIME:g} s",
    "Silence between": f"{channel.IDLE_TIME} s",
    "Headers of a request": f"{channel.ProxyChannel.maxHeaders}",
    "Request line and headers": f"{channel.ProxyChannel.totalHeadersSize} bytes",
    "What is no HTTP": "",
    "Time for a body": (
        f"{request._BODY_TIME:g} s, and one more for each {request._BODY_RATE} bytes that have come"
    ),
    "One body": f"`MAX_BODY_BYTES` ({_DEFAULTS['MAX_BODY_BYTES']})",
    "All [larger bodies]": f"`MAX_BODIES_BYTES` ({_DEFAULTS['MAX_BODIES_BYTES']})",
    "Requests sent ahead": f"{channel.ProxyChannel._optimisticEagerReadSize} bytes",
    "[Wrong keys]": f"{guesses.FORGIVEN}, and {60 / guesses._FORGET:g} more each minute",
    "Addresses whose": f"{guesses.ADDRESSES}",
    "Time for which what follows": f"{channel.LINGER:g} s",
    "An answer in the OpenAI dialect that is not": f"{completion.LONGEST_WHOLE} characters",
    "Text of the model that is to be": f"{barejson.LONGEST} characters",
    "A line of the CLI": f"{tap._LINE_LIMIT} bytes, or twice `MAX_BODY_BYTES` if that is more",
}


def test_every_limit_is_documented_as_it_is() -> None:
    assert len(_ROWS) == len(VALUES)
    for (begin, value), row in zip(VALUES.items(), _ROWS, strict=True):
        assert row[0].startswith(begin)
        assert row[1] == value


def test_what_is_said_beside_the_table_holds() -> None:
    assert bodies.SMALL_BODY == 256 * 1024
    assert f"Up to {bodies.SMALL_BODY // 1024} KiB it is not counted" in _PAGE
    assert f"after up to {guesses.LONGEST:g} s" in _PAGE
    assert f"waits: {guesses.FIRST} seconds" in _PAGE
    assert f"{guesses.LONGEST:g} seconds at most" in _PAGE
    assert f"forgotten after {guesses._FORGET:g} seconds" in _PAGE
    assert f"`Retry-After: {channel.COME_BACK}`" in _PAGE
    assert f"and {connections.OWN_DESCRIPTORS} for itself" in _PAGE
    assert (
        _DEFAULTS["MAX_CONNECTIONS"],
        _DEFAULTS["MAX_BODIES_BYTES"],
    ) == (site._CONNECTIONS, site._BODIES)


def test_every_limit_names_tests_that_exist() -> None:
    file = ""
    for row in _ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", row[-1])
        assert named, row[0]
        for named_file, test in named:
            file = named_file or file
            assert f"def {test}(" in (_ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize(
    ("listen", "backlog"),
    [
        ("tcp:port=0:interface=127.0.0.1", tap._BACKLOG),
        ("tcp:0:backlog=7", 7),
        ("unix:/run/x.sock", 50),
    ],
)
def test_the_system_holds_a_rush_of_connections(listen: str, backlog: int) -> None:
    reactor: Any = MemoryReactor()
    endpoint: Any = tap._endpoint(reactor, listen)
    endpoint.listen(Factory())
    [server] = reactor.tcpServers or reactor.unixServers
    assert server[2] == backlog

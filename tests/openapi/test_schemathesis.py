"""Schemathesis against the running daemon: its answers are those that its document tells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from claude_proxy.web.operations import OPERATIONS
from tests.e2e.daemon import Daemon

_HERE = Path(__file__).parent
_KEY = "sk-schemathesis-0123456789"
_SECONDS = 60
_EXAMPLES = 30
_CASES_PER_EXAMPLE = 10  # as measured; more cases are made from the schemas alone
_LEAST = 100
_RUN_LIMIT = 3600

_MCP = '{"mcpServers": {"github": {"command": "true"}}}'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The demonstration with a key; its agent answers at once."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "cwd").mkdir()
    (folder / "cwd" / "mcp-config.json").write_text(_MCP, encoding="utf-8")
    env = {
        "API_KEY": _KEY,
        "HOST": "127.0.0.1",
        "CLAUDE_PROXY_DEMO_DELAY_MS": "0",
        # Tests may run as root, who must say that this is no accident.
        "IS_SANDBOX": "1",
        "LOG_LEVEL": "info",
    }
    with Daemon(folder, "claude", "http://127.0.0.1:9", env=env, args=["--demo"]) as daemon:
        yield daemon


def _schemathesis(daemon: Daemon, *arguments: str) -> str:
    """Run it; what it says."""
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [
            program,
            f"--config-file={_HERE / 'schemathesis.toml'}",
            "run",
            f"{daemon.url}/openapi.json",
            f"--header=Authorization: Bearer {_KEY}",
            "--no-color",
            *arguments,
        ],
        cwd=_HERE.parent.parent,
        env={"PATH": os.environ["PATH"], "no_proxy": "*", "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_RUN_LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
    return done.stdout


def _generated(said: str) -> int:
    found = re.search(r"^\s*(\d+) generated", said, re.MULTILINE)
    assert found is not None, said
    return int(found[1])


class _Runs:
    """Both runs at once: the one without keys does little but wait."""

    def __init__(self, daemon: Daemon, pool: ThreadPoolExecutor, cases: int) -> None:
        limits = [f"--max-examples={_EXAMPLES}", f"--max-time={_SECONDS}"]
        if cases:
            limits = [f"--max-examples={cases // _CASES_PER_EXAMPLE + 1}"]
        self.with_key = pool.submit(_schemathesis, daemon, "--workers=2", *limits)
        self.without_key = pool.submit(
            _schemathesis,
            daemon,
            "--checks=ignored_auth",
            "--phases=fuzzing",
            "--mode=positive",
            "--max-examples=1",
            "--workers=8",
        )


@pytest.fixture(scope="module")
def runs(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[_Runs]:
    """What Schemathesis says."""
    with ThreadPoolExecutor() as pool:
        yield _Runs(daemon, pool, request.config.getoption("--cases", 0))


@pytest.mark.openapi
def test_every_answer_is_as_the_document_says(
    runs: _Runs,
    daemon: Daemon,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = runs.with_key.result()
    with capsys.disabled():
        print(said[said.index("= SUMMARY ") :])  # noqa: T201 - how much was tried, and the seed
    assert _generated(said) >= request.config.getoption("--cases", 0)
    # In a time of its own it may be few, where much else is running.
    assert _generated(said) > _LEAST
    assert daemon.records("internal_error") == []


@pytest.mark.openapi
def test_what_needs_a_key_refuses_whoever_has_none(runs: _Runs, daemon: Daemon) -> None:
    assert _generated(runs.without_key.result()) > 0
    # It tries only what a key had got through to: often no session that exists.
    with httpx.Client(base_url=daemon.url, trust_env=False) as client:
        for operation in OPERATIONS:
            path = re.sub("{[^}]*}", str(uuid4()), operation.path)
            status = client.request(operation.method, path, json={}).status_code
            assert (status == 401) is not operation.public, operation.name

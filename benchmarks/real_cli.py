"""
The real CLI, with a model on the loopback that answers at once.

The CLI is the one that CLAUDE_CLI names, or else the one that the end-to-end tests install.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from benchmarks.harness import Server, server
from benchmarks.turns import ByHand
from claude_proxy.cli.command import (
    LaunchKey,
    SessionStart,
    StartKind,
    TurnSettings,
    build_argv,
    resolve_program,
)
from claude_proxy.cli.versions import Capabilities, capabilities_of
from tests.e2e.claude_cli import NEW, install_claude
from tests.e2e.daemon import cli_environment
from tests.e2e.messages_api import MessagesApi
from tests.e2e.processes import children_of

__all__ = ["RealCli", "cpu_seconds", "real_cli", "wait_for_rest"]

_QUIET_SECONDS = 0.5
_LITTLE = 0.04
"""CPU seconds that a CLI takes in that time though it has nothing to do, and then some."""

_REST_SECONDS = 30.0


@dataclass(frozen=True)
class RealCli:
    """
    The CLI, and a folder for all that it writes.

    @ivar can: what its version can do.
    """

    program: str
    can: Capabilities
    folder: Path
    api_url: str

    def server(self, name: str, **settings: str) -> AbstractContextManager[Server]:
        """Run the daemon with it; `settings` are environment variables."""
        environment = cli_environment(self.folder / name, self.api_url)
        return server(Path(self.program), **environment, **settings)

    def by_hand(self) -> ByHand:
        """Start it for a new session, as the server does."""
        here = self.folder / "by-hand"
        environment = cli_environment(here, self.api_url)
        workspace = here / "workspace"
        workspace.mkdir(exist_ok=True)
        argv = build_argv(
            [self.program],
            LaunchKey(str(workspace)),
            TurnSettings(),
            SessionStart(StartKind.NEW, str(uuid4())),
            self.can,
            mcp_config=None,
            hooks=False,
            reusable=True,
        )
        return ByHand(argv, str(workspace), environment)


@contextmanager
def real_cli() -> Iterator[RealCli]:
    """
    The CLI and its model.

    @raise SystemExit: the CLI cannot keep a process for several turns.
    """
    named = os.environ.get("CLAUDE_CLI")
    program = resolve_program(named, os.environ["PATH"]) if named else str(install_claude(NEW))
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    can = capabilities_of(said)
    if not can.live:
        raise SystemExit(f"The Claude CLI {can.version} is too old for this.")
    with TemporaryDirectory(prefix="claude-proxy-benchmark-") as folder, MessagesApi() as api:
        yield RealCli(program, can, Path(folder), api.url)


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used, all threads together."""
    # The clock of a process, as clock_getcpuclockid(3) makes it on Linux; /proc counts in 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def wait_for_rest(*pids: int) -> None:
    """
    Wait until these processes and their descendants have nothing left to do.

    @raise SystemExit: they still work after half a minute.
    """
    deadline = time.monotonic() + _REST_SECONDS
    before = _work(pids)
    while time.monotonic() < deadline:
        time.sleep(_QUIET_SECONDS)
        work = _work(pids)
        if work.keys() == before.keys() and all(work[pid] - before[pid] <= _LITTLE for pid in work):
            return
        before = work
    raise SystemExit("The processes do not come to rest.")


def _work(pids: tuple[int, ...]) -> dict[int, float]:
    found = {}
    descendants = [child for pid in pids for child in children_of(pid)]
    for pid in [*pids, *descendants]:
        try:
            found[pid] = cpu_seconds(pid)
        except OSError:
            continue
    return found

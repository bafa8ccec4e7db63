"""
The real programs that the end-to-end tests drive, from npm, inside this checkout.

Each program gets a folder of its own under `.cache/claude-cli`, never a global install.  A folder
appears under its final name only when the program in it has answered, so that an interrupted
install is never used; a file lock makes test runs that start together wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EVERYTHING", "NEW", "OLD", "Claude", "install_claude", "install_everything_server"]

NEW = "2.1.197"
OLD = "1.0.24"
EVERYTHING = "2026.8.31"

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "claude-cli"
_CLAUDE_PACKAGE = "@anthropic-ai/claude-code"
_EVERYTHING_PACKAGE = "@modelcontextprotocol/server-everything"
_INSTALL_SECONDS = 600
_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Claude:
    """
    One installed Claude CLI; stands wherever a path to the program may stand.

    @ivar path: the absolute path of the executable.
    @ivar version: its version, C{NEW} or C{OLD}.
    """

    path: Path
    version: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_old(self) -> bool:
        """Whether this one has neither control protocol nor partial messages."""
        return self.version == OLD


def install_claude(version: str) -> Claude:
    """
    The Claude CLI of this version, installed if it is not there yet.

    @raise RuntimeError: npm or node is missing, or the install failed.
    """
    folder = _installed(
        version, f"{_CLAUDE_PACKAGE}@{version}", lambda fresh: _finish_claude(fresh, version)
    )
    return Claude(path=folder / "node_modules" / ".bin" / "claude", version=version)


def install_everything_server() -> list[str]:
    """
    The argument vector of the MCP reference server on stdio, installed if it is not there yet.

    @raise RuntimeError: npm or node is missing, or the install failed.
    """
    folder = _installed(
        f"server-everything-{EVERYTHING}",
        f"{_EVERYTHING_PACKAGE}@{EVERYTHING}",
        _finish_everything,
    )
    return [_program("node"), str(_everything_script(folder)), "stdio"]


def _installed(name: str, package: str, finish: Callable[[Path], None]) -> Path:
    _program("node")  # which runs 1.0.24 and the MCP server, even when they are installed
    folder = _CACHE / name
    with _lock():
        if not folder.is_dir():
            for leftover in _CACHE.glob(f".{name}-*"):
                shutil.rmtree(leftover)
            fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=_CACHE))
            # Its own package.json keeps npm from looking for one further up.
            (fresh / "package.json").write_text('{"private": true}\n', encoding="utf-8")
            npm = [_program("npm"), "install", "--ignore-scripts", "--save-exact"]
            quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
            _run([*npm, *quiet, package], fresh, _INSTALL_SECONDS)
            finish(fresh)
            fresh.chmod(0o755)
            fresh.rename(folder)
    return folder


@contextmanager
def _lock() -> Iterator[None]:
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _finish_claude(folder: Path, version: str) -> None:
    package = folder / "node_modules" / _CLAUDE_PACKAGE
    # Install scripts were left out (npm may not run them either); newer packages need this one,
    # which puts the binary of this platform into its place.
    if (package / "install.cjs").is_file():
        _run([_program("node"), "install.cjs"], package, _ANSWER_SECONDS)
    said = _run(
        [str(folder / "node_modules" / ".bin" / "claude"), "--version"], folder, _ANSWER_SECONDS
    )
    if not said.startswith(version):
        raise RuntimeError(f"The installed Claude CLI says {said.strip()!r}, not {version}.")


def _finish_everything(folder: Path) -> None:
    script = _everything_script(folder)
    if not script.is_file():
        raise RuntimeError(f"{_EVERYTHING_PACKAGE} has no {script.name}.")
    _run([_program("node"), "--check", str(script)], folder, _ANSWER_SECONDS)


def _everything_script(folder: Path) -> Path:
    return folder / "node_modules" / _EVERYTHING_PACKAGE / "dist" / "index.js"


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"The end-to-end tests need {name!r} on PATH. Install Node.js with npm.")
    return found


def _run(argv: list[str], folder: Path, seconds: int) -> str:
    # The home folder is a fresh one, because the CLI writes its configuration at every start,
    # but npm must find the user's registry and cache.
    home = {} if Path(argv[0]).name == "npm" else {"HOME": str(folder), "DISABLE_AUTOUPDATER": "1"}
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, **home},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
    return done.stdout

"""The CLIs that the end-to-end tests drive, and the MCP server that the CLIs drive, from npm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.e2e import npm

__all__ = ["EVERYTHING", "NEW", "OLD", "Claude", "install_claude", "install_everything_server"]

NEW = "2.1.197"
OLD = "1.0.24"
EVERYTHING = "2026.8.31"

_CLAUDE_PACKAGE = "@anthropic-ai/claude-code"
_EVERYTHING_PACKAGE = "@modelcontextprotocol/server-everything"


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
    folder = npm.installed(
        f"claude-cli/{version}",
        [f"{_CLAUDE_PACKAGE}@{version}"],
        lambda fresh: _finish_claude(fresh, version),
    )
    return Claude(path=folder / "node_modules" / ".bin" / "claude", version=version)


def install_everything_server() -> list[str]:
    """
    The argument vector of the MCP reference server on stdio, installed if it is not there yet.

    @raise RuntimeError: npm or node is missing, or the install failed.
    """
    folder = npm.installed(
        f"claude-cli/server-everything-{EVERYTHING}",
        [f"{_EVERYTHING_PACKAGE}@{EVERYTHING}"],
        _finish_everything,
    )
    return [npm.program("node"), str(_everything_script(folder)), "stdio"]


def _finish_claude(folder: Path, version: str) -> None:
    package = folder / "node_modules" / _CLAUDE_PACKAGE
    # Install scripts were left out (npm may not run them either); newer packages need this one,
    # which puts the binary of this platform into its place.
    if (package / "install.cjs").is_file():
        npm.run([npm.program("node"), "install.cjs"], package)
    said = npm.run([str(folder / "node_modules" / ".bin" / "claude"), "--version"], folder)
    if not said.startswith(version):
        raise RuntimeError(f"The installed Claude CLI says {said.strip()!r}, not {version}.")


def _finish_everything(folder: Path) -> None:
    script = _everything_script(folder)
    if not script.is_file():
        raise RuntimeError(f"{_EVERYTHING_PACKAGE} has no {script.name}.")
    npm.run([npm.program("node"), "--check", str(script)], folder)


def _everything_script(folder: Path) -> Path:
    return folder / "node_modules" / _EVERYTHING_PACKAGE / "dist" / "index.js"

"""The shipped systemd units, read as systemd reads them, as far as the tests need it."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.tools import DEPLOY

__all__ = ["SERVICE", "SOCKET", "SOCKET_DROP_IN", "entries", "seconds", "variables"]

SERVICE = DEPLOY / "systemd" / "claude-proxy.service"
SOCKET = DEPLOY / "systemd" / "claude-proxy.socket"
SOCKET_DROP_IN = DEPLOY / "systemd" / "socket.conf"


def entries(path: Path) -> list[tuple[str, str]]:
    """The assignments of a unit file, in order; a name may come again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#[;"]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def variables(path: Path, specifiers: dict[str, str]) -> dict[str, str]:
    """What `Environment=` sets, with systemd's specifiers (`%S`) filled in."""
    found: dict[str, str] = {}
    for name, value in entries(path):
        if name == "Environment":
            for specifier, meaning in specifiers.items():
                value = value.replace(specifier, meaning)  # noqa: PLW2901 - one after the other
            assert "%" not in value, value
            variable, _, text = value.partition("=")
            found[variable] = text
    return found


def seconds(path: Path, name: str) -> float:
    """A length of time that is given as a plain number of seconds."""
    (value,) = (value for entry, value in entries(path) if entry == name)
    return float(value)

"""The programs that the service files are for, and the server as those programs start it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = [
    "DEPLOY",
    "accepts",
    "free_port",
    "program",
    "replaced",
    "said_by",
]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

# Where Debian puts what is mostly for root.
_PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """
    The path of a program that must be there.

    @raise RuntimeError: it is not.
    """
    found = shutil.which(name, path=_PLACES)
    if found is None:
        raise RuntimeError(
            f"The tests of the service files need {name!r}. The README says what to install."
        )
    return found


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """
    A shipped file as a test needs it: with places of the test's own, otherwise untouched.

    @param changes: each must be in the text; it is replaced wherever it stands.
    """
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in the file any more"
        text = text.replace(old, new)
    return text


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens, to be told to programs that cannot choose one themselves."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(address: str | tuple[str, int]) -> bool:
    """Whether somebody listens there: a host and a port, or the path of a socket."""
    family = socket.AF_UNIX
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as client, suppress(OSError):
        client.connect(address)
        return True
    return False


def said_by(*argv: str, cwd: Path | None = None) -> str:
    """
    Run a program to its end and return all that it says.

    @raise AssertionError: it failed.
    """
    done = subprocess.run(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout

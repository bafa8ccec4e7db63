"""
Workspaces: from the name in a request to a directory that exists and lies where it should.

The functions here block on the file system; the caller runs them in a thread.  They hold no state,
so any number may run at once.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from claude_proxy.errors import Failure, ProxyError

__all__ = ["NAME", "Probe", "Workspaces", "check_name"]

_SHARED = "shared_workspace"
_NAMED = "workspace"
_SHOWN = 80
_EFFECTIVE_IDS = os.access in os.supports_effective_ids

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
"""What a workspace may be called."""

_IN_THE_WAY = (
    "something that is not a directory is in the way",
    "Remove or rename it on the server",
)
_NOT_ALLOWED = (
    "permission was denied",
    "Give the user that runs the server read, write and search permission there",
)
_FULL = ("no space is left", "Free some space, or raise the quota, on the server")
_CAUSES = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: (
        "the file system is read-only",
        "Make it writable, or set WORKSPACE_BASE_PATH to a directory that is",
    ),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENOENT: (
        "a link there leads nowhere, or the directory was removed just now",
        "Remove the link on the server, or try again",
    ),
    errno.ELOOP: ("the links there lead in a circle", "Remove them on the server"),
    errno.ENAMETOOLONG: (
        "the path is too long",
        "Use a shorter name, or set WORKSPACE_BASE_PATH to a shorter path",
    ),
}


class Probe(NamedTuple):
    """What may be done in the shared workspace, for the health check."""

    readable: bool
    writable: bool
    path: Path


def check_name(name: str) -> None:
    """
    Refuse what is no workspace name.

    @raise ProxyError: INVALID_VALUE unless it is 1 to 64 of letters, digits, `.`, `_`, `-` and
        does not start with a dot.
    """
    if not NAME.fullmatch(name):
        shown = repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")
        raise ProxyError(
            Failure.INVALID_VALUE,
            f"{shown} is no workspace name. Use 1 to 64 of the letters A to Z in either case, "
            "digits, '.', '_' and '-', and do not start with a dot.",
            param="workspace",
        )


class Workspaces:
    """
    The workspaces under one base directory.

    @param base: holds `shared_workspace/` and `workspace/NAME/`; made when it is first needed.  It
        may itself be a link.
    """

    def __init__(self, base: Path) -> None:
        self._base = base

    def open(self, name: str | None) -> Path:
        """
        The real path of a workspace, made if this is its first use.  Blocks.

        @param name: None for the shared workspace.
        @raise ProxyError: INVALID_VALUE for a bad name or one that leads out of its place,
            WORKSPACE_UNAVAILABLE with the cause when the directory cannot be made or used.
        """
        if name is not None:
            check_name(name)
        base = _base_directory(self._base)
        # A level is made only after the one above was found to be where it should, so that
        # nothing is ever made on the far side of a link.
        if name is None:
            return _usable(_inner_directory(base, _SHARED, _SHARED), _SHARED)
        label = f"{_NAMED}/{name}"
        return _usable(_inner_directory(_inner_directory(base, _NAMED, _NAMED), name, label), label)

    def probe(self) -> Probe:
        """Whether the shared workspace can be used; makes it if it is missing.  Blocks."""
        try:
            path = self.open(None)
        except ProxyError:
            return Probe(readable=False, writable=False, path=self._base / _SHARED)
        return Probe(readable=True, writable=_may(path, os.W_OK | os.X_OK), path=path)


def _base_directory(base: Path) -> Path:
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(os.path.realpath(base, strict=True))
    except OSError as error:
        raise _unavailable("base directory (WORKSPACE_BASE_PATH)", error) from error


def _inner_directory(parent: Path, name: str, label: str) -> Path:
    """The real path of a directory that must lie within `parent`, itself a real path."""
    path = parent / name
    try:
        try:
            path.mkdir()
        except OSError:
            # Which error an existing directory gives depends on the system and the mount.
            if not os.path.lexists(path):
                raise
        real = Path(os.path.realpath(path))
        if parent not in real.parents:
            raise ProxyError(
                Failure.INVALID_VALUE,
                f"The workspace directory '{label}' is a link that leads out of its place and is "
                "not used. Use another workspace, or replace the link on the server by a directory "
                "(WORKSPACE_BASE_PATH itself may be a link).",
                param="workspace",
            )
        if not stat.S_ISDIR(real.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise _unavailable(f"directory '{label}'", error) from error
    return real


def _usable(path: Path, label: str) -> Path:
    if not _may(path, os.R_OK | os.X_OK):
        raise _unavailable(f"directory '{label}'", PermissionError(errno.EACCES, ""))
    return path


def _may(path: Path, mode: int) -> bool:
    # A server that gave up its privileges may still have them as its real user.
    return os.access(path, mode, effective_ids=_EFFECTIVE_IDS)


def _unavailable(what: str, error: OSError) -> ProxyError:
    """Says the cause in words; never the path on the host, which is not the client's to know."""
    unknown = (
        f"the system says '{error.strerror}'",
        "Look at this directory and its file system on the server",
    )
    cause, remedy = _CAUSES.get(error.errno or 0, unknown)
    return ProxyError(
        Failure.WORKSPACE_UNAVAILABLE,
        f"The workspace {what} cannot be used: {cause}. {remedy}.",
    )

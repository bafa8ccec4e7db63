"""
One server for one state directory.

The lock is the kernel's, so that it ends with its process, however that ends; the file stays and
says who holds it.  Beside it lies the id of the state directory, which outlives every server: child
processes are marked with it, so that a later server recognises what an earlier one left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from uuid import uuid4

__all__ = ["StateInUse", "StateLock"]

_HEX_ID = re.compile(r"[0-9a-f]{32}")


class StateInUse(Exception):  # noqa: N818  # it says what is the case, and the server survives it
    """Another server works on this state directory; the text is a sentence that says which."""


class StateLock:
    """The right to be the only server on a state directory."""

    def __init__(self, directory: Path) -> None:
        """Nothing is touched before `acquire`."""
        self._directory = directory
        self._descriptor: int | None = None
        self._ids: tuple[str, str] | None = None

    @property
    def state_id(self) -> str:
        """
        The id of the directory: 32 hexadecimal digits, made once.

        Raises RuntimeError before `acquire`.
        """
        return self._acquired()[0]

    @property
    def run_id(self) -> str:
        """
        The id of this holding of the lock: 32 hexadecimal digits, fresh every time.

        Raises RuntimeError before `acquire`.
        """
        return self._acquired()[1]

    def acquire(self) -> None:
        """
        Take the lock, and make the directory if it is missing.

        A fork shares the lock; the process that is to hold it says so by `record_owner`.

        Raises StateInUse if somebody holds it, and OSError if the directory cannot be used.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._ids = (self._make_state_id(), uuid4().hex)
            self._write_owner(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 100).split(b"\n")[0].decode("ascii", "replace")
            os.close(descriptor)
            raise StateInUse(
                f"The state directory {self._directory} is in use by the process "
                f"{holder or '(not known yet)'}. Stop that one, or set STATE_PATH to another "
                "directory."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def record_owner(self) -> None:
        """Write this process's id into the lock file: it may have forked since `acquire`."""
        if self._descriptor is not None:
            self._write_owner(self._descriptor)

    def _write_owner(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n{self.run_id}\n".encode(), 0)

    def release(self) -> None:
        """Let another server have the directory.  May be called again, and without the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _acquired(self) -> tuple[str, str]:
        if self._ids is None:
            raise RuntimeError("The ids of a state directory are known once its lock is held.")
        return self._ids

    def _make_state_id(self) -> str:
        path = self._directory / "state-id"
        try:
            text = path.read_text("ascii", "replace").strip()
        except FileNotFoundError:
            text = ""
        if _HEX_ID.fullmatch(text):
            return text
        # Written aside and renamed: a crash leaves the whole id or none.
        fresh = uuid4().hex
        draft = self._directory / "state-id.new"
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  # only open() takes a descriptor
            file.write(f"{fresh}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return fresh

"""One server for one state directory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from claude_proxy.sessions.statelock import StateInUse, StateLock

HOLDER = """
import sys
from pathlib import Path
from claude_proxy.sessions.statelock import StateLock
lock = StateLock(Path(sys.argv[1]))
lock.acquire()
print(lock.run_id, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds the lock, and the id of its run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_the_holder_and_its_run_stand_in_the_lock(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n{lock.run_id}\n"
    lock.release()


def test_a_lock_held_by_another_process_names_it_and_the_way_out(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, run_id):
        lock = StateLock(tmp_path)
        with pytest.raises(StateInUse, match=rf"process {process.pid}\. .* set STATE_PATH"):
            lock.acquire()
        assert (tmp_path / "lock").read_text() == f"{process.pid}\n{run_id}\n"
        lock.release()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process(tmp_path: Path, how: signal.Signals) -> None:
    with holder(tmp_path) as (process, _):
        process.send_signal(how)
        process.wait(60)
        lock = StateLock(tmp_path)
        lock.acquire()
        lock.release()


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        lock.release()
        StateLock(tmp_path).acquire()


def test_a_holder_that_has_not_written_its_pid_yet_is_still_respected(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    (tmp_path / "lock").write_text("")
    with pytest.raises(StateInUse, match="not known yet"):
        StateLock(tmp_path).acquire()
    lock.release()


def test_a_lock_is_taken_once_even_by_the_same_process(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    run_id = lock.run_id
    with pytest.raises(StateInUse, match=f"process {os.getpid()}"):
        lock.acquire()
    assert lock.run_id == run_id
    lock.release()
    lock.acquire()
    lock.release()


def test_releasing_is_idempotent_and_needs_no_lock(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.release()
    lock.acquire()
    lock.release()
    lock.release()


def test_a_shorter_pid_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("x" * 500)
    lock = StateLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n{lock.run_id}\n"
    lock.release()


def test_the_directory_keeps_its_id_and_every_run_has_its_own(tmp_path: Path) -> None:
    ids = []
    for _ in range(3):
        lock = StateLock(tmp_path)
        lock.acquire()
        ids.append((lock.state_id, lock.run_id))
        lock.release()
    state_ids, run_ids = zip(*ids, strict=True)
    assert len(set(state_ids)) == 1
    assert len(set(run_ids)) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in state_ids + run_ids)


@pytest.mark.parametrize("content", [b"", b"0123", b"\xff\xfe", b"../../etc/passwd\n"])
def test_an_id_that_is_none_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state-id").write_bytes(content)
    (tmp_path / "state-id.new").write_text("left behind by a crash")
    lock = StateLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "state-id").read_text() == f"{lock.state_id}\n"
    assert re.fullmatch("[0-9a-f]{32}", lock.state_id)
    assert not (tmp_path / "state-id.new").exists()
    lock.release()


def test_the_ids_are_not_known_before_the_lock_is_held(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    with pytest.raises(RuntimeError, match="once its lock is held"):
        _ = lock.state_id
    with pytest.raises(RuntimeError, match="once its lock is held"):
        _ = lock.run_id


def test_everything_is_for_the_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    old = os.umask(0)
    try:
        lock = StateLock(directory)
        lock.acquire()
    finally:
        os.umask(old)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in directory.iterdir()}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert modes == {"lock": 0o600, "state-id": 0o600}
    lock.release()


def test_a_file_in_the_way_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(OSError, match="file"):
            StateLock(directory).acquire()


def test_a_directory_that_takes_no_id_is_let_go_again(tmp_path: Path) -> None:
    (tmp_path / "state-id").mkdir()
    with pytest.raises(IsADirectoryError):
        StateLock(tmp_path).acquire()
    (tmp_path / "state-id").rmdir()
    lock = StateLock(tmp_path)
    lock.acquire()
    lock.release()

"""Ending what agents leave behind: real processes under a marker of each test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, cast
from uuid import uuid4

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorThreads, IReactorTime
from twisted.logger import capturedLogs

from claude_proxy.cli import sweep
from claude_proxy.cli.command import MARKER
from claude_proxy.cli.sweep import GATHERED, Sweeper, end_marked
from tests.support import FakeReactor, in_reactor, result_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")

LIMIT = 30  # seconds that no process of a test ever needs

# Says that it is there and stays, in one process that neither forks nor executes anything.
STAY = "echo; read -r forever"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(name="marker")
def _marker() -> str:
    return f"test.{uuid4()}"


@pytest.fixture(name="start")
def _start() -> Iterator[Start]:
    """Start a shell script, by default as the leader of a session; wait for its first line."""
    started = []

    def start(marker: str | None, script: str = STAY) -> subprocess.Popen[str]:
        environment = {"PATH": os.defpath} | ({} if marker is None else {MARKER: marker})
        child = subprocess.Popen(
            ["/bin/sh", "-c", script],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return child

    yield start
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate(timeout=LIMIT)


def alive(child: subprocess.Popen[str]) -> bool:
    return child.poll() is None


def test_a_marked_process_in_its_own_session_is_killed(start: Start, marker: str) -> None:
    child = start(marker)
    assert end_marked(marker.__eq__) == 1
    assert child.wait(LIMIT) == -signal.SIGKILL


def test_what_ignores_polite_signals_is_killed_too(start: Start, marker: str) -> None:
    child = start(marker, f"trap '' TERM INT HUP; {STAY}")
    assert end_marked(marker.__eq__) == 1
    assert child.wait(LIMIT) == -signal.SIGKILL


def test_what_a_marked_process_has_put_into_another_session_is_found(
    start: Start, marker: str
) -> None:
    # Its parent has gone: only the environment tells where it came from.
    parent = start(marker, "exec 3<&0; setsid sh -c 'echo; read -r forever <&3' &")
    assert parent.wait(LIMIT) == 0
    assert end_marked(marker.__eq__) == 1
    parent.communicate(timeout=LIMIT)  # the end of its output: nobody holds the pipe any more


def test_processes_without_a_wanted_marker_are_left_alone(start: Start, marker: str) -> None:
    others = [
        start(None),
        start(f"{marker}.other"),
        start(f"x{marker}"),
        start(None, f"export {MARKER}_2={marker} NOT_{MARKER}={marker}; exec sh -c '{STAY}'"),
        start(None, f"{STAY} # {MARKER}={marker}"),
    ]
    wanted = start(marker)
    end_marked(marker.__eq__)
    wanted.wait(LIMIT)
    assert all(map(alive, others))


def test_a_process_that_clears_its_marker_is_not_found(start: Start, marker: str) -> None:
    child = start(marker, f"exec env -u {MARKER} sh -c '{STAY}'")
    assert end_marked(marker.__eq__) == 0
    assert alive(child)


def test_every_marker_is_offered_as_it_is(start: Start, marker: str) -> None:
    child = start(f"{marker} größe=1\udcff")
    seen = []

    def wanted(found: str) -> bool:
        if found.startswith(marker):
            seen.append(found)
        return False

    assert end_marked(wanted) == 0
    assert set(seen) == {f"{marker} größe=1\ufffd"}
    assert alive(child)


def test_the_one_who_sweeps_is_never_swept(marker: str) -> None:
    script = (
        "import subprocess\n"
        "from claude_proxy.cli.sweep import end_marked\n"
        f"stay = ['/bin/sh', '-c', {STAY!r}]\n"
        "child = subprocess.Popen(stay, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"print(end_marked({marker!r}.__eq__), child.wait())\n"
    )
    environment = {**os.environ, MARKER: marker}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    assert done.stdout == "1 -9\n"


def test_a_process_is_counted_once_however_long_it_takes_to_die(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = []

    def send(held: int, number: int) -> None:
        signals.append(number)

    child = start(marker)
    monkeypatch.setattr(signal, "pidfd_send_signal", send)
    assert end_marked(marker.__eq__) == 1
    assert signals == [signal.SIGKILL] * sweep._PASSES
    assert alive(child)


def test_a_process_that_has_gone_meanwhile_is_no_error(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> NoReturn:
        raise ProcessLookupError

    start(marker)
    with monkeypatch.context() as before_it_is_held:
        before_it_is_held.setattr(os, "pidfd_open", gone)
        assert end_marked(marker.__eq__) == 0
    monkeypatch.setattr(signal, "pidfd_send_signal", gone)
    assert end_marked(marker.__eq__) == 0


@pytest.mark.parametrize("then", [None, "another"])
def test_a_pid_that_changed_hands_is_not_signalled(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch, then: str | None
) -> None:
    child = start(marker)
    pid = str(child.pid)
    reads = []

    def environment_of(of: str) -> bytes | None:
        if of != pid:
            return None
        reads.append(of)
        shown = marker if len(reads) % 2 else then
        return b"" if shown is None else f"{MARKER}={shown}".encode()

    held: list[int] = []
    open_pid = os.pidfd_open

    def hold(of: int) -> int:
        held.append(open_pid(of))
        return held[-1]

    monkeypatch.setattr(os, "pidfd_open", hold)
    monkeypatch.setattr(sweep, "_environment_of", environment_of)
    assert end_marked(marker.__eq__) == 0
    assert alive(child)
    assert len(held) == sweep._PASSES
    for descriptor in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_nothing_is_swept_where_the_system_cannot_show_or_hold_processes(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = start(marker)
    with monkeypatch.context() as without_proc:
        without_proc.setattr(sweep, "_PROC", tmp_path / "proc")
        assert end_marked(marker.__eq__) == 0
    monkeypatch.delattr(os, "pidfd_open")
    assert end_marked(marker.__eq__) == 0
    assert alive(child)


# Sweeping in a thread.


class Sweeps:
    """Takes the place of `end_marked`; knows which of the markers each sweep wanted."""

    def __init__(self, *markers: str) -> None:
        self.markers = markers
        self.wanted: list[set[str]] = []
        self.answer: int | OSError = 0

    def __call__(self, wanted: Callable[[str], bool]) -> int:
        self.wanted.append({marker for marker in self.markers if wanted(marker)})
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@pytest.fixture(name="sweeps")
def _sweeps(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    sweeps = Sweeps("a", "b", "c", "d")
    monkeypatch.setattr(sweep, "end_marked", sweeps)
    return sweeps


def _sweeper(fake: FakeReactor) -> Sweeper:
    return Sweeper(cast(IReactorThreads, fake), fake)


def test_markers_that_come_soon_after_each_other_share_a_sweep(sweeps: Sweeps) -> None:
    fake = FakeReactor()
    sweeper = _sweeper(fake)
    sweeper.sweep("a")
    fake.advance(GATHERED - 0.01)
    sweeper.sweep("b")
    assert sweeps.wanted == []
    fake.advance(0.01)
    assert sweeps.wanted == [{"a", "b"}]
    fake.advance(10 * GATHERED)
    assert sweeps.wanted == [{"a", "b"}]
    sweeper.sweep("c")
    fake.advance(GATHERED)
    assert sweeps.wanted[1:] == [{"c"}]


def test_markers_that_come_during_a_sweep_share_the_next(sweeps: Sweeps) -> None:
    fake = FakeReactor()
    sweeper = _sweeper(fake)
    fake.hold_threads()
    sweeper.sweep("a")
    fake.advance(GATHERED)
    for marker in ("b", "c", "b"):
        sweeper.sweep(marker)
    fake.advance(10 * GATHERED)
    assert sweeps.wanted == []
    fake.release_threads()
    assert sweeps.wanted == [{"a"}]
    fake.advance(GATHERED)
    assert sweeps.wanted == [{"a"}, {"b", "c"}]


def test_finishing_waits_for_every_sweep(sweeps: Sweeps) -> None:
    fake = FakeReactor()
    sweeper = _sweeper(fake)
    result_of(sweeper.finish())
    fake.hold_threads()
    sweeper.sweep("a")
    fake.advance(GATHERED)
    sweeper.sweep("b")
    waiting = [Deferred.fromCoroutine(sweeper.finish()) for _ in range(2)]
    assert [waiter.called for waiter in waiting] == [False, False]
    fake.release_threads()
    assert [waiter.called for waiter in waiting] == [True, True]
    assert sweeps.wanted == [{"a"}, {"b"}]
    result_of(sweeper.finish())


def test_finishing_gathers_no_longer(sweeps: Sweeps) -> None:
    fake = FakeReactor()
    sweeper = _sweeper(fake)
    sweeper.sweep("a")
    result_of(sweeper.finish())
    assert sweeps.wanted == [{"a"}]
    assert fake.getDelayedCalls() == []


def test_what_was_left_behind_is_counted_in_the_log(sweeps: Sweeps) -> None:
    sweeper = _sweeper(FakeReactor())
    with capturedLogs() as logs:
        assert result_of(sweeper.sweep_where("a".__eq__)) == 0
    assert logs == []
    sweeps.answer = 3
    with capturedLogs() as logs:
        assert result_of(sweeper.sweep_where(lambda marker: marker in "bc")) == 3
    assert [(log["type"], log["count"]) for log in logs] == [("sweep", 3)]
    assert sweeps.wanted == [{"a"}, {"b", "c"}]


def test_a_sweep_that_cannot_be_done_is_logged_and_does_not_stop_the_next(sweeps: Sweeps) -> None:
    fake = FakeReactor()
    sweeper = _sweeper(fake)
    sweeps.answer = PermissionError(13, "Permission denied", "/proc")
    sweeper.sweep("a")
    with capturedLogs() as logs:
        fake.advance(GATHERED)
    assert [log["type"] for log in logs] == ["sweep_failed"]
    assert "Permission denied" in logs[0]["error"]
    sweeps.answer = 0
    sweeper.sweep("b")
    fake.advance(GATHERED)
    assert sweeps.wanted == [{"a"}, {"b"}]
    result_of(sweeper.finish())


@in_reactor
async def test_real_processes_are_swept_in_a_real_thread(start: Start, marker: str) -> None:
    children = [start(f"{marker}.1"), start(f"{marker}.2"), start(f"{marker}.3")]
    sweeper = Sweeper(cast(IReactorThreads, reactor), cast(IReactorTime, reactor))
    sweeper.sweep(f"{marker}.1")
    sweeper.sweep(f"{marker}.2")
    await sweeper.finish()
    assert [child.wait(LIMIT) for child in children[:2]] == [-signal.SIGKILL] * 2
    assert alive(children[2])
    assert await sweeper.sweep_where(lambda found: found.startswith(marker)) == 1
    assert children[2].wait(LIMIT) == -signal.SIGKILL


def test_a_process_that_shows_no_environment_for_an_instant_is_found(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start(marker)
    read = sweep._environment_of
    looks: list[str] = []

    def environment_of(pid: str) -> bytes | None:
        if pid == str(child.pid):
            looks.append(pid)
            return b"" if len(looks) == 1 else read(pid)
        return read(pid)

    monkeypatch.setattr(sweep, "_environment_of", environment_of)
    assert end_marked(marker.__eq__) == 1

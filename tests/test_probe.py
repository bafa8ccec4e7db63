"""Asking for the version: of real programs, and of a process played by the test."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure as TwistedFailure

from claude_proxy.cli import probe as probe_module
from claude_proxy.cli.probe import CliProbe, VersionReport
from claude_proxy.errors import Failure, ProxyError
from tests.support import FakeReactor, in_reactor, result_of

PATH = {"PATH": os.defpath}
LIMIT = 30  # seconds that no process of a test ever needs

MakeProgram = Callable[..., Path]


@pytest.fixture(name="program")
def _program(tmp_path: Path) -> MakeProgram:
    """Write an executable script; it finds its directory as $HERE and notes each of its starts."""

    def make(body: str, *, interpreter: str = "/bin/sh") -> Path:
        path = tmp_path / "claude"
        path.write_text(f"#!{interpreter}\nHERE='{tmp_path}'\necho $$ >> $HERE/starts\n{body}\n")
        path.chmod(0o755)
        return path

    return make


def starts(program: Path) -> list[int]:
    """The process ids of all starts."""
    noted = program.parent / "starts"
    return [int(line) for line in noted.read_text().split()] if noted.exists() else []


class Fixture:
    """A probe of a real program, with a clock that only the test moves."""

    def __init__(self, *cli: object, environment: Mapping[str, str] = PATH) -> None:
        self.clock = Clock()
        self.probe = CliProbe(
            cast(IReactorProcess, reactor), self.clock, tuple(map(str, cli)), environment
        )

    async def ask(self) -> VersionReport:
        return await Deferred.fromCoroutine(self.probe.ask()).addTimeout(LIMIT, cast(Any, reactor))

    async def fails(self, failure: Failure) -> VersionReport:
        report = await self.ask()
        assert report.error is not None
        assert report.error.failure is failure
        return report


async def until(condition: Callable[[], object]) -> None:
    """Let the reactor work until something real has happened."""
    for _ in range(LIMIT * 100):
        if condition():
            return
        await deferLater(cast(Any, reactor), 0.01)
    raise AssertionError("It never happened.")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


# Real programs.


@in_reactor
async def test_a_version_is_asked_for_and_remembered(program: MakeProgram) -> None:
    path = program("echo '2.1.197 (Claude Code)'")
    fixture = Fixture(path)
    assert await fixture.ask() == VersionReport("2.1.197 (Claude Code)", 0, None)
    can = await fixture.probe.capabilities()
    assert (can.version, can.late_prompts) == ("2.1.197", True)
    assert await fixture.probe.capabilities() is can
    assert len(starts(path)) == 1
    assert fixture.clock.getDelayedCalls() == []


@in_reactor
async def test_the_program_is_started_like_an_agent_but_with_nothing_to_read(
    program: MakeProgram, tmp_path: Path
) -> None:
    report = (
        "import json,os,sys\n"
        "e = os.environ\n"
        "json.dump([sys.argv[1:], sys.stdin.read(), os.getcwd(), os.getsid(0) == os.getpid(),"
        " e['PATH'], e['CLAUDE_PROXY_AGENT'], e['HOME']], open(e['OUT'], 'w'))\n"
        "print('1.0.128')\n"
    )
    out = tmp_path / "seen.json"
    path = tmp_path / "claude"
    path.write_text(f"#!{sys.executable} -IS\n{report}")
    path.chmod(0o755)
    environment = {"PATH": f".:{os.defpath}:bin", "HOME": "/home/me", "OUT": str(out)}
    fixture = Fixture(path, "--first", "-x y", environment=environment)
    assert fixture.probe.resolve() == [str(path), "--first", "-x y"]
    assert (await fixture.ask()).version == "1.0.128"
    assert json.loads(out.read_text()) == [
        ["--first", "-x y", "--version"],
        "",
        "/",
        True,
        os.defpath,
        "probe",
        "/home/me",
    ]


@in_reactor
async def test_a_program_is_looked_for_on_the_path_of_the_agents(program: MakeProgram) -> None:
    path = program("echo 1.0.24")
    fixture = Fixture("claude", environment={"PATH": f"{path.parent}:{os.defpath}"})
    assert fixture.probe.resolve() == [str(path)]
    assert (await fixture.probe.capabilities()).version == "1.0.24"


@in_reactor
@pytest.mark.parametrize(
    ("body", "version", "known_as"),
    [
        ("echo hello", "hello", "unknown"),
        ("true", None, "unknown"),
        ("printf '\\377\\n'", "\ufffd", "unknown"),
        ("echo 2.1.197 >&2", None, "unknown"),
        ("echo; echo '  1.0.24  '; echo noise >&2", "1.0.24", "1.0.24"),
    ],
)
async def test_what_is_no_version_is_taken_for_a_new_one(
    program: MakeProgram, body: str, version: str | None, known_as: str
) -> None:
    fixture = Fixture(program(body))
    assert await fixture.ask() == VersionReport(version, 0, None)
    assert (await fixture.probe.capabilities()).version == known_as


@in_reactor
async def test_of_a_flood_only_the_beginning_is_kept(program: MakeProgram) -> None:
    body = "echo 1.0.128; head -c 300000 /dev/zero | tr '\\0' x | tee /dev/stderr; echo last >&2"
    report = await Fixture(program(body)).ask()
    assert report.version is not None
    assert report.version.startswith("1.0.128\nxxx")
    assert len(report.version) == 4096
    assert report.error is None


@in_reactor
@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        (
            "echo first >&2; echo 'no good' >&2; exit 3",
            3,
            "The Claude CLI did not tell its version (exit code 3). no good",
        ),
        ("exit 1", 1, "The Claude CLI did not tell its version (exit code 1)."),
        ("kill -9 $$", None, "The Claude CLI did not tell its version (a signal)."),
    ],
)
async def test_a_program_that_fails_is_a_failure_with_its_last_words(
    program: MakeProgram, body: str, code: int | None, sentence: str
) -> None:
    path = program(body)
    fixture = Fixture(path)
    report = await fixture.fails(Failure.CLI_FAILED)
    assert (report.version, report.exit_code) == (None, code)
    assert str(report.error) == f"cli_failed: {sentence}"
    with pytest.raises(ProxyError) as caught:
        await fixture.probe.capabilities()
    assert caught.value.failure is Failure.CLI_FAILED
    assert len(starts(path)) == 2, "a failure is not remembered"


@in_reactor
@pytest.mark.parametrize("interpreter", ["/none/node", "/usr/bin/env no-such-node"])
async def test_a_program_whose_interpreter_is_missing_was_not_found(
    program: MakeProgram, interpreter: str
) -> None:
    report = await Fixture(program("", interpreter=interpreter)).fails(Failure.CLI_NOT_FOUND)
    assert report.exit_code in (126, 127)
    assert report.error is not None
    assert report.error.message.startswith(Failure.CLI_NOT_FOUND.sentence)
    assert "o such file" in report.error.message or "not found" in report.error.message


@in_reactor
@pytest.mark.parametrize("name", ["/none/claude", "claude-that-is-nowhere"])
async def test_a_missing_program_is_told_without_a_start(name: str) -> None:
    fixture = Fixture(name)
    report = await fixture.fails(Failure.CLI_NOT_FOUND)
    assert (report.version, report.exit_code) == (None, None)
    assert await fixture.probe.report() is report
    with pytest.raises(ProxyError) as caught:
        await fixture.probe.capabilities()
    assert caught.value.failure is Failure.CLI_NOT_FOUND


@in_reactor
async def test_a_program_that_hangs_is_ended_with_all_that_it_started(program: MakeProgram) -> None:
    path = program("sleep 1000 & echo $! >> $HERE/starts\necho 2.1\nwait")
    fixture = Fixture(path)
    asking = Deferred.fromCoroutine(fixture.probe.ask())
    await until(lambda: len(starts(path)) == 2)
    fixture.clock.advance(4.9)
    assert not asking.called
    assert not any(map(gone, starts(path)))
    fixture.clock.advance(0.1)
    report = await asking
    assert (report.version, report.exit_code) == (None, None)
    assert str(report.error) == (
        "cli_failed: The Claude CLI did not tell its version within 5 seconds."
    )
    await until(lambda: all(map(gone, starts(path))))
    assert fixture.clock.getDelayedCalls() == []


@in_reactor
async def test_what_a_program_leaves_in_its_group_is_ended(program: MakeProgram) -> None:
    path = program("sleep 1000 & echo $! >> $HERE/starts\necho 1.0.24")
    assert (await Fixture(path).ask()).version == "1.0.24"
    await until(lambda: all(map(gone, starts(path))))


@in_reactor
async def test_what_keeps_the_pipes_open_is_not_waited_for(program: MakeProgram) -> None:
    keep = "setsid sh -c 'echo $$ >> $HERE/starts; exec sleep 1000' &"
    ready = "while [ $(wc -l < $HERE/starts) -lt 2 ]; do :; done"
    path = program(f"export HERE; {keep}\n{ready}\necho 1.0.24")
    fixture = Fixture(path)
    asking = Deferred.fromCoroutine(fixture.probe.ask())
    await until(lambda: len(starts(path)) == 2 and gone(starts(path)[0]))
    keeper = starts(path)[1]
    try:
        await until(lambda: fixture.clock.getDelayedCalls()[0].getTime() < 5)
        fixture.clock.advance(1)
        assert (await asking) == VersionReport("1.0.24", 0, None)
        assert not gone(keeper)
    finally:
        os.kill(keeper, signal.SIGKILL)


@in_reactor
async def test_simultaneous_callers_share_one_process(program: MakeProgram) -> None:
    path = program("echo 2.1.197")
    fixture = Fixture(path)
    probe = fixture.probe
    asked = [Deferred.fromCoroutine(ask()) for ask in (probe.ask, probe.report, probe.ask)]
    able = Deferred.fromCoroutine(probe.capabilities())
    reports = [await asking for asking in asked]
    assert reports == [VersionReport("2.1.197", 0, None)] * 3
    assert (await able).version == "2.1.197"
    assert len(starts(path)) == 1


@in_reactor
async def test_a_program_that_was_replaced_is_asked_again(program: MakeProgram) -> None:
    path = program("echo 1.0.24")
    fixture = Fixture(path)
    assert (await fixture.probe.capabilities()).version == "1.0.24"
    was = path.stat()
    program("echo 1.0.128")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (await fixture.probe.capabilities()).version == "1.0.128", "another size"
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    assert (await fixture.probe.capabilities()).version == "1.0.128", "another time"
    assert len(starts(path)) == 3
    assert (await fixture.probe.capabilities()).version == "1.0.128"
    assert len(starts(path)) == 3
    path.unlink()
    with pytest.raises(ProxyError):
        await fixture.probe.capabilities()


@in_reactor
async def test_the_health_check_gets_a_report_of_the_last_ten_seconds(program: MakeProgram) -> None:
    path = program("echo 1.0.24")
    fixture = Fixture(path)
    first = await fixture.probe.report()
    fixture.clock.advance(9.9)
    assert await fixture.probe.report() is first
    assert len(starts(path)) == 1
    fixture.clock.advance(0.1)
    assert await fixture.probe.report() == first
    assert len(starts(path)) == 2
    await fixture.probe.ask()
    assert len(starts(path)) == 3


# A process played by the test.


class Played:
    """A probe of a program that exists, and whose processes are played."""

    def __init__(self, program: Path) -> None:
        self.reactor = FakeReactor()
        self.probe = CliProbe(cast(Any, self.reactor), self.reactor, (str(program),), PATH)


@pytest.fixture(name="played")
def _played(program: MakeProgram, monkeypatch: pytest.MonkeyPatch) -> Played:
    def killpg(group: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "killpg", killpg)
    return Played(program("exit 1"))


def test_output_may_come_after_the_exit_was_noticed(played: Played) -> None:
    asking = Deferred.fromCoroutine(played.probe.ask())
    protocol = played.reactor.children[0].protocol
    protocol.processExited(TwistedFailure(ProcessDone(0)))
    played.reactor.advance(0)
    protocol.outReceived(b"1.0.24")
    protocol.outReceived(b" (Claude Code)\n")
    protocol.processEnded(TwistedFailure(ProcessDone(0)))
    assert result_of(asking) == VersionReport("1.0.24 (Claude Code)", 0, None)
    assert result_of(played.probe.capabilities()).version == "1.0.24"
    assert played.reactor.getDelayedCalls() == []


def test_pipes_that_stay_open_are_closed_soon_after_the_exit(played: Played) -> None:
    asking = Deferred.fromCoroutine(played.probe.ask())
    child = played.reactor.children[0]
    child.protocol.outReceived(b"1.0.24")
    child.protocol.processExited(TwistedFailure(ProcessDone(0)))
    played.reactor.advance(1)
    assert child.pipes_closed
    child.protocol.processEnded(TwistedFailure(ProcessDone(0)))
    assert result_of(asking) == VersionReport("1.0.24", 0, None)
    assert played.reactor.getDelayedCalls() == []


def test_a_late_end_after_the_limit_changes_nothing(played: Played) -> None:
    asking = Deferred.fromCoroutine(played.probe.ask())
    child = played.reactor.children[0]
    played.reactor.advance(5)
    report = result_of(asking)
    assert child.pipes_closed
    child.protocol.outReceived(b"1.0.24")
    child.exits()
    assert result_of(played.probe.report()) is report
    assert played.reactor.getDelayedCalls() == []


def test_a_start_that_the_system_refuses_is_told(played: Played) -> None:
    played.reactor.spawn_error = OSError(12, "Cannot allocate memory")
    report = result_of(played.probe.ask())
    assert report.error.failure is Failure.CLI_NOT_FOUND
    assert report.error.message.endswith("The system said: Cannot allocate memory")
    again = Deferred.fromCoroutine(played.probe.ask())
    assert len(played.reactor.children) == 1
    played.reactor.children[0].exits()
    assert result_of(again).error is None


def test_a_program_that_vanishes_between_two_looks_was_not_found(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "resolve_program", lambda name, path: "/none/claude")
    report = result_of(played.probe.ask())
    assert report.error.failure is Failure.CLI_NOT_FOUND
    assert played.reactor.children == []


def test_a_caller_who_gives_up_does_not_disturb_the_others(played: Played) -> None:
    impatient = Deferred.fromCoroutine(played.probe.ask())
    patient = Deferred.fromCoroutine(played.probe.ask())
    impatient.cancel()
    with pytest.raises(CancelledError):
        result_of(impatient)
    child = played.reactor.children[0]
    child.protocol.outReceived(b"1.0.24")
    child.exits()
    assert result_of(patient) == VersionReport("1.0.24", 0, None)
    assert len(played.reactor.children) == 1

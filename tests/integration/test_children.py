"""Agent processes that misbehave: what the client is told, and that nothing is left of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from twisted.internet import defer

from claude_proxy import tap
from claude_proxy.cli.command import MARKER
from tests.integration.bad_days import (
    Step,
    ask,
    events_of,
    misbehaving,
    nothing_left,
    quick_ladder,
)
from tests.integration.server import Running, is_alive, reactor, until
from tests.support import Answer, in_reactor

MIB = 1024 * 1024

SPOKE: list[Step] = [["init"], ["say", "half an ans"]]
"""How most of the turns begin that come to a bad end."""


@pytest.fixture
def quick() -> Iterator[None]:
    """Do not wait a whole second on each polite rung of the kill ladder."""
    with quick_ladder():
        yield


def check_told(answer: Answer, status: int, code: str, sentence: str) -> None:
    """Check the envelope of a failure that has its true status."""
    assert answer.status == status
    assert (answer.error["code"], answer.error["message"]) == (code, sentence)


def check_told_late(answer: Answer, subtype: str, code: str, sentence: str) -> None:
    """Check a stream that broke off after `SPOKE`."""
    *before, last = events_of(answer)
    assert [event["type"] for event in before] == ["system", "assistant"]
    assert (last["type"], last["subtype"], last["is_error"]) == ("result", subtype, True)
    assert (last["error"]["code"], last["error"]["message"]) == (code, sentence)
    assert last["result"] == sentence
    assert last["session_id"] == answer.headers["x-claude-session-id"]


def check_answered(answer: Answer, text: str = "done") -> None:
    """Check that a turn has succeeded, whatever else happened."""
    events = events_of(answer)
    assert [event["type"] for event in events if event["type"] == "result"] == ["result"]
    assert events[-1]["result"] == text
    assert events[-1]["is_error"] is False


# What all tests here rely on.

LEAKS: dict[str, Callable[[Running, Path], Any]] = {
    "descriptors": lambda _, path: path.open("w"),
    "files": lambda server, _: (server.executor.context.settings.run_directory / "x").touch(),
    "leases": lambda server, _: server.executor.context.leases.claim("a session"),
    "marked": lambda server, _: subprocess.Popen(
        ["sleep", "20"], env={MARKER: server.executor.context.next_marker()}
    ),
    "timers": lambda _, __: reactor.callLater(20, list),
    "log_failure": lambda _, __: defer.fail(OSError("nobody cares")) and None,
}


@in_reactor
@pytest.mark.parametrize("kind", LEAKS)
async def test_what_is_left_behind_would_be_noticed(tmp_path: Path, kind: str) -> None:
    async with misbehaving(tmp_path) as server:
        with pytest.raises(AssertionError, match=kind):
            async with nothing_left(server, limit=0.3):
                leaked = LEAKS[kind](server, tmp_path / "leaked")
        if isinstance(leaked, subprocess.Popen):
            leaked.kill()
            leaked.wait()
        elif kind == "timers":
            leaked.cancel()
        elif kind == "descriptors":
            leaked.close()


# Programs that cannot be started.

INSTALL = (
    "Install the Claude CLI on the server with 'npm install -g @anthropic-ai/claude-code', "
    "or set CLAUDE_CLI to its path."
)


CANNOT = (
    "The Claude CLI cannot be started on the server. Install it with "
    "'npm install -g @anthropic-ai/claude-code', or set CLAUDE_CLI to its path. "
    "The system said: "
)


class Unusable(NamedTuple):
    """A file that cannot be started as a program, and what is said of it, from where to where."""

    content: str | None
    mode: int
    begins: str
    ends: str = ""


UNUSABLE = {
    "missing": Unusable(
        None, 0, f"The Claude CLI was not found where CLAUDE_CLI points. {INSTALL}"
    ),
    "not executable": Unusable(
        "#!/bin/sh\n", 0o644, f"CLAUDE_CLI is not an executable file. {INSTALL}"
    ),
    # The shell's words, which differ from shell to shell.
    "without its interpreter": Unusable("#!/no/such/interpreter\n", 0o755, CANNOT, "not found"),
    "of another machine": Unusable("\x7fELF\0\0\0\0", 0o755, CANNOT, "Exec format error"),
}


@in_reactor
@pytest.mark.parametrize("kind", UNUSABLE)
async def test_a_program_that_cannot_be_started_is_a_503_that_says_why(
    tmp_path: Path, kind: str
) -> None:
    program = tmp_path / "claude"
    unusable = UNUSABLE[kind]
    if unusable.content is not None:
        program.write_text(unusable.content)
        program.chmod(unusable.mode)
    async with misbehaving(tmp_path, CLAUDE_CLI=str(program)) as server, nothing_left(server):
        for stream in (False, True):
            answer = await ask(server, "hello", stream=stream)
            assert (answer.status, answer.error["code"]) == (503, "cli_not_found")
            message = str(answer.error["message"])
            assert message.startswith(unusable.begins)
            assert message.endswith(unusable.ends)


@in_reactor
async def test_a_program_that_vanishes_is_missed_and_found_again(tmp_path: Path) -> None:
    program = tmp_path / "claude"
    aside = tmp_path / "aside"
    real = Path(__file__).with_name("bad_cli.py")
    words = [sys.executable, "-I", "-S", str(real), str(tmp_path)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)
    async with misbehaving(tmp_path, CLAUDE_CLI=str(program)) as server, nothing_left(server):
        program.rename(aside)
        for stream in (False, True):
            answer = await ask(server, "hello", stream=stream)
            check_told(answer, 503, "cli_not_found", UNUSABLE["missing"].begins)
        aside.rename(program)
        check_answered(await ask(server, "hello"))


# Processes that end without a result.


class Failing(NamedTuple):
    """What a process does before it has said anything, and what is told of it."""

    script: list[Step]
    told: str
    model: str | None = None


FAILING = {
    "at once": Failing([], "(exit code 3).", "exits"),
    "at once with a word on stderr": Failing([], "(exit code 3): not today", "complains"),
    "without a word": Failing([["exit_with", 3]], "(exit code 3)."),
    "with a word on stderr": Failing(
        [["complain", "not today"], ["exit_with", 3]], "(exit code 3): not today"
    ),
    "well but without a result": Failing([["exit_with", 0]], "(exit code 0)."),
    "with half a line": Failing(
        [["say_bytes", '{"type":"assistant","tex'], ["exit_with", 1]], "(exit code 1)."
    ),
    "with garbage only": Failing(
        [["say_bytes", "Segmentation \xff\xfe\n\n\0\n[1]\n"], ["exit_with", 1]], "(exit code 1)."
    ),
    "by a signal": Failing([["die", "SIGSEGV"]], "(signal 11)."),
    "by the system": Failing([["be_stubborn"], ["die", "SIGKILL"]], "(signal 9)."),
    "with a flood on stderr": Failing(
        [["complain_much", MIB], ["complain", "the last word"], ["exit_with", 1]],
        "(exit code 1): the last word",
    ),
}


@in_reactor
@pytest.mark.parametrize("how", FAILING)
async def test_a_process_that_ends_without_a_result_is_a_502_that_says_how(
    tmp_path: Path, how: str
) -> None:
    script, told, model = FAILING[how]
    sentence = f"The Claude CLI ended without a result {told}"
    async with misbehaving(tmp_path) as server, nothing_left(server):
        for stream in (False, True):
            answer = await ask(server, script, stream=stream, model=model)
            check_told(answer, 502, "cli_failed", sentence)
        if model is None:
            answer = await ask(server, [*SPOKE, *script], stream=False)
            check_told(answer, 502, "cli_failed", sentence)
            check_told_late(await ask(server, [*SPOKE, *script]), "error", "cli_failed", sentence)


@in_reactor
async def test_a_prompt_that_a_dying_process_does_not_take_breaks_nothing(tmp_path: Path) -> None:
    async with misbehaving(tmp_path) as server, nothing_left(server):
        answer = await ask(server, "x" * 5_000_000, stream=False, model="complains")
        check_told(
            answer,
            502,
            "cli_failed",
            "The Claude CLI ended without a result (exit code 3): not today",
        )


@in_reactor
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ([["hang_up"], ["leave"]], "(exit code 0)."),
        ([["hang_up"], ["hang"]], "(it closed its output and stayed)."),
        ([["be_stubborn"], ["hang_up"], ["hang"]], "(it closed its output and stayed)."),
    ],
    ids=["until stdin is closed", "until it is told to end", "until it is killed"],
)
async def test_a_process_that_closes_its_stdout_and_lives_on_is_ended(
    tmp_path: Path, script: list[Step], told: str
) -> None:
    sentence = f"The Claude CLI ended without a result {told}"
    async with misbehaving(tmp_path) as server, nothing_left(server):
        for stream in (False, True):
            check_told(await ask(server, script, stream=stream), 502, "cli_failed", sentence)
        check_told_late(await ask(server, [*SPOKE, *script]), "error", "cli_failed", sentence)
        check_answered(await ask(server, [*SPOKE, ["result"], *script]))


@in_reactor
@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_line_over_the_cap_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(tap, "_LINE_LIMIT", MIB)
    script: list[Step] = [["say_size_without_end", 8 * MIB], ["hang"]]
    if stubborn:
        script.insert(0, ["be_stubborn"])
    sentence = (
        "The Claude CLI ended without a result (it wrote a line longer than this server accepts)."
    )
    async with misbehaving(tmp_path, MAX_BODY_BYTES="4096") as server, nothing_left(server):
        for stream in (False, True):
            check_told(await ask(server, script, stream=stream), 502, "cli_failed", sentence)
        check_told_late(await ask(server, [*SPOKE, *script]), "error", "cli_failed", sentence)
        check_answered(await ask(server, [["say_much", MIB - 1000], ["result"], ["leave"]]))


# Processes whose answer arrives all the same.

STRAY = 'warning: \xff\xfe\x00\r\n\n   \n[1, 2]\n"text"\n17\nnull\n{"type": \n\xef\xbb\xbf\n'


@in_reactor
async def test_garbage_between_events_is_left_out(tmp_path: Path) -> None:
    script: list[Step] = [["say_bytes", STRAY], ["init"], ["say_bytes", STRAY], ["say", "\xe9"]]
    script += [["say_bytes", STRAY], ["result"], ["say_bytes", STRAY], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        answer = await ask(server, script)
        assert [event["type"] for event in events_of(answer)] == ["system", "assistant", "result"]
        assert events_of(answer)[1]["text"] == "\xe9"
        assert (await ask(server, script, stream=False)).json["result"] == "done"


@in_reactor
async def test_invalid_utf_8_in_an_event_goes_out_as_it_came(tmp_path: Path) -> None:
    event = '{"type":"assistant","text":"\xff\xc3\xed\xa0\x80"}'
    script: list[Step] = [["init"], ["say_bytes", event + "\n"], ["result"], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        frames = (await ask(server, script)).body.split(b"\n\n")
        assert frames[1] == b"data: " + event.encode("latin-1")
        assert len(frames) == 4


@in_reactor
@pytest.mark.parametrize("size", [1, 2, 3, 5])
async def test_writes_that_split_lines_and_characters_lose_nothing(
    tmp_path: Path, size: int
) -> None:
    text = "a\u00e9\u20ac\U0001f600\u0085\u2028 z"
    script: list[Step] = [["init"], ["say_in_pieces", size, text], ["result"], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        answer = await ask(server, script)
        assert [event.get("text") for event in events_of(answer)] == [None, text, None]


@in_reactor
async def test_a_line_of_two_megabytes_arrives_whole(tmp_path: Path) -> None:
    text = "\u20ac" * 700_000
    script: list[Step] = [["init"], ["say_much", 2_000_000], ["result", text], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        events = events_of(await ask(server, script))
        assert [len(event.get("text", "")) for event in events] == [0, 2_000_000, 0]
        assert events[-1]["result"] == text
        answer = await ask(server, script, stream=False)
        assert answer.json["result"] == text


@in_reactor
async def test_a_flood_on_stderr_holds_nothing_up(tmp_path: Path) -> None:
    flood: Step = ["complain_much", MIB]
    script: list[Step] = [flood, ["init"], flood, ["say", "x"], ["result"], flood, ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        check_answered(await ask(server, script))
        assert (await ask(server, script, stream=False)).json["result"] == "done"


@in_reactor
@pytest.mark.parametrize("code", [0, 1, 127])
async def test_a_result_counts_whatever_the_exit_code(tmp_path: Path, code: int) -> None:
    script: list[Step] = [["result"], ["complain", "too bad"], ["exit_with", code]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        check_answered(await ask(server, script))


@in_reactor
async def test_a_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    result = '{"type":"result","subtype":"success","is_error":false,"result":"done"}'
    script: list[Step] = [["init"], ["say_bytes", result], ["exit_with", 0]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        check_answered(await ask(server, script))


@in_reactor
@pytest.mark.parametrize(
    "after",
    [
        [["hang"]],
        [["be_stubborn"], ["hang"]],
        [["say_for_ever", 1000]],
        [["be_stubborn"], ["say_for_ever", 1000]],
        [["complain_much", 100 * MIB]],
    ],
    ids=["silent", "stubborn", "talkative", "stubborn and talkative", "complaining"],
)
async def test_what_a_process_does_after_its_result_concerns_nobody(
    tmp_path: Path, after: list[Step]
) -> None:
    script: list[Step] = [["init"], ["say", "x"], ["result"], *after]
    with quick_ladder(0.5):
        async with misbehaving(tmp_path) as server, nothing_left(server):
            for stream in (True, False):
                answer = await ask(server, script, stream=stream)
                # The answer does not wait for the process; the session does.
                assert is_alive(int(server.told("pid")))
                assert answer.status == 200
                assert answer.body.count(b'"done"') == 1
            session = answer.headers["x-claude-session-id"]
            check_answered(await ask(server, "again", session_id=session))


@in_reactor
async def test_of_two_results_the_first_counts(tmp_path: Path) -> None:
    second: list[Step] = [["init"], ["say", "and another thing"], ["result", "second"], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        at_once: list[Step] = [["init"], ["result", "first"], *second]
        later: list[Step] = [["init"], ["result", "first"], ["sleep", 0.2], *second]
        for script in (at_once, later):
            answer = await ask(server, script)
            assert [event["type"] for event in events_of(answer)] == ["system", "result"]
            check_answered(answer, "first")
            session = answer.headers["x-claude-session-id"]
            # The next turn does not hear what the last one said too late.
            check_answered(await ask(server, "again", session_id=session))


# Processes that say nothing.

INACTIVE = (
    "The Claude CLI was silent for the 1 seconds that this server allows "
    "(CLAUDE_INACTIVITY_TIMEOUT_MS) and was stopped."
)
TOO_LONG = (
    "The turn took longer than the 1 seconds that this server allows "
    "(CLAUDE_TOTAL_TIMEOUT_MS) and was stopped."
)
TAKING = {
    "obeys": [["obey"]],
    "answers no control request": [["leave"]],
    "ignores the end of stdin": [["hang"]],
    "ignores INT and TERM": [["be_stubborn"], ["hang"]],
}
"""What a process does that is told to end its turn."""


@in_reactor
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("manner", TAKING)
async def test_silence_ends_the_turn_however_the_process_takes_it(
    tmp_path: Path, manner: str
) -> None:
    script: list[Step] = TAKING[manner]
    async with (
        misbehaving(tmp_path, CLAUDE_INACTIVITY_TIMEOUT_MS="1000") as server,
        nothing_left(server),
    ):
        for stream in (False, True):
            answer = await ask(server, script, stream=stream)
            check_told(answer, 504, "inactivity_timeout", INACTIVE)
        answer = await ask(server, [*SPOKE, *script], stream=False)
        check_told(answer, 504, "inactivity_timeout", INACTIVE)
        answer = await ask(server, [*SPOKE, *script])
        check_told_late(answer, "timeout", "inactivity_timeout", INACTIVE)
        assert bool(server.told("interrupted")) == (manner == "obeys")
        # The session is free again, as soon as its process is gone.
        session = answer.headers["x-claude-session-id"]
        check_answered(await ask(server, "again", session_id=session))


@in_reactor
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("model", ["hangs", "stubbornly-hangs"])
async def test_a_process_that_reads_nothing_is_ended_with_its_prompt_unread(
    tmp_path: Path, model: str
) -> None:
    async with (
        misbehaving(tmp_path, CLAUDE_INACTIVITY_TIMEOUT_MS="1000") as server,
        nothing_left(server),
    ):
        for stream in (False, True):
            answer = await ask(server, "x" * 2_000_000, stream=stream, model=model)
            check_told(answer, 504, "inactivity_timeout", INACTIVE)


@in_reactor
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_turn_that_takes_too_long_is_ended_in_the_midst_of_it(
    tmp_path: Path, stubborn: bool
) -> None:
    script: list[Step] = [["say_for_ever", 10, 0.02]]
    if stubborn:
        script.insert(0, ["be_stubborn"])
    async with (
        misbehaving(tmp_path, CLAUDE_TOTAL_TIMEOUT_MS="1000") as server,
        nothing_left(server),
    ):
        answer = await ask(server, script, stream=False)
        check_told(answer, 504, "turn_timeout", TOO_LONG)
        *before, last = events_of(await ask(server, script))
        assert {event["type"] for event in before} == {"assistant"}
        assert (last["type"], last["subtype"]) == ("result", "timeout")
        assert (last["error"]["code"], last["result"]) == ("turn_timeout", TOO_LONG)


@in_reactor
async def test_the_whole_ladder_has_its_true_times(tmp_path: Path) -> None:
    script: list[Step] = [["be_stubborn"], *SPOKE, ["hang"]]
    async with (
        misbehaving(tmp_path, CLAUDE_INACTIVITY_TIMEOUT_MS="1000") as server,
        nothing_left(server),
    ):
        await ask(server, script)
        pid = int(server.told("pid"))
        clock: Any = server.executor.context.clock
        told = clock.seconds()
        await until(lambda: not is_alive(pid), "it is killed")
        # A second each for interrupt and end of stdin, 0.2 for TERM, less what the answer took.
        assert 1.5 < clock.seconds() - told < 20


# Processes that leave others behind.

PLACES = ("group", "own group", "own session")


@in_reactor
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("held", ["stdout", "nothing"])
@pytest.mark.parametrize("place", PLACES)
async def test_what_a_process_leaves_behind_is_ended(tmp_path: Path, place: str, held: str) -> None:
    fork: Step = ["fork", place, held]
    ending = "The Claude CLI ended without a result (exit code 7)."
    async with (
        misbehaving(tmp_path, CLAUDE_INACTIVITY_TIMEOUT_MS="1500") as server,
        nothing_left(server),
    ):
        check_answered(await ask(server, [fork, *SPOKE, ["result"], ["leave"]]))
        grandchild = int(server.told("grandchild"))
        await until(lambda: not is_alive(grandchild), "the grandchild is gone")
        answer = await ask(server, [fork, *SPOKE, ["exit_with", 7]])
        check_told_late(answer, "error", "cli_failed", ending)
        answer = await ask(server, [fork, ["exit_with", 7]], stream=False)
        check_told(answer, 502, "cli_failed", ending)
        assert int(server.told("grandchild")) != grandchild


@in_reactor
@pytest.mark.usefixtures("quick")
async def test_a_stubborn_family_is_ended_with_its_turn(tmp_path: Path) -> None:
    forks: list[Step] = [
        ["fork", place, held] for place in PLACES for held in ("stdout", "nothing")
    ]
    script: list[Step] = [["be_stubborn"], *forks, *SPOKE, ["hang"]]
    async with (
        misbehaving(tmp_path, CLAUDE_INACTIVITY_TIMEOUT_MS="1200") as server,
        nothing_left(server),
    ):
        answer = await ask(server, script)
        told = INACTIVE.replace("the 1 s", "the 1.2 s")
        check_told_late(answer, "timeout", "inactivity_timeout", told)


# Processes that change their session.

OTHER = "11111111-2222-4333-8444-555555555555"


@in_reactor
async def test_a_session_that_changes_its_id_is_still_found_by_the_old_one(tmp_path: Path) -> None:
    changed: list[Step] = [["init"], ["say", "x"], ["result", "done", OTHER], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        answer = await ask(server, changed)
        session = answer.headers["x-claude-session-id"]
        assert events_of(answer)[-1]["session_id"] == OTHER != session
        again = await ask(server, "again", session_id=session)
        # The program tells what it was called with: the id under which the CLI has it now.
        assert events_of(again)[0]["session_id"] == OTHER


@in_reactor
async def test_a_session_that_begins_under_another_id_is_told_by_that(tmp_path: Path) -> None:
    other: list[Step] = [["init", OTHER], ["result", "done", OTHER], ["leave"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        answer = await ask(server, other)
        assert answer.headers["x-claude-session-id"] == OTHER
        again = await ask(server, "again", session_id=OTHER)
        assert events_of(again)[0]["session_id"] == OTHER
        whole = await ask(server, other, stream=False)
        assert whole.headers["x-claude-session-id"] == OTHER

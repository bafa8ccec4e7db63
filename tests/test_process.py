"""An agent process, with everything around it played by the test."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import pytest
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ProcessDone, ProcessTerminated
from twisted.internet.interfaces import IProcessProtocol
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from claude_proxy.cli.control import ControlAnswer
from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Ending
from claude_proxy.cli.process import POLITE_WAIT, AgentProcess
from claude_proxy.descriptors import TWISTED_READS
from claude_proxy.interfaces import IAgentListener
from tests.descriptors import EVERYTHING, Socket

PID = 90_000_001  # no process has it, should a signal be sent all the same
KILL_TIMEOUT = 5.0
LINE_LIMIT = 200

RESULT = b'{"type":"result","subtype":"success"}\n'
EXITED = Failure(ProcessDone(0))


@implementer(IAgentListener)
class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.endings: list[Ending] = []

    def events_received(self, events: list[Event]) -> None:
        assert events
        assert not self.endings, "nothing follows the end"
        self.batches.append([event.type for event in events])

    def agent_ended(self, ending: Ending) -> None:
        self.endings.append(ending)


class Pipe:
    """The reading end of stdout."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True
        self.tell("paused")

    def resumeProducing(self) -> None:
        self.paused = False
        self.tell("resumed")


class Child:
    """
    A process, its transport, and all around it.

    @ivar deeds: what was done to it, each with its time.
    """

    def __init__(self, *, has_control: bool = True) -> None:
        self.clock = Clock()
        self.deeds: list[tuple[float, str]] = []
        self.stdin = b""
        self.stdout = Pipe(self.tell)
        self.pipes: dict[int, object] = {1: self.stdout}
        self.pid: int | None = PID
        self.listener = Listener()
        self.agent = AgentProcess(
            self.clock,
            self.listener,
            has_control=has_control,
            kill_timeout=KILL_TIMEOUT,
            line_limit=LINE_LIMIT,
            log_context={"request_id": "r-1"},
        )
        self.agent.makeConnection(cast(Any, self))

    def tell(self, deed: str) -> None:
        self.deeds.append((self.clock.seconds(), deed))

    def write(self, data: bytes) -> None:
        self.stdin += data
        request = json.loads(data).get("request")
        self.tell(request["subtype"] if request else "written")

    def closeStdin(self) -> None:
        self.tell("stdin closed")

    def loseConnection(self) -> None:
        self.pipes = {}
        self.tell("pipes closed")

    def killpg(self, group: int, number: int) -> None:
        assert group == PID
        self.tell(signal.Signals(number).name)

    def says(self, *lines: bytes) -> None:
        assert not self.stdout.paused, "a paused pipe is not read"
        self.agent.outReceived(b"".join(line + b"\n" for line in lines))

    def exits(self, reason: Failure = EXITED) -> None:
        """It is reaped; its pipes stay open."""
        self.agent.processExited(reason)
        self.pid = None

    def ends(self, reason: Failure = EXITED) -> None:
        """It is reaped and its pipes are at their end."""
        self.exits(reason)
        self.agent.processEnded(reason)

    def passes(self, seconds: float) -> None:
        self.clock.pump([0.25] * int(seconds / 0.25))

    @property
    def acts(self) -> list[str]:
        return [deed for _, deed in self.deeds]


@pytest.fixture(name="child")
def _child(monkeypatch: pytest.MonkeyPatch) -> Child:
    return made(monkeypatch)


def made(monkeypatch: pytest.MonkeyPatch, *, has_control: bool = True) -> Child:
    child = Child(has_control=has_control)
    monkeypatch.setattr(os, "killpg", child.killpg)
    return child


def gone(agent: AgentProcess) -> list[None]:
    fired: list[None] = []
    agent.when_gone().addCallback(fired.append)
    return fired


def test_it_is_a_process_protocol_and_its_listener_a_listener(child: Child) -> None:
    verifyObject(IProcessProtocol, child.agent)
    verifyObject(IAgentListener, child.listener)


# What it says.


def test_events_that_arrive_together_are_passed_on_together(child: Child) -> None:
    child.says(b'{"type":"a"}', b'{"type":"b"}')
    child.agent.outReceived(b'{"type":')
    child.agent.outReceived(b'"c"}\n{"type":"d"}\n{"ty')
    child.agent.outReceived(b'pe":"e"}\n')
    assert child.listener.batches == [["a", "b"], ["c", "d"], ["e"]]


def test_lines_that_are_no_events_are_logged_without_their_text_and_left_out(child: Child) -> None:
    with capturedLogs() as logs:
        child.says(b"Warning: my secret", b'{"type":"a"}', b"", b"  \t", b'["secret"]')
        child.says(b"only a secret")
    assert child.listener.batches == [["a"]]
    assert [(log["type"], log["length"], log["pid"], log["request_id"]) for log in logs] == [
        ("stray_output", 18, PID, "r-1"),
        ("stray_output", 10, PID, "r-1"),
        ("stray_output", 13, PID, "r-1"),
    ]
    assert "secret" not in str(logs)


def test_a_control_request_of_the_cli_is_refused_and_not_passed_on(child: Child) -> None:
    child.says(
        b'{"type":"a"}',
        b'{"type":"control_request","request_id":"theirs","request":{"subtype":"can_use_tool",'
        b'"input":"half \\ud83d an emoji"}}',
        b'{"type":"control_request","request":{"subtype":"without an id"}}',
        b'{"type":"control_cancel_request","request_id":"theirs"}',
    )
    assert child.listener.batches == [["a"]]
    answer = json.loads(child.stdin)
    assert answer["type"] == "control_response"
    assert answer["response"]["subtype"] == "error"
    assert answer["response"]["request_id"] == "theirs"


def test_only_refused_control_requests_of_ours_are_logged(child: Child) -> None:
    child.agent.request("initialize", {"systemPrompt": ["x"]})
    child.agent.request("interrupt")
    sent = [json.loads(line) for line in child.stdin.splitlines()]
    assert [(line["request_id"], line["request"]) for line in sent] == [
        ("req_1", {"subtype": "initialize", "systemPrompt": ["x"]}),
        ("req_2", {"subtype": "interrupt"}),
    ]
    with capturedLogs() as logs:
        child.says(
            b'{"type":"control_response","response":{"subtype":"success","request_id":"req_1"}}',
            b'{"type":"control_response","response":{"subtype":"error","request_id":"req_2",'
            b'"error":"no"}}',
            b'{"type":"control_response"}',
        )
    assert [(log["type"], log["control_id"], log["error"]) for log in logs] == [
        ("control_refused", "req_2", "no")
    ]
    assert child.listener.batches == []


def test_an_answer_reaches_the_one_who_asked_once(child: Child) -> None:
    first: list[ControlAnswer] = []
    second: list[ControlAnswer] = []
    child.agent.request("initialize", {}, first.append)
    child.agent.request("interrupt")
    child.agent.request("mcp_status", answered=second.append)
    success = (
        b'{"type":"control_response","response":{"subtype":"success","request_id":"req_%d",'
        b'"response":{"n":%d}}}'
    )
    child.says(success % (2, 2), success % (1, 1), success % (1, 9), success % (7, 7))
    assert (first, second) == ([ControlAnswer("req_1", None, {"n": 1})], [])
    with capturedLogs() as logs:
        child.says(
            b'{"type":"control_response","response":{"subtype":"error","request_id":"req_3",'
            b'"error":"no"}}',
        )
    assert second == [ControlAnswer("req_3", "no")]
    assert [log["type"] for log in logs] == ["control_refused"]
    assert child.listener.batches == []


def test_an_answer_arrives_also_while_the_process_is_stopped(child: Child) -> None:
    answers: list[ControlAnswer] = []
    child.agent.request("initialize", answered=answers.append)
    child.agent.stop()
    child.says(b'{"type":"control_response","response":{"subtype":"success","request_id":"req_1"}}')
    assert answers == [ControlAnswer("req_1", None)]


def test_an_unfinished_last_line_counts_if_it_is_whole(child: Child) -> None:
    child.agent.outReceived(b'{"type":"a"}\n{"type":"b"}')
    assert child.listener.batches == [["a"]]
    child.ends()
    assert child.listener.batches == [["a"], ["b"]]


def test_an_unfinished_last_line_that_is_cut_is_left_out(child: Child) -> None:
    child.agent.outReceived(b'{"type":"a"}\n{"type":"b"')
    child.ends()
    assert child.listener.batches == [["a"]]
    assert len(child.listener.endings) == 1


def test_a_line_too_long_is_a_fault_that_ends_it(child: Child) -> None:
    child.says(b'{"type":"a"}')
    child.agent.outReceived(b"x" * (LINE_LIMIT + 1))
    assert child.acts == ["stdin closed", "SIGTERM"]
    with capturedLogs() as logs:
        child.agent.outReceived(b'x\n{"type":"b"}\n')
        child.says(b'{"type":"control_request","request_id":"theirs"}')
        child.agent.outReceived(b'{"type":"c"}')
        child.ends(Failure(ProcessTerminated(signal=15)))
    assert child.listener.batches == [["a"]]
    assert child.stdin == b""
    assert [log["type"] for log in logs] == ["process_exit"]
    assert child.listener.endings == [
        Ending(signal=15, fault="it wrote a line longer than this server accepts")
    ]


def test_a_line_as_long_as_the_limit_passes(child: Child) -> None:
    line = b'{"type":"a","x":"' + b"x" * (LINE_LIMIT - 19) + b'"}'
    assert len(line) == LINE_LIMIT
    child.says(line)
    assert child.listener.batches == [["a"]]


# Its stderr and its end.


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        (ProcessDone(0), Ending(exit_code=0)),
        (ProcessTerminated(3), Ending(exit_code=3)),
        (ProcessTerminated(signal=9), Ending(signal=9)),
    ],
)
def test_its_end_is_told_once_and_after_all_it_said(
    child: Child, reason: Exception, ending: Ending
) -> None:
    waiting = [gone(child.agent), gone(child.agent)]
    assert not child.agent.ended
    child.says(b'{"type":"a"}')
    with capturedLogs() as logs:
        child.ends(Failure(reason))
    assert child.listener.endings == [ending]
    assert child.agent.ended
    assert waiting == [[None], [None]]
    assert gone(child.agent) == [None]
    assert child.clock.getDelayedCalls() == []
    assert [(log["type"], log["ending"], log["pid"]) for log in logs] == [
        ("process_exit", ending.describe(), PID)
    ]


def test_the_last_words_on_stderr_are_kept(child: Child) -> None:
    child.agent.errReceived(b"first\n\x1b[31mErr")
    child.agent.errReceived("ör\x1b[0m\n\n".encode())
    child.ends(Failure(ProcessTerminated(1)))
    assert child.listener.endings[0].stderr == "Errör"


def test_of_a_long_stderr_only_the_end_is_kept(child: Child) -> None:
    for _ in range(100):
        child.agent.errReceived(b"noise " * 1000 + b"\n")
        assert len(child.agent._stderr) <= 128 * 1024
    child.agent.errReceived(b"x" * 1_000_000)
    assert len(child.agent._stderr) <= 128 * 1024
    child.agent.errReceived(b"\nlast words\xff")
    child.ends()
    assert child.listener.endings[0].stderr == "last words\ufffd"


def test_nothing_is_written_to_a_process_that_is_gone(child: Child) -> None:
    child.agent.write(b'{"n":1}\n')
    child.ends()
    child.agent.write(b'{"n":2}\n')
    child.agent.request("interrupt")
    assert child.stdin == b'{"n":1}\n'


def test_what_is_written_is_in_the_pipe_at_once_and_in_order(child: Child) -> None:
    child.pipes[0] = pipe = Socket()
    child.agent.write(b'{"n":1}\n')
    assert (pipe.pieces, child.stdin) == ([b'{"n":1}\n'], b"")
    pipe.room = 2
    child.write = pipe.write  # type: ignore[method-assign]  # Twisted's has the same buffer
    child.agent.write(b'{"n":2}\n')
    child.agent.write(b'{"n":3}\n')
    assert pipe.pieces[1:] == [b'{"']
    pipe.room = EVERYTHING
    pipe.doWrite()
    assert b"".join(pipe.pieces) == b'{"n":1}\n{"n":2}\n{"n":3}\n'


class Stdout(FileDescriptor):
    """The reading end of a real pipe, as Twisted has it."""

    def __init__(self) -> None:
        super().__init__(cast(Any, None))
        self.connected = 1
        self.end, self.written = os.pipe()
        os.set_blocking(self.end, False)

    def fileno(self) -> int:
        return self.end


@pytest.fixture(name="stdout")
def _stdout() -> Iterator[Stdout]:
    stdout = Stdout()
    yield stdout
    os.close(stdout.end)
    with suppress(OSError):
        os.close(stdout.written)


EVENT = b'{"type":"system","n":"%s"}\n' % (b"x" * 100)


def test_what_a_pipe_holds_beyond_what_twisted_reads_is_read_at_once(
    child: Child, stdout: Stdout
) -> None:
    child.pipes[1] = stdout
    said = EVENT * 400
    first = said[:TWISTED_READS]
    os.write(stdout.written, said[TWISTED_READS:])
    child.agent.outReceived(first)
    assert child.listener.batches == [["system"] * 400]
    with pytest.raises(BlockingIOError):
        os.read(stdout.end, 1)


@pytest.mark.parametrize("end", ["empty", "closed", "lost"])
def test_a_pipe_may_hold_no_more(child: Child, stdout: Stdout, end: str) -> None:
    child.pipes[1] = stdout
    if end == "closed":
        os.close(stdout.written)
    elif end == "lost":
        stdout.connected = 0
        os.write(stdout.written, EVENT)
    said = (EVENT * 400)[:TWISTED_READS]
    child.agent.outReceived(said)
    assert child.listener.batches == [["system"] * said.count(b"\n")]


def test_a_short_read_was_all_there_was(child: Child, stdout: Stdout) -> None:
    child.pipes[1] = stdout
    os.write(stdout.written, EVENT)
    child.agent.outReceived(EVENT)
    assert child.listener.batches == [["system"]]


def test_a_pipe_that_nobody_reads_any_more_is_left_to_the_reactor(child: Child) -> None:
    child.pipes[0] = pipe = Socket()
    pipe.error = ConnectionLost()
    child.agent.write(b'{"n":1}\n')
    assert child.stdin == b'{"n":1}\n'


def test_a_process_that_was_never_started_takes_nothing_and_can_be_stopped() -> None:
    clock, listener = Clock(), Listener()
    agent = AgentProcess(
        clock, listener, has_control=True, kill_timeout=1.0, line_limit=10, log_context={}
    )
    agent.write(b"x")
    agent.pause()
    agent.resume()
    agent.stop()
    clock.pump([0.5] * 12)
    assert listener.endings == [Ending(lost=True)]
    assert clock.getDelayedCalls() == []


def test_a_process_without_an_id_that_ends_is_signalled_by_nobody(child: Child) -> None:
    child.agent.pid = None
    child.ends()
    assert child.acts == []
    assert child.listener.endings == [Ending(exit_code=0)]


# Flow control.


def test_pausing_stops_the_reading_of_stdout_and_resuming_starts_it(child: Child) -> None:
    child.agent.resume()
    assert child.acts == []
    child.agent.pause()
    child.agent.resume()
    child.agent.resume()
    assert child.acts == ["paused", "resumed"]


def test_a_closed_stdout_can_be_paused(child: Child) -> None:
    child.pipes = {}
    child.agent.pause()
    child.agent.resume()
    assert child.acts == []


def test_a_stopped_process_is_read_again_and_what_it_says_is_dropped(child: Child) -> None:
    child.agent.pause()
    child.agent.stop()
    assert child.acts == ["paused", "resumed", "interrupt"]
    child.agent.pause()
    assert not child.stdout.paused
    child.says(b'{"type":"a"}')
    assert child.listener.batches == []


# The ladder.


def test_a_process_that_takes_no_notice_goes_down_the_whole_ladder(child: Child) -> None:
    waiting = gone(child.agent)
    child.agent.stop()
    child.passes(20)
    times = [0, 1, 2, 2, 2 + KILL_TIMEOUT, 3 + KILL_TIMEOUT]
    deeds = ["interrupt", "stdin closed", "stdin closed", "SIGTERM", "SIGKILL", "pipes closed"]
    assert POLITE_WAIT == 1.0
    assert child.deeds == list(zip(times, deeds, strict=True))
    assert child.listener.endings == [Ending(lost=True)]
    assert child.agent.ended
    assert waiting == [None]
    assert child.clock.getDelayedCalls() == []


def test_a_lost_process_that_ends_after_all_is_not_reported_again(child: Child) -> None:
    child.agent.stop()
    child.passes(20)
    with capturedLogs() as logs:
        child.ends(Failure(ProcessTerminated(signal=9)))
    assert logs == []
    assert len(child.listener.endings) == 1
    assert child.agent.ended


def test_nothing_is_delivered_after_the_report_of_a_lost_process(child: Child) -> None:
    child.agent.outReceived(b'{"type":"a"}')
    child.exits()
    child.passes(5)
    assert child.listener.endings == [Ending(exit_code=0, lost=True)]
    child.agent.outReceived(b'\n{"type":"b"}\n{"type":"c"}')
    child.agent.processEnded(EXITED)
    assert child.listener.batches == []


@pytest.mark.parametrize("after", [0.5, 1.5, 2.5, 6.5, 7.5, 8.5])
def test_the_ladder_stops_on_whatever_rung_the_process_ends(child: Child, after: float) -> None:
    child.agent.stop()
    child.passes(after)
    deeds = list(child.deeds)
    child.ends(Failure(ProcessTerminated(signal=9)))
    child.passes(20)
    # Whatever rung it was: what it may have left in its group is killed, once.
    left = [] if after == 8.5 else ["SIGKILL"]
    assert child.acts[len(deeds) :] == left
    assert child.listener.endings == [Ending(signal=9)]
    assert child.clock.getDelayedCalls() == []


def test_an_interrupted_process_that_gives_its_result_is_let_go(child: Child) -> None:
    child.agent.stop()
    child.passes(0.5)
    child.says(RESULT.strip())
    assert child.deeds == [(0, "interrupt"), (0.5, "stdin closed")]
    assert child.listener.batches == []
    child.ends()
    assert child.listener.endings == [Ending(exit_code=0)]


def test_a_process_that_has_finished_is_let_go_and_then_made_to_end(child: Child) -> None:
    child.says(RESULT.strip())
    assert child.acts == []
    child.agent.finish()
    child.passes(0.75)
    child.says(b'{"type":"late"}')
    assert child.listener.batches == [["result"], ["late"]]
    child.agent.stop()
    child.passes(20)
    assert child.deeds[:4] == [
        (0, "stdin closed"),
        (1, "stdin closed"),
        (1, "SIGTERM"),
        (1 + KILL_TIMEOUT, "SIGKILL"),
    ]


def test_a_process_without_a_control_channel_is_terminated_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = made(monkeypatch, has_control=False)
    child.agent.pause()
    child.agent.stop()
    assert child.acts == ["paused", "resumed", "stdin closed", "SIGTERM"]
    assert child.stdin == b""


def test_stopping_twice_changes_nothing(child: Child) -> None:
    child.agent.stop()
    child.agent.stop()
    child.agent.finish()
    assert child.acts == ["interrupt"]


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_a_group_that_cannot_be_signalled_does_not_stop_the_ladder(
    child: Child, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def killpg(group: int, number: int) -> None:
        raise error

    monkeypatch.setattr(os, "killpg", killpg)
    child.agent.stop()
    child.passes(20)
    assert child.listener.endings == [Ending(lost=True)]


def test_signals_are_logged(child: Child) -> None:
    with capturedLogs() as logs:
        child.agent.stop()
        child.passes(20)
    assert [(log["type"], log.get("signal"), log["request_id"]) for log in logs] == [
        ("process_signal", "SIGTERM", "r-1"),
        ("process_signal", "SIGKILL", "r-1"),
        ("process_exit", None, "r-1"),
    ]


# A process that has exited, and whose pipes others hold.


def test_what_an_exited_process_left_in_its_group_is_killed_without_a_word(child: Child) -> None:
    with capturedLogs() as logs:
        child.exits()
    assert child.acts == ["SIGKILL"]
    assert logs == []
    child.agent.processEnded(EXITED)
    assert child.listener.endings == [Ending(exit_code=0)]


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_mostly_it_left_nothing(
    child: Child, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def killpg(group: int, number: int) -> None:
        raise error

    monkeypatch.setattr(os, "killpg", killpg)
    child.ends()
    assert child.listener.endings == [Ending(exit_code=0)]


def test_the_pipes_of_an_exited_process_are_closed_in_the_end(child: Child) -> None:
    child.exits()
    child.passes(1)
    assert child.deeds == [(0, "SIGKILL"), (1, "pipes closed")]
    child.agent.processEnded(EXITED)
    assert child.listener.endings == [Ending(exit_code=0)]
    assert child.clock.getDelayedCalls() == []


def test_the_pipes_are_not_closed_while_output_flows(child: Child) -> None:
    child.exits()
    for _ in range(10):
        child.passes(0.75)
        child.says(b'{"type":"a"}')
    assert child.acts == ["SIGKILL"]
    child.passes(0.75)
    assert child.acts == ["SIGKILL"]
    child.passes(0.25)
    assert child.deeds[1:] == [(8.5, "pipes closed")]
    assert child.listener.batches == [["a"]] * 10


def test_the_pipes_are_not_closed_while_the_client_is_slow(child: Child) -> None:
    child.agent.pause()
    child.exits()
    child.passes(60.5)
    assert child.acts == ["paused", "SIGKILL"]
    child.agent.resume()
    child.passes(0.75)
    assert child.acts[-1] == "resumed"
    child.says(b'{"type":"a"}')
    assert child.listener.batches == [["a"]]
    child.passes(1.25)
    assert child.acts[-1] == "pipes closed"


@pytest.mark.parametrize("has_control", [True, False])
def test_a_stop_ends_the_wait_for_a_slow_client(
    monkeypatch: pytest.MonkeyPatch, has_control: bool
) -> None:
    child = made(monkeypatch, has_control=has_control)
    child.agent.pause()
    child.exits()
    child.passes(30)
    child.agent.stop()
    assert child.acts == ["paused", "SIGKILL", "resumed"]
    child.says(b'{"type":"a"}')
    assert child.listener.batches == []
    child.passes(2)
    assert child.acts[-1] == "pipes closed"


def test_one_who_no_longer_waits_for_the_end_does_not_disturb_the_others(child: Child) -> None:
    impatient: Deferred[None] = child.agent.when_gone()
    waiting = gone(child.agent)
    impatient.addErrback(lambda _: None)
    impatient.cancel()
    assert waiting == []
    child.ends()
    assert waiting == [None]

"""
The life of an agent process after its start, as one table: the kill ladder.

A process that is asked to stop first gets an ``interrupt`` on the control channel (the CLI then
kills the commands it runs, which no signal to the CLI would do), then the end of its stdin, then
TERM, then KILL to its group; then its pipes are closed, and at last it is given up and reported as
lost.  Each rung waits for the process to go; the ladder always ends.

A process that has exited may leave its pipes in the hands of a grandchild, which would keep the end
of the output from ever coming: the group is killed, and after a wait the pipes are closed.

This module decides; `process.py` performs.  Whatever pair of state and input is not in the table
changes nothing.
"""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["Action", "Input", "Lifecycle", "State"]


class State(Enum):
    """Where a process stands on the ladder."""

    RUNNING = auto()
    INTERRUPTING = auto()
    CLOSING = auto()
    TERMINATING = auto()
    KILLING = auto()
    DRAINING = auto()
    ABANDONING = auto()
    LOST = auto()
    GONE = auto()


class Input(Enum):
    """What happens to a process."""

    FINISH = auto()
    """Its last turn has its result; it should leave by itself."""
    STOP = auto()
    """Its turn must end now."""
    TERMINATE = auto()
    """Its turn must end now, and it has no control channel to be told so."""
    RESULT = auto()
    """It wrote a result."""
    HUNG_UP = auto()
    """It closed its stdout: it has nothing more to say, and mostly is about to exit."""
    TIMEOUT = auto()
    """The wait that the last actions began is over."""
    EXITED = auto()
    """The process was reaped; its pipes may still be open."""
    ENDED = auto()
    """The process was reaped and all its pipes are at their end."""


class Action(Enum):
    """What is to be done, in order."""

    DISCARD_OUTPUT = auto()
    """Read on, whatever the client does: a process that cannot write cannot end."""
    SEND_INTERRUPT = auto()
    CLOSE_STDIN = auto()
    SIGNAL_TERM = auto()
    SIGNAL_KILL = auto()
    CLOSE_PIPES = auto()
    WAIT_POLITE = auto()
    """Come back with TIMEOUT after `process.POLITE_WAIT`."""
    WAIT_KILL = auto()
    """Come back with TIMEOUT after PROCESS_KILL_TIMEOUT_MS."""
    STOP_WAITING = auto()
    REPORT_GONE = auto()
    REPORT_LOST = auto()


_TO_CLOSING = (State.CLOSING, (Action.CLOSE_STDIN, Action.WAIT_POLITE))
_TO_TERMINATING = (
    State.TERMINATING,
    (Action.DISCARD_OUTPUT, Action.CLOSE_STDIN, Action.SIGNAL_TERM, Action.WAIT_KILL),
)
_TO_ABANDONING = (State.ABANDONING, (Action.CLOSE_PIPES, Action.WAIT_POLITE))
_TO_DRAINING = (State.DRAINING, (Action.SIGNAL_KILL, Action.WAIT_POLITE))
_TO_GONE = (State.GONE, (Action.STOP_WAITING, Action.REPORT_GONE))

_TABLE: dict[tuple[State, Input], tuple[State, tuple[Action, ...]]] = {
    (State.RUNNING, Input.FINISH): _TO_CLOSING,
    (State.RUNNING, Input.STOP): (
        State.INTERRUPTING,
        (Action.DISCARD_OUTPUT, Action.SEND_INTERRUPT, Action.WAIT_POLITE),
    ),
    (State.RUNNING, Input.TERMINATE): _TO_TERMINATING,
    (State.RUNNING, Input.HUNG_UP): _TO_CLOSING,
    (State.INTERRUPTING, Input.RESULT): _TO_CLOSING,
    (State.INTERRUPTING, Input.HUNG_UP): _TO_CLOSING,
    (State.INTERRUPTING, Input.TIMEOUT): _TO_CLOSING,
    (State.INTERRUPTING, Input.TERMINATE): _TO_TERMINATING,
    (State.CLOSING, Input.TIMEOUT): _TO_TERMINATING,
    (State.CLOSING, Input.TERMINATE): _TO_TERMINATING,
    (State.TERMINATING, Input.TIMEOUT): (
        State.KILLING,
        (Action.SIGNAL_KILL, Action.WAIT_POLITE),
    ),
    (State.KILLING, Input.TIMEOUT): _TO_ABANDONING,
    (State.DRAINING, Input.TIMEOUT): _TO_ABANDONING,
    (State.DRAINING, Input.STOP): (State.DRAINING, (Action.DISCARD_OUTPUT,)),
    (State.DRAINING, Input.TERMINATE): (State.DRAINING, (Action.DISCARD_OUTPUT,)),
    # The report is the last word: should output come all the same, nobody hears of it.
    (State.ABANDONING, Input.TIMEOUT): (
        State.LOST,
        (Action.DISCARD_OUTPUT, Action.REPORT_LOST),
    ),
    (State.ABANDONING, Input.ENDED): _TO_GONE,
    # Lost was the last word to everyone who waited; a late end only needs to be noticed.
    (State.LOST, Input.ENDED): (State.GONE, ()),
    **{
        (state, Input.EXITED): _TO_DRAINING
        for state in (
            State.RUNNING,
            State.INTERRUPTING,
            State.CLOSING,
            State.TERMINATING,
            State.KILLING,
        )
    },
    **{
        (state, Input.ENDED): _TO_GONE
        for state in (
            State.RUNNING,
            State.INTERRUPTING,
            State.CLOSING,
            State.TERMINATING,
            State.KILLING,
            State.DRAINING,
        )
    },
}


class Lifecycle:
    """One process's place in the table."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.RUNNING

    def handle(self, happened: Input) -> tuple[Action, ...]:
        """Move to the next state; return what is to be done, in order."""
        self.state, actions = _TABLE.get((self.state, happened), (self.state, ()))
        return actions

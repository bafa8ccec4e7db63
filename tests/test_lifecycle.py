"""The kill ladder, read from its table."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.lifecycle import Action, Input, Lifecycle, State

WAITS = {Action.WAIT_POLITE, Action.WAIT_KILL}
REPORTS = {Action.REPORT_GONE, Action.REPORT_LOST}
LIVE = [
    State.RUNNING,
    State.INTERRUPTING,
    State.CLOSING,
    State.TERMINATING,
    State.KILLING,
    State.DRAINING,
    State.ABANDONING,
]
WAITING = [state for state in LIVE if state is not State.RUNNING]
END = [State.LOST, State.GONE]


def at(state: State) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.state = state
    return lifecycle


def test_every_state_is_live_or_an_end() -> None:
    assert set(LIVE) | set(END) == set(State)
    assert Lifecycle().state is State.RUNNING


def test_a_stopped_process_goes_down_the_ladder_in_order() -> None:
    lifecycle = Lifecycle()
    steps = [(lifecycle.handle(Input.STOP), lifecycle.state)]
    while lifecycle.state not in END:
        steps.append((lifecycle.handle(Input.TIMEOUT), lifecycle.state))
    assert steps == [
        (
            (Action.DISCARD_OUTPUT, Action.SEND_INTERRUPT, Action.WAIT_POLITE),
            State.INTERRUPTING,
        ),
        ((Action.CLOSE_STDIN, Action.WAIT_POLITE), State.CLOSING),
        (
            (Action.DISCARD_OUTPUT, Action.CLOSE_STDIN, Action.SIGNAL_TERM, Action.WAIT_KILL),
            State.TERMINATING,
        ),
        ((Action.SIGNAL_KILL, Action.WAIT_POLITE), State.KILLING),
        ((Action.CLOSE_PIPES, Action.WAIT_POLITE), State.ABANDONING),
        ((Action.DISCARD_OUTPUT, Action.REPORT_LOST), State.LOST),
    ]


@pytest.mark.parametrize(
    ("state", "happened", "actions", "after"),
    [
        (
            State.RUNNING,
            Input.FINISH,
            (Action.CLOSE_STDIN, Action.WAIT_POLITE),
            State.CLOSING,
        ),
        (
            State.RUNNING,
            Input.TERMINATE,
            (Action.DISCARD_OUTPUT, Action.CLOSE_STDIN, Action.SIGNAL_TERM, Action.WAIT_KILL),
            State.TERMINATING,
        ),
        (
            State.INTERRUPTING,
            Input.RESULT,
            (Action.CLOSE_STDIN, Action.WAIT_POLITE),
            State.CLOSING,
        ),
        (
            State.INTERRUPTING,
            Input.TERMINATE,
            (Action.DISCARD_OUTPUT, Action.CLOSE_STDIN, Action.SIGNAL_TERM, Action.WAIT_KILL),
            State.TERMINATING,
        ),
        (
            State.CLOSING,
            Input.TERMINATE,
            (Action.DISCARD_OUTPUT, Action.CLOSE_STDIN, Action.SIGNAL_TERM, Action.WAIT_KILL),
            State.TERMINATING,
        ),
        (State.DRAINING, Input.STOP, (Action.DISCARD_OUTPUT,), State.DRAINING),
        (State.DRAINING, Input.TERMINATE, (Action.DISCARD_OUTPUT,), State.DRAINING),
        (
            State.DRAINING,
            Input.TIMEOUT,
            (Action.CLOSE_PIPES, Action.WAIT_POLITE),
            State.ABANDONING,
        ),
        (State.LOST, Input.ENDED, (), State.GONE),
    ],
)
def test_what_leads_onto_the_ladder_and_off_it(
    state: State, happened: Input, actions: tuple[Action, ...], after: State
) -> None:
    lifecycle = at(state)
    assert lifecycle.handle(happened) == actions
    assert lifecycle.state is after


@pytest.mark.parametrize("state", WAITING)
def test_time_alone_ends_every_rung(state: State) -> None:
    lifecycle = at(state)
    for _ in range(len(State)):
        if lifecycle.state in END:
            break
        before = lifecycle.state
        actions = lifecycle.handle(Input.TIMEOUT)
        assert lifecycle.state is not before
        assert lifecycle.state in END or actions[-1] in WAITS
    assert lifecycle.state is State.LOST


@pytest.mark.parametrize("state", LIVE)
def test_the_end_of_a_process_is_reported_once_from_every_state(state: State) -> None:
    lifecycle = at(state)
    assert lifecycle.handle(Input.ENDED) == (Action.STOP_WAITING, Action.REPORT_GONE)
    assert lifecycle.state is State.GONE


@pytest.mark.parametrize(
    "state", [state for state in LIVE if state not in {State.DRAINING, State.ABANDONING}]
)
def test_a_process_that_exited_has_its_group_killed_and_its_pipes_awaited(state: State) -> None:
    lifecycle = at(state)
    assert lifecycle.handle(Input.EXITED) == (Action.SIGNAL_KILL, Action.WAIT_POLITE)
    assert lifecycle.state is State.DRAINING


@pytest.mark.parametrize("happened", [Input.STOP, Input.FINISH, Input.RESULT])
@pytest.mark.parametrize("state", [State.CLOSING, State.TERMINATING, State.KILLING])
def test_nothing_that_is_asked_goes_back_up_the_ladder(state: State, happened: Input) -> None:
    lifecycle = at(state)
    assert lifecycle.handle(happened) == ()
    assert lifecycle.state is state


@pytest.mark.parametrize("happened", Input)
def test_nothing_happens_to_a_process_that_is_gone(happened: Input) -> None:
    lifecycle = at(State.GONE)
    assert lifecycle.handle(happened) == ()
    assert lifecycle.state is State.GONE


@pytest.mark.parametrize(("state", "happened"), list(product(State, Input)))
def test_every_cell_of_the_table_keeps_the_rules(state: State, happened: Input) -> None:
    lifecycle = at(state)
    actions = lifecycle.handle(happened)
    after = lifecycle.state
    assert len(set(actions)) == len(actions), "no action twice"
    moved = after is not state
    assert bool(WAITS & set(actions)) == (moved and after not in END), "a rung begins its wait"
    assert bool(REPORTS & set(actions)) == (moved and after in END and state not in END)
    if after is State.GONE and state not in END:
        assert Action.STOP_WAITING in actions, "no timer outlives the process"


@given(st.lists(st.sampled_from(Input), max_size=40))
def test_whatever_happens_the_end_is_reported_once_and_the_waits_are_paired(
    sequence: list[Input],
) -> None:
    lifecycle = Lifecycle()
    reports = 0
    waiting = False
    for happened in sequence:
        if happened is Input.TIMEOUT:
            if not waiting:
                continue  # only a wait brings it
            waiting = False
        for action in lifecycle.handle(happened):
            reports += action in REPORTS
            if action in WAITS:
                waiting = True
            elif action is Action.STOP_WAITING:
                waiting = False
        assert waiting == (lifecycle.state in WAITING)
        assert reports == (lifecycle.state in END)

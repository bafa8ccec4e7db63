"""The load run, for a minute: nothing is wrong and nothing left, and it says what it measured."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from benchmarks.load_plan import Talk, check, draw, left, new_talk, times_of
from tests.benchmarks import MACHINE, run_benchmark
from tests.integration.soak_cli import api_ms_of, cost_of, tokens_of
from tests.integration.soak_plan import Fields, Plan, force_of
from tests.integration.storm_cli import text_of

_SPREAD = r"p50 -?[\d.]+ ms, p99 -?[\d.]+ ms, of [\d,]+"


def test_two_hundred_clients_are_served_for_a_minute() -> None:
    first, *lines = run_benchmark("load", "1", seconds=170)
    assert re.fullmatch(MACHINE, first)
    for pattern in (
        r"200 clients, (1[4-9]\d|200) of them at the same time, for \d+ s",
        r"[\d,]+ turns, [\d.]+/s: [\d,]+ right answers, \d+ right failures, [\d,]+ left early",
        r"[\d,]+ in a live process, \d+ in a spare, [\d,]+ in a new one",
        rf"an event +through it +{_SPREAD}",
        rf"an event +a bare pipe +{_SPREAD}",
        rf"a first token +live process +{_SPREAD}",
        rf"a first token +new process +{_SPREAD}",
        rf"a first token +a bare start +{_SPREAD}",
        r"memory at most [\d.]+ MB in the first 20 s, then [\d.]+ MB; in each calm [\d. ]+ MB",
    ):
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)


# What it would notice.

_STREAM = b"~0~100~~1~110~a ~2~120~b ~0~100~~1~110~a ~2~120~b"


def test_pieces_have_the_times_of_the_portions_in_which_they_came() -> None:
    times = times_of([(130, _STREAM[:12]), (140, _STREAM[12:])])
    assert times is not None
    assert (times.heard, times.written, times.read) == (100, [110, 120], [140, 140])


def test_a_piece_that_is_missing_is_noticed() -> None:
    with pytest.raises(AssertionError, match="another order"):
        times_of([(130, _STREAM.replace(b"~1~110~", b""))])


def test_turns_leave_and_fail_as_often_as_they_are_meant_to() -> None:
    chance = random.Random(1)
    plans = [draw(chance, new_talk(chance, n), f"t{n}") for n in range(4000)]
    assert 0.17 < sum(plan.act == "leave" for plan in plans) / len(plans) < 0.23
    assert 0.04 < sum(bool(plan.order["fails"]) for plan in plans) / len(plans) < 0.06
    assert {plan.order["fails"] for plan in plans} == {"", "exit", "garbage", "kill"}
    assert {plan.dialect for plan in plans} == {"partials", "whole", "chats", "chat"}


def _answer(plan: Plan, told: list[str], *, force: Fields | None = None) -> bytes:
    """A whole answer, as the CLI and the server would give it."""
    head = {"token": plan.token, "told": told, "force": force or force_of(plan.fields)}
    taken, made = tokens_of(plan.token)
    used = {
        "inputTokens": taken,
        "outputTokens": made,
        "costUSD": cost_of(plan.token),
        "contextWindow": 200_000,
    }
    result = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "session_id": "s",
        "result": json.dumps(head) + "~0~5~~1~6~" + text_of(plan.token, plan.order["size"]),
        "num_turns": 1,
        "duration_api_ms": api_ms_of(plan.token),
        "total_cost_usd": cost_of(plan.token),
        "usage": {"input_tokens": taken, "output_tokens": made},
        "modelUsage": {"claude-usual": used},
    }
    body = json.dumps(result).encode()
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", "X-Claude-Session-Id: s"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _second_turn() -> tuple[Plan, Talk]:
    """A turn of a session that knows one message for sure, and perhaps another."""
    talk = Talk(is_chat=False, number=1, fields={}, told=["t1"], doubtful={"t2"})
    plan = draw(random.Random(3), talk, "t3")
    order = {**plan.order, "do": "good", "fails": "", "breaks": 0}
    return replace(plan, order=order, act="", dialect="whole"), talk


@pytest.mark.parametrize("told", [["t1", "t3"], ["t1", "t2", "t3"]])
def test_the_right_answer_is_right(told: list[str]) -> None:
    plan, talk = _second_turn()
    assert check(plan, talk, _answer(plan, told)) == ""
    assert (talk.told, talk.session) == (["t1", "t3"], "s")


@pytest.mark.parametrize("told", [["t3"], ["t1"], ["t3", "t1"], ["t1", "t1", "t3"], ["t1", "t9"]])
def test_an_answer_from_another_history_is_wrong(told: list[str]) -> None:
    plan, talk = _second_turn()
    with pytest.raises(AssertionError):
        check(plan, talk, _answer(plan, told))


def test_an_answer_that_lacks_something_is_wrong() -> None:
    plan, talk = _second_turn()
    whole = _answer(plan, ["t1", "t3"])
    for wrong in (
        whole[:-1],
        whole.replace(b" t3.1", b" t4.1"),
        whole.replace(b"Id: s", b"Id: r"),
        whole.replace(b'"num_turns": 1', b'"num_turns": 2'),
        _answer(plan, ["t1", "t3"], force=force_of({"model": "claude-dark"})),
    ):
        assert wrong != whole
        with pytest.raises(AssertionError):
            check(plan, talk, wrong)


def test_what_is_known_of_a_turn_whose_client_has_left_depends_on_the_dialect() -> None:
    plan, talk = _second_turn()
    head = b"HTTP/1.1 200 OK\r\nX-Claude-Session-Id: s\r\n\r\n"
    left(plan, talk, head)
    assert (talk.doubtful, talk.session) == ({"t2", "t3"}, "s")
    chat = Talk(is_chat=True, number=1, fields={})
    left(replace(plan, dialect="chat"), chat, head)
    assert (chat.doubtful, chat.session) == (set(), None)


def test_a_child_that_fails_must_be_told_of_as_it_failed() -> None:
    plan, talk = _second_turn()
    failing = replace(plan, order={**plan.order, "do": "early"})
    with pytest.raises(AssertionError):
        check(failing, talk, _answer(plan, ["t1", "t3"]))

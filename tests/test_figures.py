"""The figures of one turn, from a process that serves several."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.events import Event, parse_event
from claude_proxy.cli.figures import ProcessTotals, turn_result

OPUS = "claude-opus-4-8[1m]"
HAIKU = "claude-haiku-4-5"

FIRST = (
    b'{"type":"result","subtype":"success","is_error":false,"duration_ms":266,'
    b'"duration_api_ms":49,"num_turns":1,"result":"a","total_cost_usd":0.00027925,'
    b'"usage":{"input_tokens":7,"output_tokens":9},"modelUsage":{"claude-opus-4-8[1m]":'
    b'{"inputTokens":7,"outputTokens":9,"cacheReadInputTokens":1,"cacheCreationInputTokens":3,'
    b'"webSearchRequests":0,"costUSD":0.00027925,"contextWindow":1000000,"maxOutputTokens":64000}},'
    b'"permission_denials":[],"uuid":"u1"}'
)
SECOND = (
    b'{"type":"result","subtype":"success","is_error":false,"duration_ms":265,'
    b'"duration_api_ms":262,"num_turns":2,"result":"done","total_cost_usd":0.00137925,'
    b'"usage":{"input_tokens":20,"output_tokens":40},"modelUsage":{"claude-opus-4-8[1m]":'
    b'{"inputTokens":27,"outputTokens":49,"cacheReadInputTokens":1,"cacheCreationInputTokens":3,'
    b'"webSearchRequests":0,"costUSD":0.00137925,"contextWindow":1000000,"maxOutputTokens":64000}},'
    b'"permission_denials":[{"tool_name":"Write"}],"uuid":"u2"}'
)
SECOND_ALONE = (
    b'{"type":"result","subtype":"success","is_error":false,"duration_ms":265,'
    b'"duration_api_ms":213,"num_turns":2,"result":"done","total_cost_usd":0.0011,'
    b'"usage":{"input_tokens":20,"output_tokens":40},"modelUsage":{"claude-opus-4-8[1m]":'
    b'{"inputTokens":20,"outputTokens":40,"cacheReadInputTokens":0,"cacheCreationInputTokens":0,'
    b'"webSearchRequests":0,"costUSD":0.0011,"contextWindow":1000000,"maxOutputTokens":64000}},'
    b'"permission_denials":[{"tool_name":"Write"}],"uuid":"u2"}'
)


def event_of(line: bytes | dict[str, Any]) -> Event:
    if isinstance(line, dict):
        line = json.dumps(line, separators=(",", ":")).encode()
    event = parse_event(line)
    assert event is not None
    return event


def usage(tokens: int, cost: float, **more: object) -> dict[str, object]:
    return {"inputTokens": tokens, "costUSD": cost, "contextWindow": 200_000, **more}


def result(cost: object = 0, api_ms: object = 0, **models: object) -> dict[str, Any]:
    named = {OPUS if name == "opus" else HAIKU: value for name, value in models.items()}
    return {
        "type": "result",
        "duration_api_ms": api_ms,
        "total_cost_usd": cost,
        "modelUsage": named,
    }


def as_turns(*results: bytes | dict[str, Any]) -> list[dict[str, Any]]:
    """What the results of one process look like as results of single turns."""
    totals = ProcessTotals()
    turns = []
    for line in results:
        event, totals = turn_result(event_of(line), totals)
        turns.append(json.loads(event.line))
    return turns


def test_the_first_result_of_a_process_passes_through() -> None:
    event = event_of(FIRST)
    passed, totals = turn_result(event, ProcessTotals())
    assert passed is event
    assert passed.line == FIRST
    assert totals.cost == 0.00027925
    assert totals.api_ms == 49
    assert totals.models[b'"claude-opus-4-8[1m]"'][b'"inputTokens"'] == 7


def test_a_later_result_is_what_a_process_of_its_own_would_have_printed() -> None:
    _, totals = turn_result(event_of(FIRST), ProcessTotals())
    event = event_of(SECOND)
    turn, _ = turn_result(event, totals)
    assert turn.line == SECOND_ALONE
    assert event.line == SECOND
    assert (turn.type, turn.subtype, turn.uuid) == ("result", "success", "u2")


def test_a_turn_without_any_request_costs_nothing_and_uses_no_model() -> None:
    assert as_turns(FIRST, FIRST)[1]["modelUsage"] == {}
    _, totals = turn_result(event_of(FIRST), ProcessTotals())
    turn, totals_after = turn_result(event_of(FIRST), totals)
    assert b'"duration_api_ms":0,' in turn.line
    assert b'"total_cost_usd":0,' in turn.line
    assert b'"modelUsage":{},' in turn.line
    assert totals_after == totals


def test_what_binary_sums_leave_over_is_not_shown() -> None:
    """The sums as a process printed them after each of five turns at 0.00055."""
    sums = [0.00055, 0.0011, 0.00165, 0.0022, 0.0027500000000000003]
    turns = as_turns(*(result(cost, opus=usage(10 * n, cost)) for n, cost in enumerate(sums, 1)))
    assert [turn["total_cost_usd"] for turn in turns] == [0.00055] * 5
    assert [turn["modelUsage"][OPUS]["costUSD"] for turn in turns] == [0.00055] * 5


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (1, 1, b"0"),
        (0.5, 0.5, b"0"),
        (0.25, 1.25, b"1"),
        (0.5, 10.5, b"10"),
        (1, 1.00000003, b"0.00000003"),
        (1, 1.000055, b"0.000055"),
        (0.1, 0.3, b"0.2"),
        (1, 3, b"2"),
        (1.5e2, 1.75e2, b"25"),
    ],
)
def test_a_cost_is_written_in_plain_decimals(before: float, after: float, shown: bytes) -> None:
    _, totals = turn_result(event_of(result(before)), ProcessTotals())
    turn, _ = turn_result(event_of(result(after)), totals)
    assert b'"total_cost_usd":' + shown + b"," in turn.line


def test_each_model_counts_for_itself_and_unused_ones_are_left_out() -> None:
    turns = as_turns(
        result(1, opus=usage(10, 1)),
        result(3, opus=usage(10, 1), haiku=usage(5, 2)),
        result(7, opus=usage(30, 4), haiku=usage(6, 3)),
        result(8, opus=usage(31, 5), haiku=usage(6, 3)),
    )
    assert [turn["modelUsage"] for turn in turns] == [
        {OPUS: usage(10, 1)},
        {HAIKU: usage(5, 2)},
        {OPUS: usage(20, 3), HAIKU: usage(1, 1)},
        {OPUS: usage(1, 1)},
    ]


def test_counters_of_newer_versions_are_counted_and_properties_of_a_model_are_not() -> None:
    fixed = {"maxOutputTokens": 64_000, "canonicalModel": "opus", "provider": "firstParty"}
    turns = as_turns(
        result(1, opus=usage(1, 1, thinkingTokens=5, webSearchRequests=1, **fixed)),
        result(2, opus=usage(3, 2, thinkingTokens=9, webSearchRequests=1, **fixed)),
    )
    assert turns[1]["modelUsage"] == {
        OPUS: usage(2, 1, thinkingTokens=4, webSearchRequests=0, **fixed)
    }


@pytest.mark.parametrize(
    "fewer",
    [
        result(0.5, 100, opus=usage(20, 2)),
        result(2, 99, opus=usage(20, 2)),
        result(2, 200, opus=usage(9, 2)),
        result(2, 200, opus=usage(20, 0.5)),
        result(2, 200, haiku=usage(20, 2)),
        result(0, 0),
    ],
)
def test_a_result_with_less_than_before_is_taken_as_it_is(fewer: dict[str, Any]) -> None:
    turns = as_turns(result(1, 100, opus=usage(10, 1)), fewer, fewer | {"duration_api_ms": 300})
    assert turns[1] == fewer
    assert turns[2]["duration_api_ms"] == 300 - fewer["duration_api_ms"]
    assert turns[2]["modelUsage"] == {}


def test_what_a_result_leaves_out_is_remembered_from_before() -> None:
    turns = as_turns(
        result(1, 100, opus=usage(10, 1)),
        {"type": "result", "subtype": "error_during_execution"},
        {"type": "result", "total_cost_usd": None, "duration_api_ms": "soon"},
        result(3, 250, opus=usage(11, 3)),
    )
    assert turns[1] == {"type": "result", "subtype": "error_during_execution"}
    assert turns[2] == {"type": "result", "total_cost_usd": None, "duration_api_ms": "soon"}
    assert turns[3] == result(2, 150, opus=usage(1, 2))


@pytest.mark.parametrize(
    "odd",
    [
        b'{"type":"result","modelUsage":null}',
        b'{"type":"result","modelUsage":[]}',
        b'{"type":"result","modelUsage":7,"total_cost_usd":{"total_cost_usd":1}}',
        b'{"type":"result","modelUsage":{"m":null,"n":[1],"o":"{"}}',
        b'{"type":"result","total_cost_usd":1e999}',
        b'{"type":"result","total_cost_usd":true,"duration_api_ms":[1]}',
        b"{}",
    ],
)
def test_a_result_of_an_unknown_shape_passes_as_it_came(odd: bytes) -> None:
    _, totals = turn_result(event_of(FIRST), ProcessTotals())
    turn, after = turn_result(event_of(odd), totals)
    assert turn.line == odd
    again, _ = turn_result(event_of(SECOND), after)
    assert json.loads(again.line)["total_cost_usd"] == 0.0011


def test_names_inside_of_texts_and_of_other_objects_are_left_alone() -> None:
    decoy = b'"total_cost_usd":5,"modelUsage":{"x":{"inputTokens":1}},"duration_api_ms":9'
    text = json.dumps(decoy.decode()).encode()
    line = (
        b'{"duration_api_ms":%d,"result":%s,"a":{%s},"b":[{%s},"]}"],"type":"result",'
        b'"total_cost_usd":%d}'
    )
    _, totals = turn_result(event_of(line % (10, text, decoy, decoy, 3)), ProcessTotals())
    turn, _ = turn_result(event_of(line % (40, text, decoy, decoy, 7)), totals)
    assert turn.line == line % (30, text, decoy, decoy, 4)


def test_half_a_character_and_spaces_stay_where_they_are() -> None:
    line = b'  { "type" : "result" , "total_cost_usd" : %s , "result" : "\\ud83d \\" \xc2\x85" } '
    _, totals = turn_result(event_of(line % b"1"), ProcessTotals())
    turn, _ = turn_result(event_of(line % b"3"), totals)
    assert turn.line == line % b"2"


def test_a_long_answer_costs_no_time_to_speak_of() -> None:
    """Two megabytes with a quotation mark in every third place; quadratic would take hours."""
    long = FIRST.replace(b'"result":"a"', b'"result":"' + b'a\\"' * 700_000 + b'"')
    _, totals = turn_result(event_of(long), ProcessTotals())
    turn, _ = turn_result(event_of(long), totals)
    assert len(turn.line) < len(long)


# One process's turns: for each, what every model used.
COUNTERS = ("inputTokens", "outputTokens", "cacheReadInputTokens", "thinkingTokens")
MODELS = st.sampled_from([OPUS, HAIKU, 'odd "name"\u00e9{}\\', ""])
USED = st.dictionaries(
    MODELS,
    st.tuples(*(st.integers(0, 10**9) for _ in COUNTERS), st.integers(0, 10**9)),
    max_size=3,
)
SMALL = st.integers(-(2**53), 2**53)
TEXT = st.text(max_size=8)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | SMALL | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OTHERS = st.dictionaries(
    TEXT.filter(
        lambda name: name not in {"total_cost_usd", "duration_api_ms", "modelUsage", "type"}
    ),
    JSON_VALUES,
    max_size=4,
)


def process_results(turns: list[dict[str, tuple[int, ...]]]) -> list[dict[str, Any]]:
    """The figures that a process reports after each of its turns, summed up as the CLI does."""
    cost = 0.0
    api_ms = 0
    models: dict[str, dict[str, Any]] = {}
    results = []
    for used in turns:
        for model, (*counts, nano_dollars) in used.items():
            entry = models.setdefault(
                model, dict.fromkeys(COUNTERS, 0) | {"costUSD": 0.0, "maxOutputTokens": 64_000}
            )
            for name, count in zip(COUNTERS, counts, strict=True):
                entry[name] += count
            entry["costUSD"] += nano_dollars / 1e9
            cost += nano_dollars / 1e9
            api_ms += counts[0]
        figures = {"total_cost_usd": cost, "duration_api_ms": api_ms, "modelUsage": models}
        results.append(json.loads(json.dumps(figures)))
    return results


@given(turns=st.lists(USED, min_size=1, max_size=6), data=st.data())
def test_the_turns_sum_up_to_the_process_and_nothing_else_in_the_line_changes(
    turns: list[dict[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    ascii_only = data.draw(st.booleans())
    totals = ProcessTotals()
    shown = []
    lines = []
    for figures in process_results(turns):
        others = data.draw(OTHERS)
        keys = data.draw(st.permutations(["type", *figures, *others]))
        whole = {"type": "result", **figures, **others}
        ordered = {key: whole[key] for key in keys}
        text = json.dumps(ordered, ensure_ascii=ascii_only, separators=(",", ":"))
        event = event_of(text.encode("utf-8", "surrogatepass"))
        turn, totals = turn_result(event, totals)
        after = json.loads(turn.line)
        assert list(after) == keys
        # Put the process's figures back: the line is what it was.
        back = json.dumps(
            {**after, **figures}, ensure_ascii=ascii_only, separators=(",", ":")
        ).encode("utf-8", "surrogatepass")
        assert back == event.line
        shown.append(after)
        lines.append(figures)
    for used, turn_shown in zip(turns, shown, strict=True):
        for model, (*counts, nano_dollars) in used.items():
            entry = turn_shown["modelUsage"].get(model)
            if entry is None:
                assert not any([*counts, nano_dollars])
                continue
            assert [entry[name] for name in COUNTERS] == counts
            assert entry["costUSD"] == pytest.approx(nano_dollars / 1e9, abs=1e-12)
            assert entry["maxOutputTokens"] == 64_000
    last = lines[-1]
    assert sum(turn["total_cost_usd"] for turn in shown) == pytest.approx(last["total_cost_usd"])
    assert sum(turn["duration_api_ms"] for turn in shown) == last["duration_api_ms"]


@given(
    first=JSON_VALUES, then=JSON_VALUES, cost=JSON_VALUES, spaced=st.sampled_from([None, 1, "\t"])
)
def test_figures_of_any_shape_leave_the_line_one_json_object(
    first: object, then: object, cost: object, spaced: str | int | None
) -> None:
    totals = ProcessTotals(1, 1, {b'"m"': {b'"inputTokens"': 1}})
    for models in (first, {"m": then}, {"m": {"inputTokens": 5, "costUSD": cost}}):
        fields = {"type": "result", "modelUsage": models, "total_cost_usd": cost}
        turn, totals = turn_result(event_of(json.dumps(fields, indent=spaced).encode()), totals)
        shown = json.loads(turn.line)
        assert list(shown) == list(fields)
        assert type(shown["modelUsage"]) is type(models)

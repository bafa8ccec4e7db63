"""
The figures of one turn, from a process that serves several.

In its ``result`` events the CLI reports cost, API time and the usage by model of the whole process
so far.  For a client a turn has to look as if a process had served it alone: `turn_result` replaces
these figures by what the turn added.  Observed with version 2.1.197; the usage by turn, the number
of model turns and the other durations are the turn's own there.

The line is edited, not written anew: all else in it stays byte for byte as the CLI wrote it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from claude_proxy.cli.events import Event

__all__ = ["ProcessTotals", "turn_result"]

Number = int | float

_COST = b'"total_cost_usd"'
_API_TIME = b'"duration_api_ms"'
_BY_MODEL = b'"modelUsage"'

_COUNTER = re.compile(rb'"\w*(?:Tokens|Requests|USD)"')
"""What adds up for a model; newer versions have more of them."""

_LIMIT_OF_MODEL = b'"maxOutputTokens"'
"""A property of the model that has the name of a counter."""

_DECIMALS = 12
"""
Enough for the price of one token of any kind, and few enough to leave out what is only left over
from subtracting binary numbers.
"""

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]|[^\s"{}\[\]:,]++', re.DOTALL)
_NUMBER_START = re.compile(rb"-?\d")
_WHOLE_NUMBER = re.compile(rb"-?\d{1,18}")


@dataclass(frozen=True, slots=True)
class ProcessTotals:
    """
    What a process has reported up to and with its last result; nothing for one that gave none.

    @ivar cost: in USD.
    @ivar api_ms: how long it waited for the API, in milliseconds.
    @ivar models: for each model, as it is written in the line, its counters.
    """

    cost: Number = 0
    api_ms: Number = 0
    models: Mapping[bytes, Mapping[bytes, Number]] = field(default_factory=dict)


def turn_result(event: Event, before: ProcessTotals) -> tuple[Event, ProcessTotals]:
    """
    Make a process's result the result of one turn.

    Every result of a process has to pass through here in its order, also those that no client sees.
    A result that reports less than there was before comes from a process that counts anew, and is
    taken as it is; so is the first one of a process.

    @param event: a ``result`` event.
    @param before: what came of the process's result before this one, or ``ProcessTotals()``.
    @return: the event with the turn's figures, and what to pass with the next result.
    """
    members = _members(event.line, 0)
    by_model = members.get(_BY_MODEL)
    models = None if by_model is None else _members(event.line, by_model.start)
    now = ProcessTotals(
        _read(event.line, members.get(_COST), before.cost),
        _read(event.line, members.get(_API_TIME), before.api_ms),
        before.models
        if models is None
        else {model: _counters(event.line, usage) for model, usage in models.items()},
    )
    if before == ProcessTotals() or _is_less(now, before):
        return event, now
    edits = []
    for name, then in ((_COST, before.cost), (_API_TIME, before.api_ms)):
        number = _number(event.line, members.get(name))
        if number is not None and then:
            edits.append((members[name], _written(number - then)))
    if by_model is not None and models and before.models:
        edits.append((by_model, _usage_by_model(event.line, models, before)))
    line = _edited(event.line, edits)
    return (event if line == event.line else msgspec.structs.replace(event, line=line)), now


class _Member(NamedTuple):
    """One member of an object: where its key begins, where its value begins and ends."""

    key_start: int
    start: int
    end: int


_Edit = tuple[_Member, bytes]


def _members(line: bytes, start: int) -> dict[bytes, _Member]:
    """
    Find the members of the object that begins at `start`, by their keys as they are written.

    @return: empty if there is no object; of members with the same key the last one, as in any
        reader of JSON.
    """
    found: dict[bytes, _Member] = {}
    depth = 0
    key: re.Match[bytes] | None = None
    value_start = end = -1
    for token in _TOKEN.finditer(line, start):
        text = token[0]
        if depth == 1 and text in (b",", b"}"):
            if key is not None and value_start >= 0:
                found[key[0]] = _Member(key.start(), value_start, end)
            key, value_start = None, -1
        elif depth == 1 and key is None:
            key = token
        elif depth == 1 and value_start < 0 and text != b":":
            value_start = token.start()
        end = token.end()
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        if depth == 0:
            break
    return found


def _number(line: bytes, member: _Member | None) -> Number | None:
    """Read a JSON number; None for anything else, and for one that is beyond all bounds."""
    if member is None or not _NUMBER_START.match(line, member.start):
        return None
    value = line[member.start : member.end]
    if _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _read(line: bytes, member: _Member | None, otherwise: Number) -> Number:
    """A total; what a result leaves out is as it was."""
    number = _number(line, member)
    return otherwise if number is None else number


def _counters(line: bytes, usage: _Member) -> dict[bytes, Number]:
    counters = {}
    for name, member in _members(line, usage.start).items():
        if _COUNTER.fullmatch(name) and name != _LIMIT_OF_MODEL:
            number = _number(line, member)
            if number is not None:
                counters[name] = number
    return counters


def _is_less(now: ProcessTotals, before: ProcessTotals) -> bool:
    return (
        now.cost < before.cost
        or now.api_ms < before.api_ms
        or any(
            now.models.get(model, {}).get(name, 0) < number
            for model, counters in before.models.items()
            for name, number in counters.items()
        )
    )


def _usage_by_model(line: bytes, models: Mapping[bytes, _Member], before: ProcessTotals) -> bytes:
    """The object of all models, less what was there before and those that were not used since."""
    kept = []
    for model, usage in models.items():
        then = before.models.get(model, {})
        added = {name: n - then.get(name, 0) for name, n in _counters(line, usage).items()}
        if any(added.values()) or model not in before.models:
            members = _members(line, usage.start)
            edits = [(members[name], _written(n)) for name, n in added.items() if then.get(name)]
            kept.append(_edited(line, edits, usage.key_start, usage.end))
    return b"{" + b",".join(kept) + b"}"


def _written(number: Number) -> bytes:
    """Write a number as the CLI does: in plain decimals, without zeros at the end."""
    if isinstance(number, int):
        return b"%d" % number
    return f"{number:.{_DECIMALS}f}".rstrip("0").rstrip(".").encode()


def _edited(line: bytes, edits: list[_Edit], start: int = 0, end: int | None = None) -> bytes:
    """A part of the line in which some values are others."""
    pieces = []
    for member, value in sorted(edits):
        pieces += [line[start : member.start], value]
        start = member.end
    return b"".join([*pieces, line[start:end]])

"""
The words by which a test tells the model on the loopback what to answer.

A user message carries its own script: `[[text hello]] [[tool:Bash {"command": "ls"}]] [[then]]
[[text done]]`.  Text outside the brackets is ignored.  `[[then]]` starts the answer to the next
request of the same turn, usually the one that brings the tool's result.  What each word means
stands in `answers`; an unknown word is an error of the whole request, so that a misspelt test
cannot pass by accident.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Directive", "ScriptError", "parse"]

_OPENING = re.compile(r"\[\[([a-z]+(?:-[a-z]+)*)(?=[\s:\]])")
_BRACKETS = re.compile(r"\[\[|\]\]")
_TOOL_NAME = re.compile(r":([\w.-]+)\s*")


class ScriptError(ValueError):
    """A script that means nothing; the message names the place."""


class Directive(NamedTuple):
    """One `[[name argument]]`; C{data} is the JSON object of those that take one."""

    name: str
    argument: str = ""
    data: Mapping[str, Any] = {}


def parse(text: str) -> list[list[Directive]]:
    """
    The steps of a script, one for each request of the turn; empty if the text is no script.

    @raise ScriptError: an argument is missing or malformed.
    """
    steps: list[list[Directive]] = [[]]
    position = 0
    while opening := _OPENING.search(text, position):
        name = opening[1]
        directive, position = _directive(name, text, opening.end())
        if name == "then":
            steps.append([])
        else:
            steps[-1].append(directive)
    return steps if position else []


def _directive(name: str, text: str, position: int) -> tuple[Directive, int]:
    data: Any = {}
    if name in {"tool", "structured"}:
        argument = ""
        if name == "tool":
            tool = _TOOL_NAME.match(text, position)
            if tool is None:
                raise ScriptError(f"Write [[tool:NAME {{...}}]], not {text[position - 6 :]!r}.")
            argument, position = tool[1], tool.end()
        data, position = _json(text, position)
        if not isinstance(data, dict):
            raise ScriptError(f"[[{name}]] takes a JSON object.")
    elif name == "subagent":
        end = _balanced(text, position)
        argument, position = text[position:end].strip(), end
    elif text[position:].lstrip().startswith('"'):
        argument, position = _json(text, position)
    else:
        end = text.find("]]", position)
        argument, position = text[position : max(end, position)].strip(), end
    if position < 0 or not text.startswith("]]", position):
        raise ScriptError(f"[[{name}]] is not closed: {text[position - 20 : position + 20]!r}.")
    return Directive(name, str(argument), data), position + 2


def _json(text: str, position: int) -> tuple[Any, int]:
    start = position + len(text[position:]) - len(text[position:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ScriptError(f"No JSON at {text[start : start + 40]!r}: {error.msg}.") from error
    return value, end + len(text[end:]) - len(text[end:].lstrip())


def _balanced(text: str, position: int) -> int:
    depth = 1
    for bracket in _BRACKETS.finditer(text, position):
        depth += 1 if bracket[0] == "[[" else -1
        if depth == 0:
            return bracket.start()
    return -1

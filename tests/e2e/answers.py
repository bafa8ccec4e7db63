"""
What the scripted model answers: the directives of one step made into content, events and errors.

Everything here is pure; `messages_api` does the talking.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.e2e.conversation import Conversation
from tests.e2e.script import Directive, ScriptError

__all__ = ["Answer", "ApiError", "Block", "Wait", "answer_to", "big_text", "events", "message"]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
_WORDS = re.compile(r"\s*\S+\s*")
_BIG_DELTA = 4096
_TOOL_DELTA = 40


class ApiError(NamedTuple):
    """An HTTP error in the API's shape."""

    status: int
    type: str
    message: str
    headers: Mapping[str, str] = {}


class Wait(NamedTuple):
    """A place where the stream stops for some seconds, or until the test releases the name."""

    seconds: float = 0.0
    name: str = ""


class Block(NamedTuple):
    """One content block: as it starts, as it grows, and whole."""

    start: Mapping[str, Any]
    deltas: Sequence[Mapping[str, Any]]
    whole: Mapping[str, Any]
    pause: float = 0.0


@dataclass
class Answer:
    """
    What one request gets.

    @ivar error: sent instead of anything else.
    @ivar ending: `whole`, or how the stream stops after the last delta: `cut`, `hang`, `error`.
    """

    model: str
    parts: list[Block | Wait] = field(default_factory=list)
    stop_reason: str = "end_turn"
    usage: dict[str, int] = field(
        default_factory=lambda: {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 20,
        }
    )
    ending: str = "whole"
    error_type: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    before: list[Wait] = field(default_factory=list)
    error: ApiError | None = None


def big_text(length: int) -> str:
    """What `[[big LENGTH]]` answers: numbered groups of eight characters, cut to that length."""
    return "".join(f"{number:07d} " for number in range(length // 8 + 1))[:length]


def answer_to(
    conversation: Conversation, steps: Sequence[Sequence[Directive]], done: int, failures: int
) -> Answer:
    """
    The answer to the next request.

    @param steps: the script.
    @param done: how many requests of this turn were answered.
    @param failures: how many times this step was answered with an error.
    @raise ScriptError: an unknown word or a bad argument.
    """
    answer = Answer(conversation.model)
    for directive in steps[done] if done < len(steps) else []:
        if directive.name == "error":
            _error(answer, directive.argument, failures, again=conversation.is_repetition)
        elif directive.name == "again":
            if conversation.is_repetition:
                answer.parts = [_text(directive.argument)]
        elif directive.name in _SETTINGS:
            _SETTINGS[directive.name](answer, directive.argument)
        else:
            block = _block(conversation, directive)
            answer.parts.append(block)
            if block.start["type"] == "tool_use" and answer.stop_reason == "end_turn":
                answer.stop_reason = "tool_use"
    if not answer.parts and answer.ending == "whole":
        answer.parts.append(_text(_default(conversation)))
    return answer


def _default(conversation: Conversation) -> str:
    results = conversation.last_tool_results
    if results:
        return f"Done. Tool said: {' | '.join(results)}"
    return f"You said: {conversation.user_texts[-1] if conversation.user_texts else ''}"


def _error(answer: Answer, argument: str, failures: int, *, again: bool) -> None:
    status, *options = argument.split()
    headers: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if re.fullmatch(r"x\d+", option):
            if failures >= int(option[1:]):
                return
        elif key == "model":
            if value not in answer.model:
                return
        elif option == "again":
            if not again:
                return
        elif key == "retry-after":
            headers["retry-after"] = value
        else:
            raise ScriptError(f"[[error]] does not know {option!r}.")
    kind = _ERROR_TYPES.get(int(status), "api_error")
    answer.error = ApiError(int(status), kind, f"Scripted {kind}", headers)


def _delay(answer: Answer, argument: str) -> None:
    answer.before.append(Wait(seconds=_seconds(argument)))


def _hold(answer: Answer, argument: str) -> None:
    answer.before.append(Wait(name=argument))


def _pause(answer: Answer, argument: str) -> None:
    answer.parts.append(Wait(seconds=_seconds(argument)))


def _wait(answer: Answer, argument: str) -> None:
    answer.parts.append(Wait(name=argument))


def _stop(answer: Answer, argument: str) -> None:
    answer.stop_reason = argument


def _header(answer: Answer, argument: str) -> None:
    name, _, value = argument.partition(":")
    answer.headers[name.strip()] = value.strip()


def _usage(answer: Answer, argument: str) -> None:
    keys = dict(
        zip(("in", "cache-write", "cache-read", "out"), answer.usage, strict=True),
    )
    for pair in argument.split():
        key, _, value = pair.partition("=")
        if key not in keys:
            raise ScriptError(f"[[usage]] knows {', '.join(keys)}, not {key!r}.")
        answer.usage[keys[key]] = int(value)


def _cut(answer: Answer, argument: str) -> None:
    answer.ending = "cut"


def _hang(answer: Answer, argument: str) -> None:
    answer.ending = "hang"


def _sse_error(answer: Answer, argument: str) -> None:
    answer.ending, answer.error_type = "error", argument or "overloaded_error"


_SETTINGS = {
    "delay": _delay,
    "hold": _hold,
    "pause": _pause,
    "wait": _wait,
    "stop": _stop,
    "header": _header,
    "usage": _usage,
    "cut": _cut,
    "hang": _hang,
    "sse-error": _sse_error,
}


def _block(conversation: Conversation, directive: Directive) -> Block:
    name, argument, data = directive
    if name in _BLOCKS:
        return _BLOCKS[name](argument)
    if name == "tool":
        return _tool(argument, data)
    if name == "structured":
        return _tool("StructuredOutput", data)
    if name == "subagent":
        task = {"description": "sub", "prompt": argument, "subagent_type": "general-purpose"}
        return _tool("Agent" if "Agent" in conversation.tools else "Task", task)
    if name == "echo":
        return _text(json.dumps(conversation.summary(), ensure_ascii=False))
    if name == "history":
        return _text(json.dumps(conversation.user_texts, ensure_ascii=False))
    raise ScriptError(f"There is no [[{name}]].")


def _big(argument: str) -> Block:
    text = big_text(int(argument))
    return _text(text, _pieces(text, _BIG_DELTA))


def _slow(argument: str) -> Block:
    count, _, each = argument.partition("x")
    return _tokens(count, _seconds(each))


def _tokens(count: str, pause: float = 0.0) -> Block:
    words = [f"tok{number} " for number in range(int(count))]
    return _text("".join(words), words, pause)


def _text(text: str, pieces: Sequence[str] | None = None, pause: float = 0.0) -> Block:
    pieces = (_WORDS.findall(text) or [text]) if pieces is None else pieces
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return Block({"type": "text", "text": ""}, deltas, {"type": "text", "text": text}, pause)


def _thinking(text: str) -> Block:
    signature = "c2lnbmF0dXJlLWZha2U="
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _WORDS.findall(text)]
    deltas.append({"type": "signature_delta", "signature": signature})
    whole = {"type": "thinking", "thinking": text, "signature": signature}
    return Block({"type": "thinking", "thinking": "", "signature": ""}, deltas, whole)


_BLOCKS: Mapping[str, Callable[[str], Block]] = {
    "text": _text,
    "thinking": _thinking,
    "big": _big,
    "tokens": _tokens,
    "slow": _slow,
}


def _tool(name: str, data: Mapping[str, Any]) -> Block:
    start = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
    pieces = ["", *_pieces(json.dumps(data), _TOOL_DELTA)]
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return Block(start, deltas, {**start, "input": data})


def _pieces(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def _seconds(argument: str) -> float:
    match = re.fullmatch(r"(\d+)(ms|s)", argument.strip())
    if match is None:
        raise ScriptError(f"{argument!r} is no time such as 50ms or 2s.")
    return int(match[1]) / (1000 if match[2] == "ms" else 1)


def message(answer: Answer) -> dict[str, Any]:
    """The answer as one JSON message, for a request that does not stream."""
    blocks = [part.whole for part in answer.parts if isinstance(part, Block)]
    head = _head(answer)
    return {**head, "content": blocks, "stop_reason": answer.stop_reason, "usage": answer.usage}


def events(answer: Answer) -> Iterator[Wait | dict[str, Any]]:
    """The answer as the API's stream events, with the places where the stream waits."""
    yield {"type": "message_start", "message": _head(answer)}
    yield {"type": "ping"}
    blocks = [part for part in answer.parts if isinstance(part, Block)]
    index = 0
    for part in answer.parts:
        if isinstance(part, Wait):
            yield part
            continue
        yield {"type": "content_block_start", "index": index, "content_block": part.start}
        for delta in part.deltas:
            if part.pause:
                yield Wait(seconds=part.pause)
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        # A stream that breaks does so inside a block.
        if answer.ending == "whole" or part is not blocks[-1]:
            yield {"type": "content_block_stop", "index": index}
        index += 1
    if answer.ending == "error":
        error = {"type": answer.error_type, "message": f"Scripted {answer.error_type}"}
        yield {"type": "error", "error": error}
    elif answer.ending == "whole":
        delta = {"stop_reason": answer.stop_reason, "stop_sequence": None}
        yield {"type": "message_delta", "delta": delta, "usage": answer.usage}
        yield {"type": "message_stop"}


def _head(answer: Answer) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**answer.usage, "output_tokens": 1},
    }

"""
A turn in OpenAI's words: as ``chat.completion.chunk`` objects, or as one ``chat.completion``.

What is ours beside OpenAI's shapes: ``reasoning_content`` and ``reasoning`` (most clients read one
of the two) for what the model thought and did, and an object ``claude`` at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from zope.interface import implementer

from claude_proxy.cli.events import Event
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.dialects.answer import REASONING, TEXT, AnswerReader, Piece
from claude_proxy.dialects.barejson import BareJson
from claude_proxy.dialects.inline import InlineActivity
from claude_proxy.dialects.shapes import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ClaudeFields,
    FinishReason,
    Usage,
)
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.interfaces import IFramer, IWholeAnswer

__all__ = ["Activity", "ChatAnswer", "ChatStream"]

Activity = Literal["reasoning", "content", "none"]

LONGEST_REMEMBERED = 1 << 20
"""Characters of an answer up to which its conversation can be found again by its text."""

LONGEST_WHOLE = 64 << 20
"""Characters, reasoning among them, of an answer that is not streamed."""

_SHOWN = (
    "dangerously-skip-permissions",
    "allowed-tools",
    "disallowed-tools",
    "mcp-allowed-tools",
)
"""Parameters that the top of a next message could set, in the order of an older server."""

_FINISH_REASONS: Mapping[OutcomeKind, FinishReason] = {
    OutcomeKind.SUCCESS: "stop",
    OutcomeKind.LIMIT: "length",
    OutcomeKind.REFUSAL: "content_filter",
}


class _Chat:
    """What both forms of an answer have in common: what is told, and how it ends."""

    def __init__(
        self,
        *,
        completion_id: str,
        created: int,
        model: str,
        include_usage: bool,
        bare_json: BareJson | None,
        activity: Activity,
    ) -> None:
        """
        @param completion_id: names the completion, in each of its chunks.
        @param created: seconds since 1970.
        @param model: the name to give if the CLI does not say which model serves.
        @param include_usage: the client wants the tokens counted in its stream.
        @param bare_json: the content is one JSON value, as `AnswerReader` finds it.
        @param activity: where thinking and tool activity go: to fields of their own, into the
            content between C{<thinking>} tags, or nowhere.
        """
        self._completion_id = completion_id
        self._created = created
        self._model = model
        self._include_usage = include_usage
        self._workspace: str | None = None
        self._reader = AnswerReader(bare_json)
        self._drops_reasoning = activity == "none"
        self._inline: InlineActivity | None = None
        if activity == "content" and bare_json is None:
            self._inline = InlineActivity()
        self._answer: list[str] = []
        self._answer_length = 0
        self._complete = False

    def planned(self, workspace: str | None, parameters: Mapping[str, object]) -> None:
        """Learn where the turn runs, and which parameters are in force."""
        self._workspace = workspace
        if self._inline is not None:
            shown = {name: parameters[name] for name in _SHOWN if name in parameters}
            self._inline.shown = {"workspace": workspace, **shown}

    @property
    def answer_text(self) -> str | None:
        """
        The content of an answer that is whole or was cut at a limit.

        None before its end, after a failure, and if it has more than a million characters.
        """
        whole = self._complete and self._answer_length <= LONGEST_REMEMBERED
        return "".join(self._answer) if whole else None

    def _read(self, events: Sequence[Event]) -> list[Piece]:
        pieces = self._reader.read(events)
        inline = self._inline
        if inline is not None and inline.session_id is None:
            inline.session_id = next((event.session_id for event in events), None)
        return self._place(pieces) if pieces else pieces

    def _finish(self, outcome: Outcome, session_id: str | None) -> list[Piece]:
        """
        What is told at the end.

        @raise ProxyError: the turn failed, or its answer is none.
        """
        if outcome.kind not in _FINISH_REASONS or outcome.result is None:
            raise outcome.error or ProxyError(Failure.INTERNAL_ERROR)
        if self._inline is not None:
            self._inline.session_id = session_id or self._inline.session_id
        success = outcome.kind is OutcomeKind.SUCCESS
        pieces = self._place(self._reader.finish(outcome.result, success=success), at_end=True)
        self._complete = outcome.kind is not OutcomeKind.REFUSAL
        return pieces

    def _place(self, pieces: list[Piece], *, at_end: bool = False) -> list[Piece]:
        """Put the activity where it is wanted, and keep the text."""
        if self._inline is not None:
            pieces = self._inline.place(pieces) + (self._inline.end() if at_end else [])
        elif self._drops_reasoning:
            pieces = [piece for piece in pieces if piece.kind is TEXT]
        for kind, text in pieces:
            if kind is TEXT and self._answer_length <= LONGEST_REMEMBERED:
                self._answer.append(text)
                self._answer_length += len(text)
                if self._answer_length > LONGEST_REMEMBERED:
                    self._answer.clear()
        return pieces

    def _finish_reason(self, outcome: Outcome) -> FinishReason:
        reason = _FINISH_REASONS[outcome.kind]
        return "length" if reason == "stop" and self._reader.cut_short else reason

    def _extras(self, outcome: Outcome, session_id: str | None) -> ClaudeFields:
        """What OpenAI's shapes have no place for."""
        turns = outcome.totals.get("num_turns")
        return {
            "session_id": session_id or outcome.session_id,
            "workspace": self._workspace,
            "cost_usd": outcome.totals.get("total_cost_usd"),
            "num_turns": None if turns is None else int(turns),
        }


@implementer(IFramer)
class ChatStream(_Chat):
    """
    A turn as Server-Sent Events.

    C{end} and C{events} raise a failure; it is for the caller to say it by an HTTP status or, once
    something was sent, by C{failure}.
    """

    _before = b""
    _after = b""

    def open(self) -> bytes:
        """The chunk with the role, which comes before all others."""
        if self._before:
            return b""
        # From now on the model's name is the same in all chunks.
        self._model = self._reader.model or self._model
        head = _encode(self._chunk([]))
        usage = b',"usage":null' if self._include_usage else b""
        self._before = b"data: " + head.removesuffix(b"]}") + b'{"index":0,"delta":'
        self._after = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        return self._frame(b'{"role":"assistant","content":""}')

    def events(self, events: list[Event]) -> bytes:
        pieces = self._read(events)
        return self._frames(pieces) if pieces else b""

    def beat(self) -> bytes:
        """A chunk in which nothing is new: no client takes offence at it."""
        return self.open() or self._frame(b"{}")

    def end(self, outcome: Outcome, session_id: str | None) -> bytes:
        if outcome.kind is OutcomeKind.ABANDONED:
            return b""
        pieces = self._finish(outcome, session_id)
        frames = [self._frames(pieces) if pieces else self.open()]
        extras = self._extras(outcome, session_id)
        reason = self._finish_reason(outcome)
        choice: ChunkChoice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}
        last = self._chunk([choice])
        last["claude"] = extras
        if self._include_usage:
            last["usage"] = None
        frames.append(_data(last))
        if self._include_usage:
            told = self._chunk([])
            told["usage"] = _usage(outcome)
            told["claude"] = extras
            frames.append(_data(told))
        frames.append(b"data: [DONE]\n\n")
        return b"".join(frames)

    def failure(self, error: ProxyError, session_id: str | None) -> bytes:  # noqa: ARG002 - the interface's
        self._complete = False
        return _data(error.envelope())

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self._completion_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _frames(self, pieces: list[Piece]) -> bytes:
        frames = [self.open()]
        for kind, text in pieces:
            said = _encode(text)
            if kind is TEXT:
                frames.append(self._frame(b'{"content":' + said + b"}"))
            else:
                both = b'{"reasoning_content":' + said + b',"reasoning":' + said + b"}"
                frames.append(self._frame(both))
        return b"".join(frames)

    def _frame(self, delta: bytes) -> bytes:
        return self._before + delta + self._after


@implementer(IWholeAnswer)
class ChatAnswer(_Chat):
    """A turn as one object."""

    def __init__(self, **form: Any) -> None:
        """Takes what L{ChatStream} takes."""
        super().__init__(**form)
        self._told: dict[str, list[str]] = {TEXT: [], REASONING: []}
        self._told_length = 0

    def events(self, events: list[Event]) -> None:
        self._take(self._read(events))

    def body(self, outcome: Outcome, session_id: str | None) -> bytes:
        self._take(self._finish(outcome, session_id))
        message: AnswerMessage = {
            "role": "assistant",
            "content": "".join(self._told[TEXT]),
            "refusal": None,
        }
        reasoning = "".join(self._told[REASONING])
        if reasoning:
            message["reasoning_content"] = message["reasoning"] = reasoning
        choice: Choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason(outcome),
        }
        completion: ChatCompletion = {
            "id": self._completion_id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._reader.model or self._model,
            "choices": [choice],
            "usage": _usage(outcome),
            "claude": self._extras(outcome, session_id),
        }
        return _encode(completion)

    def _take(self, pieces: list[Piece]) -> None:
        for kind, text in pieces:
            self._told[kind].append(text)
            self._told_length += len(text)
        if self._told_length > LONGEST_WHOLE:
            self._told = {TEXT: [], REASONING: []}
            message = (
                f"The answer and its reasoning have more than the {LONGEST_WHOLE:,} characters "
                "that the server collects. Ask for a stream instead: 'stream': true."
            )
            raise ProxyError(Failure.UPSTREAM_ERROR, message)


def _usage(outcome: Outcome) -> Usage:
    """
    The tokens of the turn; those that came from the provider's cache are part of the prompt.

    After a request that broke the CLI counts nothing in ``usage``, but all of it by model.
    """
    total = outcome.totals
    cached = int(total.get("cache_read_input_tokens", 0))
    prompt = cached + int(total.get("input_tokens", 0))
    prompt += int(total.get("cache_creation_input_tokens", 0))
    completion = int(total.get("output_tokens", 0))
    if not prompt and not completion:
        cached, prompt, completion = _usage_by_model(outcome.result)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _usage_by_model(result: Event | None) -> tuple[int, int, int]:
    """Tokens from the cache, of the prompt with them, and of the completion."""
    by_model = result.fields().get("modelUsage") if result is not None else None
    models = list(by_model.values()) if isinstance(by_model, dict) else []

    def count(*names: str) -> int:
        found = (model.get(name) for model in models if isinstance(model, dict) for name in names)
        return sum(int(number) for number in found if isinstance(number, (int, float)))

    cached = count("cacheReadInputTokens")
    prompt = count("inputTokens", "cacheCreationInputTokens") + cached
    return cached, prompt, count("outputTokens")


_encode_json = msgspec.json.encode

# JSON lets them stand in a string; clients that read lines as text take each for the end of one.
_LINE_ENDS = tuple(
    (character.encode(), escaped)
    for character, escaped in (
        ("\u0085", rb"\u0085"),
        ("\u2028", rb"\u2028"),
        ("\u2029", rb"\u2029"),
    )
)


def _encode(value: object) -> bytes:
    """Encode as JSON in which nothing looks like the end of a line."""
    try:
        encoded = _encode_json(value)
    except UnicodeEncodeError:
        # Half of a character, which UTF-8 cannot hold.
        dumped = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        encoded = dumped.encode("utf-8", "replace")
    if isinstance(value, str) and value.isascii():
        return encoded
    for raw, escaped in _LINE_ENDS:
        if raw in encoded:
            encoded = encoded.replace(raw, escaped)
    return encoded


def _data(value: object) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"

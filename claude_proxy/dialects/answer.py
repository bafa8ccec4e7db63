"""
Events to the answer: the model's words, each character exactly once and in order.

The CLI tells a text twice: in pieces as the model writes it (``stream_event``), and whole
(``assistant``); versions without partial messages tell it whole only.  And when a request to the
model breaks in the middle of the answer, the CLI repeats it in silence: the pieces stop, and a
message with another id brings the whole text.  What was told before must then be how the repeated
message begins; otherwise nothing that could follow would make a true answer, and that is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from claude_proxy.cli.events import Event
from claude_proxy.dialects.activity import describe_call, describe_result
from claude_proxy.dialects.barejson import BareJson, JsonFinder
from claude_proxy.dialects.blocks import BLOCK_KINDS, REASONING, TEXT, Block, Mark, told_blocks
from claude_proxy.dialects.partials import (
    UNDECODABLE,
    Head,
    Partial,
    Start,
    decode_line,
    decode_odd,
)
from claude_proxy.errors import Failure, ProxyError

__all__ = ["REASONING", "TEXT", "AnswerReader", "BareJson", "Piece"]


class Piece(NamedTuple):
    """
    Some characters.

    @ivar kind: `TEXT` or `REASONING`.
    """

    kind: str
    text: str


_CUT_SHORT = ("max_tokens", "model_context_window_exceeded")
_BLANK_LINE = "\n\n"


class AnswerReader:
    """
    Reads the events of one turn.

    @ivar model: the model that serves, once the CLI has named it.
    """

    def __init__(self, bare_json: BareJson | None = None) -> None:
        """
        @param bare_json: the answer is to be JSON: all text of the model is reasoning, and `finish`
            gives the JSON.
        """
        self.model: str | None = None
        self._json = JsonFinder(bare_json) if bare_json is not None else None
        self._failed: ProxyError | None = None
        self._out: list[Piece] = []
        # Pieces of one block that came together, not yet taken.
        self._run: list[str] = []
        self._run_kind = TEXT
        # The model's current message; it is live from its start to its end in partial messages.
        self._id: str | None = None
        self._live = False
        self._has_partials = False
        self._stop_reason: str | None = None
        self._block: Block | None = None
        self._blocks: list[Block] = []
        self._closed: list[Block] = []
        self._calls: list[str] = []
        # What a message that broke has told and its repetition not yet.
        self._owed: dict[str, list[Mark]] = {TEXT: [], REASONING: []}
        self._owed_calls: list[str] = []
        # How the next piece is set apart from what was told before it.
        self._gap = False
        self._has_text = False
        self._has_reasoning = False
        self._was_tool = False

    @property
    def cut_short(self) -> bool:
        """Whether the last message ended at a limit of its length."""
        return self._stop_reason in _CUT_SHORT

    def read(self, events: Sequence[Event]) -> list[Piece]:
        """
        Read events that arrived together.  After a failure nothing is read any more.

        @return: what they tell; neighbours are of different kinds.
        @raise ProxyError: UPSTREAM_ERROR, if what was told before is not the answer.
        """
        if self._failed is not None:
            return []
        self._out = []
        try:
            self._read(events)
            self._take_run()
        except ProxyError as error:
            self._failed = error
            raise
        return self._out

    def finish(self, result: Event, *, success: bool) -> list[Piece]:
        """
        Read the ``result`` event, which `read` is not given.

        @param success: the turn was neither limited nor refused.
        @return: what is to be told at the end: the JSON, or the result of a turn in which no model
            spoke, such as that of a local command.
        @raise ProxyError: UPSTREAM_ERROR, if what was told is not the answer, or there is no JSON.
        """
        if self._failed is not None:
            raise self._failed
        self._out = []
        try:
            self._finish(result.fields(), success=success)
        except ProxyError as error:
            self._failed = error
            raise
        return self._out

    def _finish(self, fields: dict[str, Any], *, success: bool) -> None:
        self._settle()
        if self._json is not None:
            found = self._json.find(fields.get("structured_output"))
            if found is not None:
                self._out.append(Piece(TEXT, found))
            elif success and not self.cut_short:
                raise self._json.missing()
        elif success and not self._has_text:
            text = fields.get("result")
            if isinstance(text, str):
                self._tell(TEXT, text)

    # One event after the other.

    def _read(self, events: Sequence[Event]) -> None:  # noqa: C901 - the one hot loop, flat
        append = self._run.append
        for event in events:
            kind = event.type
            if kind == "stream_event":
                if event.parent_tool_use_id is not None:
                    continue
                try:
                    partial = decode_line(event.line).event
                except UNDECODABLE:
                    partial = decode_odd(event)
                delta = partial.delta
                if delta is None or partial.type != "content_block_delta":
                    self._take_run()
                    self._read_frame(partial)
                elif delta.type == "text_delta":
                    if self._run_kind is not TEXT:
                        self._take_run()
                        self._run_kind = TEXT
                    append(delta.text)
                elif delta.type == "thinking_delta":
                    if self._run_kind is not REASONING:
                        self._take_run()
                        self._run_kind = REASONING
                    append(delta.thinking)
            elif kind != "system":
                self._take_run()
                self._read_whole(event)
            elif event.subtype == "init":
                model = event.fields().get("model")
                self.model = model if isinstance(model, str) and model else self.model

    def _take_run(self) -> None:
        """Take the pieces that came together; what belongs to a block that is whole is known."""
        if not self._run:
            return
        text = "".join(self._run)
        self._run.clear()
        block = self._block
        if block is None or block.kind is not self._run_kind:
            # No start of it was seen.
            self._live = self._has_partials = True
            block = self._open(self._run_kind)
        if not block.whole:
            self._feed(block, text)

    def _read_frame(self, partial: Partial) -> None:
        """Read what stands around the pieces of blocks."""
        self._has_partials = True
        if partial.type == "message_start":
            head = partial.message or Head()
            self.model = head.model or self.model
            self._begin(head.id, live=True)
        elif partial.type == "content_block_start" and partial.content_block is not None:
            self._close()
            self._read_start(partial.content_block)
        elif partial.type == "content_block_stop":
            self._close()
        elif partial.type == "message_delta" and partial.delta is not None:
            self._note_stop(partial.delta.stop_reason)
        elif partial.type == "message_stop":
            self._close()
            # A refused message is no part of the answer if another model takes its place.
            self._live = self._stop_reason == "refusal"
            self._settle()

    def _read_start(self, start: Start) -> None:
        kind = BLOCK_KINDS.get(start.type)
        if kind is not None:
            block = self._open(kind)
            self._feed(block, start.text if kind is TEXT else start.thinking)
        elif start.type.endswith("tool_use"):
            self._set_apart()

    def _read_whole(self, event: Event) -> None:
        """Read an ``assistant`` or a ``user`` event."""
        if event.is_replay or event.type not in ("assistant", "user"):
            return
        fields = event.fields()
        message = fields.get("message")
        if not isinstance(message, dict):
            return
        sub_agent = event.parent_tool_use_id is not None
        if event.type == "user":
            self._read_user(message, sub_agent=sub_agent)
        elif fields.get("error") or message.get("model") == "<synthetic>":
            # The CLI's own prose about an error, an interruption or a command.
            return
        elif sub_agent:
            for block in told_blocks(message):
                self._read_tool_block(block, sub_agent=True)
        else:
            self._read_assistant(message)

    def _read_assistant(self, message: dict[str, Any]) -> None:
        message_id, model = message.get("id"), message.get("model")
        if isinstance(model, str) and model:
            self.model = model
        blocks = list(told_blocks(message))
        if blocks and message_id != self._id:
            self._begin(message_id if isinstance(message_id, str) else None, live=False)
        self._note_stop(message.get("stop_reason"))
        for block in blocks:
            kind = BLOCK_KINDS.get(block["type"])
            if kind is None:
                self._read_tool_block(block, sub_agent=False)
            else:
                self._complete(kind, block[block["type"]])

    def _read_user(self, message: dict[str, Any], *, sub_agent: bool) -> None:
        """Read tool results; the CLI's own prompts and notes only end what was being said."""
        for block in told_blocks(message):
            self._read_tool_block(block, sub_agent=sub_agent)
        if sub_agent:
            return
        if not self.cut_short:
            self._set_apart()
        if not self._has_partials:
            self._blocks, self._calls = [], []

    def _read_tool_block(self, block: dict[str, Any], *, sub_agent: bool) -> None:
        """Read a block, if it is a tool's call or result."""
        kind = str(block.get("type"))
        if kind.endswith("tool_use"):
            said = describe_call(block, sub_agent=sub_agent)
            if said in self._owed_calls:
                self._owed_calls.remove(said)
            else:
                self._tell_tool(said)
            if not sub_agent:
                self._calls.append(said)
        elif kind.endswith("tool_result"):
            self._tell_tool(describe_result(block, sub_agent=sub_agent))
        else:
            return
        if not sub_agent:
            self._set_apart()

    # Messages and their blocks.

    def _begin(self, message_id: str | None, *, live: bool) -> None:
        """Begin a message; if the one before has broken, this one repeats it."""
        if self._live or self._is_unanswered():
            for kind, owed in self._owed.items():
                told = (block.mark() for block in self._blocks if block.kind is kind)
                owed[:0] = [mark for mark in told if mark.length]
            self._owed_calls += self._calls
        else:
            self._settle()
            self._owed[REASONING].clear()
            self._owed_calls.clear()
        self._id, self._live = message_id, live
        self._block = None
        self._blocks, self._closed, self._calls = [], [], []
        self._stop_reason = None

    def _is_unanswered(self) -> bool:
        """
        Whether the message before cannot have been whole, where no partial messages tell.

        The CLI (1.0.24) tells each block as it comes and no end of the message.  But a message
        that is whole and not the last one calls a tool, and the tool's result follows it.
        """
        return not self._has_partials and self._stop_reason is None and bool(self._blocks)

    def _open(self, kind: str) -> Block:
        self._block = block = Block(kind)
        self._blocks.append(block)
        return block

    def _close(self) -> None:
        """End the current block of a live message."""
        block, self._block = self._block, None
        if block is None:
            return
        if block.length and not block.whole:
            self._closed.append(block)
        if block.lacks and block.kind is TEXT:
            raise _broken()

    def _complete(self, kind: str, text: str) -> None:
        """Take a block as a whole, be it the current one, one that has ended, or a new one."""
        block = self._block
        if block is None or block.kind is not kind or block.whole:
            closed = next((block for block in self._closed if block.kind is kind), None)
            if closed is not None:
                self._closed.remove(closed)
                block = closed
            else:
                block = self._open(kind)
                self._block = None
        self._feed(block, text, whole=True)
        if block.lacks and kind is TEXT:
            raise _broken()

    def _settle(self) -> None:
        """What a broken message told must have been repeated by now."""
        if self._owed[TEXT]:
            raise _broken()

    def _note_stop(self, reason: object) -> None:
        if isinstance(reason, str):
            self._stop_reason = reason

    # Telling.

    def _feed(self, block: Block, text: str, *, whole: bool = False) -> None:
        """Take more of a block, or all of it, and tell what is new."""
        kind = block.kind
        owed = self._owed[kind]
        if owed and text and not block.length:
            block.repeat(owed.pop(0))
        new = block.complete(text) if whole else block.take(text)
        if kind is TEXT and (block.differs or (new and owed)):
            raise _broken()
        if kind is TEXT and not block.fresh:
            # Whatever came meanwhile: this goes on in the middle of a statement.
            self._gap = False
        if new:
            self._tell(kind, new, apart=block.fresh or self._was_tool)
            block.fresh = False

    def _set_apart(self) -> None:
        """What is said next is another statement."""
        self._gap = True

    def _tell_tool(self, said: str) -> None:
        self._tell(REASONING, said, apart=True)
        self._was_tool = True

    def _tell(self, kind: str, text: str, *, apart: bool = False) -> None:
        """
        Tell something.

        @param apart: it is the beginning of something.
        """
        if not text:
            return
        if kind is TEXT:
            if self._json is not None:
                self._json.keep(text, apart=self._gap)
                kind = REASONING
            elif self._gap and self._has_text:
                text = _BLANK_LINE + text
            self._gap = False
        if kind is TEXT:
            self._has_text = True
        else:
            if apart and self._has_reasoning:
                text = _BLANK_LINE + text
            self._has_reasoning = True
            self._was_tool = False
        out = self._out
        if out and out[-1].kind is kind:
            text = out.pop().text + text
        out.append(Piece(kind, text))


def _broken() -> ProxyError:
    return ProxyError(
        Failure.UPSTREAM_ERROR,
        "The model's stream broke off in the middle of the answer, and its repetition reads "
        "differently: what came so far is not the answer. Ask again.",
    )

"""
User messages in which text is text.

The CLI reads files that a prompt names with ``@`` and runs what looks like a ``/command``, without
asking anyone.  It does so for the last block of a message only, so that another block behind it
makes all text plain.
"""

from __future__ import annotations

import re
from typing import Any

from claude_proxy.cli.versions import Capabilities

__all__ = ["fits_stdin", "literal", "may_be_command"]

_MENTION = re.compile(r"(^|[\s\ufeff])@")
_ZERO_WIDTH_SPACE = "\u200b"


def fits_stdin(blocks: list[dict[str, Any]], can: Capabilities) -> bool:
    """
    Whether this CLI takes such a message on its stdin.

    One that does not has it as the last message of a transcript.  A CLI that takes one text only
    sends what it is told then in the same message as the end of the transcript.
    """
    return can.blocks or all(block["type"] == "text" for block in blocks)


def literal(blocks: list[dict[str, Any]], can: Capabilities) -> str | list[dict[str, Any]]:
    """
    Make the content of a user message from which the CLI reads no file and runs no command.

    The newest CLIs leave text of nothing but whitespace out of what the model sees.  Older ones
    do not, and the API refuses such text, so the model sees a dot there.  The oldest take a single
    text: nothing can stand behind it, so invisible characters keep the CLI from it.

    @param blocks: content blocks in the Messages API's form, such that L{fits_stdin}.
    """
    if can.blocks:
        return [*blocks, {"type": "text", "text": "\n" if can.drops_blank_text else "."}]
    text = "\n\n".join(block["text"] for block in blocks)
    guarded = _MENTION.sub(rf"\1{_ZERO_WIDTH_SPACE}@", text)
    return f"\n{guarded}" if guarded.startswith("/") else guarded


def may_be_command(blocks: list[dict[str, Any]]) -> bool:
    """Whether the CLI may take a message for a command, which it runs without its model."""
    return bool(blocks) and str(blocks[-1].get("text", "")).lstrip().startswith("/")

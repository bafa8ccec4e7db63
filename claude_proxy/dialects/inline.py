"""
Activity inside the answer's text, for clients that show nothing else.

At the top stand the session's id and the parameters, as the top of a next message would set them;
thinking and tool activity stand between C{<thinking>} tags, wherever they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from claude_proxy.dialects.answer import REASONING, TEXT, Piece

__all__ = ["InlineActivity"]

_BLANK_LINE = "\n\n"


class InlineActivity:
    """
    Makes one text of a turn's pieces.

    @ivar session_id: the session's id, once it is known.
    @ivar shown: parameters to show, in this order; those that are None are left out.
    """

    def __init__(self) -> None:
        self.session_id: str | None = None
        self.shown: Mapping[str, object] = {}
        self._begun = False
        self._is_inside = False
        self._has_text = False

    def place(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Put all pieces into the text."""
        parts: list[str] = []
        for kind, text in pieces:
            if not self._begun:
                parts.append(self._begin())
            if kind is REASONING:
                parts.append(self._into(text))
            else:
                parts.append(self._out_to(text))
        return [Piece(TEXT, "".join(parts))] if parts else []

    def end(self) -> list[Piece]:
        """Close what is open."""
        parts = [] if self._begun else [self._begin()]
        if self._is_inside:
            self._is_inside = False
            parts.append(f"\n</thinking>{_BLANK_LINE}")
        text = "".join(parts)
        return [Piece(TEXT, text)] if text else []

    def _begin(self) -> str:
        self._begun = True
        lines = [
            f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n"
            for name, value in {"session-id": self.session_id, **self.shown}.items()
            if value is not None
        ]
        return "".join(lines) + "\n" if lines else ""

    def _into(self, text: str) -> str:
        if self._is_inside:
            return text
        self._is_inside = True
        before = _BLANK_LINE if self._has_text else ""
        return f"{before}<thinking>\n{text.lstrip()}"

    def _out_to(self, text: str) -> str:
        self._has_text = True
        if not self._is_inside:
            return text
        self._is_inside = False
        after = "" if text.startswith(_BLANK_LINE) else _BLANK_LINE
        return f"\n</thinking>{after}{text}"

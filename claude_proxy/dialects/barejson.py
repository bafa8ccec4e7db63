"""The JSON of a turn whose answer is to be JSON and nothing else."""

from __future__ import annotations

import json
import re
from typing import Literal

import msgspec

from claude_proxy.errors import Failure, ProxyError

__all__ = ["LONGEST", "BareJson", "JsonFinder"]

LONGEST = 64 << 20
"""Characters of text that are kept until they can be read as JSON."""

BareJson = Literal["object", "schema"]
"""``schema``: what the CLI has checked against a schema; ``object``: any JSON object."""

_FENCED = re.compile(r"\s*```[A-Za-z]*[ \t]*\n(?P<inside>.*?)\s*```\s*", re.DOTALL)


class JsonFinder:
    """Finds the JSON: the CLI's structured output or, for an object, the model's last words."""

    def __init__(self, kind: BareJson) -> None:
        self._kind = kind
        self._parts: list[str] = []
        self._length = 0

    def keep(self, text: str, *, apart: bool) -> None:
        """
        Keep text of the model.

        @param apart: it is not of the same statement as the text before.
        @raise ProxyError: UPSTREAM_ERROR, if it becomes too long.
        """
        if self._kind == "schema":
            return
        if apart:
            self._parts.clear()
            self._length = 0
        self._parts.append(text)
        self._length += len(text)
        if self._length > LONGEST:
            message = (
                f"The answer is longer than the {LONGEST:,} characters up to which the server can "
                "check that it is JSON. Ask for a shorter one, or without response_format."
            )
            raise ProxyError(Failure.UPSTREAM_ERROR, message)

    def find(self, structured: object) -> str | None:
        """
        The JSON, or None if there is none.

        @param structured: the CLI's structured output, or None.
        """
        if self._kind == "schema" or structured is not None:
            fits = structured is not None and (
                self._kind == "schema" or isinstance(structured, dict)
            )
            return _compact(structured) if fits else None
        text = "".join(self._parts)
        fenced = _FENCED.fullmatch(text)
        text = (fenced["inside"] if fenced else text).strip()
        try:
            decoded = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return None
        return text if isinstance(decoded, dict) else None

    def missing(self) -> ProxyError:
        """What to say if there is none."""
        what = "value that fits the schema" if self._kind == "schema" else "object"
        message = (
            f"The model did not answer with a JSON {what}, as response_format asks. Ask again, or "
            "say in the prompt what the JSON is to hold."
        )
        return ProxyError(Failure.UPSTREAM_ERROR, message)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

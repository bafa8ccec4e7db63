"""
The API keys: where they may stand, and how each is named.

A mistake in them is told by its place, never by what stands there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from claude_proxy.settings.reader import Paths, Reader
from claude_proxy.settings.table import KEY_VARIABLES

__all__ = ["ApiKey", "read_keys"]

_MAX_KEY_FILE = 1024 * 1024
_SECRET = re.compile(r"[!-~]+")
_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that clients may send, and the name of the tenant that it stands for."""

    name: str
    secret: str = field(repr=False)


def read_keys(reader: Reader, paths: Paths) -> tuple[ApiKey, ...]:
    """All keys of all sources; what is wrong with them is left with the reader."""
    names: dict[str, str | None] = {}
    for variable in KEY_VARIABLES:
        if not reader.text(variable):
            continue
        before = len(reader.mistakes)
        found = _keys_of(reader, paths, variable)
        if not found and len(reader.mistakes) == before:
            reader.mistakes.append(f"{variable} is set but holds no key. Give one, or unset it.")
        for secret, name in found:
            # The same key in two places is one key, and a name that was given to it stays.
            names[secret] = names.get(secret) or name
    return tuple(
        ApiKey(name or f"key-{hashlib.sha256(secret.encode()).hexdigest()[:12]}", secret)
        for secret, name in names.items()
    )


def _keys_of(reader: Reader, paths: Paths, variable: str) -> list[tuple[str, str | None]]:
    """The keys of one variable, each with its name if it has one."""
    text = reader.text(variable)
    if variable == "API_KEY":
        return _checked_keys(reader, [(variable, text)], named=False)
    if variable == "API_KEYS":
        parts = [(f"{variable}, key {n}", part) for n, part in enumerate(text.split(","), 1)]
        return _checked_keys(reader, parts, named=False)
    try:
        lines = _key_lines(paths.absolute(text))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        reader.refuse(variable, f"the path of a key file (this one cannot be read: {cause})")
        return []
    return _checked_keys(reader, [(f"{variable}, line {n}", s) for n, s in lines], named=True)


def _checked_keys(
    reader: Reader, entries: Sequence[tuple[str, str]], *, named: bool
) -> list[tuple[str, str | None]]:
    """Check entries, each given with its place: a mistake shows the place, never the key."""
    found: list[tuple[str, str | None]] = []
    for place, entry in entries:
        has_name = named and ":" in entry
        name, secret = entry.split(":", 1) if has_name else ("", entry)
        name, secret = name.strip(), secret.strip()
        if has_name and not _KEY_NAME.fullmatch(name):
            reader.mistakes.append(
                f"{place}: the name before the colon is not accepted. Accepted: 1 to 64 of "
                "letters, digits, '_', '.', '-'."
            )
        elif _SECRET.fullmatch(secret):
            found.append((secret, name or None))
        elif entry.strip():
            reader.mistakes.append(
                f"{place}: the key is not accepted. Accepted: printable ASCII without spaces."
            )
    return found


def _key_lines(path: Path) -> list[tuple[int, str]]:
    with path.open("rb") as file:
        content = file.read(_MAX_KEY_FILE + 1)
    if len(content) > _MAX_KEY_FILE:
        raise ValueError("it is larger than 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Raised anew, without the bytes that the original would show.
        raise ValueError("it is not UTF-8 text") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]

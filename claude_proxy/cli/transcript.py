"""
What was said before, told to the CLI: as a transcript in its own format, or as one message.

The CLI keeps a session in a file of JSON lines and reads it when it resumes.  A file written here
is resumed like its own: each message reaches the model once, in order, in its real role, with its
images and documents, and nothing in it is taken for a command or a file to read.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["as_context", "config_directory", "transcript_lines", "transcript_path"]

Messages = Sequence[tuple[str, list[dict[str, Any]]]]

_IMAGE_LIMIT = 5 * 1024 * 1024
"""The most base64 that the API takes for one image; the CLI shrinks new images, not old ones."""

_NOT_SHOWN = "[An image that was too large to be shown again.]"
_NO_USAGE = {
    "input_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 0,
}
_MILLISECOND = 0.001

_encode_lines = msgspec.json.Encoder().encode_lines


def transcript_lines(
    messages: Messages,
    *,
    session_id: str,
    cwd: str,
    version: str,
    now: float,
    make_uuid: Callable[[], str],
) -> bytes:
    """
    Write earlier messages down as the CLI would have.

    Text of nothing but whitespace is left out, since the API refuses it, and a message of nothing
    else with it.  An image that is too large to be sent again is told as a line of text.

    @param messages: roles (``user``, ``assistant``) and content blocks in the Messages API's form,
        oldest first.  The last one should be the assistant's: after a user message newer CLIs put
        a "No response requested." of their own.
    @param session_id: the id by which the CLI resumes it, and the name of the file.
    @param cwd: the directory that the session belongs to.
    @param version: the CLI's version.
    @param now: when the last message was said, in seconds since the epoch.
    @param make_uuid: makes a fresh UUID.
    @return: the whole file; empty if there is nothing to tell.
    """
    told = _told(messages)
    lines: list[dict[str, Any]] = []
    parent: str | None = None
    for index, (role, blocks) in enumerate(told):
        uuid = make_uuid()
        # The times must differ: the oldest CLI orders the messages by them.
        said = now - (len(told) - 1 - index) * _MILLISECOND
        lines.append(
            {
                "parentUuid": parent,
                "isSidechain": False,
                "userType": "external",
                "cwd": cwd,
                "sessionId": session_id,
                "version": version,
                "gitBranch": "",
                "type": role,
                "message": _message(role, blocks, uuid),
                "uuid": uuid,
                "timestamp": _timestamp(said),
            }
        )
        parent = uuid
    return _encode_lines(lines)


def _message(role: str, blocks: list[dict[str, Any]], uuid: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": blocks}
    if role == "assistant":
        # Without these the CLI hangs.  The model is the CLI's own word for text that no model of
        # this session made; it does not choose the model that answers next.
        message |= {
            "id": f"msg_{uuid.replace('-', '')}",
            "type": "message",
            "model": "<synthetic>",
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": _NO_USAGE,
        }
    return message


def _timestamp(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _told(messages: Messages) -> list[tuple[str, list[dict[str, Any]]]]:
    told = ((role, [_shown(block) for block in blocks]) for role, blocks in messages)
    filled = ((role, [b for b in blocks if not _is_blank(b)]) for role, blocks in told)
    return [(role, blocks) for role, blocks in filled if blocks]


def _is_blank(block: Mapping[str, Any]) -> bool:
    return block["type"] == "text" and not block["text"].strip()


def _shown(block: dict[str, Any]) -> dict[str, Any]:
    data = block["source"].get("data", "") if block["type"] == "image" else ""
    return {"type": "text", "text": _NOT_SHOWN} if len(data) > _IMAGE_LIMIT else block


def config_directory(environment: Mapping[str, str]) -> Path:
    """
    Find where a CLI with this environment keeps its sessions.

    @return: absolute, unless the environment names a relative one: that counts from the CLI's
        working directory.
    """
    named = environment.get("CLAUDE_CONFIG_DIR")
    if named is not None:
        return Path(named)
    home = environment.get("HOME")
    return Path(pwd.getpwuid(os.getuid()).pw_dir if home is None else home, ".claude")


def transcript_path(
    config_directory: Path, cwd: str | Path, session_id: str, *, limit: int = 200
) -> Path:
    """
    Find the file that the CLI reads to resume a session.

    @param config_directory: see the function of that name.
    @param cwd: the directory that the CLI works in; symbolic links are followed, as it does.
    @param limit: `folder_limit` of the CLI's capabilities.
    """
    directory = os.path.realpath(cwd)
    folder = _folder(directory, limit)
    return Path(directory, config_directory, "projects", folder, f"{session_id}.jsonl")


def _folder(directory: str, limit: int) -> str:
    """Name a directory's folder of sessions: what is no letter or digit becomes a dash."""
    # Characters outside the basic plane are two for the CLI, which counts in UTF-16.
    wide = re.sub(r"[\U00010000-\U0010ffff]", "--", directory)
    name = re.sub(r"[^a-zA-Z0-9]", "-", wide)
    return name if len(name) <= limit else f"{name[:limit]}-{_hash(directory)}"


def _hash(text: str) -> str:
    """Hash as the CLI does: 31 * hash + unit in 32 bits, its absolute value in base 36."""
    units = text.encode("utf-16-le", "surrogatepass")
    value = 0
    for low, high in zip(units[::2], units[1::2], strict=True):
        value = (31 * value + low + 256 * high) & 0xFFFFFFFF
    value = min(value, 2**32 - value)
    digits = ""
    while value:
        value, digit = divmod(value, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def as_context(messages: Messages) -> list[dict[str, Any]]:
    """
    Tell earlier messages at the head of a user message, for a CLI that takes no transcript.

    @param messages: as for L{transcript_lines}.
    @return: content blocks that the new message's own blocks are put after; text is in as few of
        them as the images between allow.  Empty if there is nothing to tell.
    """
    told = _told(messages)
    if not told:
        return []
    tag = _free_tag(told)
    blocks: list[dict[str, Any]] = []
    text = (
        "What was said before in this conversation, oldest first, each message between "
        f"<{tag}> and </{tag}>. Go on from there: the new message stands below.\n"
    )
    for block in _framed(told, tag):
        if block["type"] == "text":
            text += block["text"]
        else:
            blocks += [{"type": "text", "text": text}, block]
            text = ""
    return [*blocks, {"type": "text", "text": f"{text}\nThe new message:"}]


def _framed(told: Messages, tag: str) -> Iterator[dict[str, Any]]:
    for role, blocks in told:
        yield {"type": "text", "text": f'\n<{tag} role="{role}">\n'}
        for block in blocks:
            if block["type"] == "text":
                yield {"type": "text", "text": f"{block['text']}\n"}
            else:
                yield block
        yield {"type": "text", "text": f"</{tag}>\n"}


def _free_tag(told: Messages) -> str:
    """Find a tag that no message contains, so that none can pretend to be several."""
    text = "\n".join(b["text"] for _, blocks in told for b in blocks if b["type"] == "text")
    tag = "message"
    while f"<{tag}" in text or f"</{tag}" in text:
        tag += "_"
    return tag

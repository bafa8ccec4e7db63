"""
The content of a chat's message, as blocks of the Messages API.

Taken: text, images (``data:`` or ``https:`` URLs) and PDF files with their data, in the shapes of
chat completions and in those of the Responses API (``input_text``, ``output_text``,
``input_image``, ``input_file``), which some clients mix in.  A model's refusal is text that it
said.  Its reasoning, which some clients send back, is left out, and so is blank text.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from claude_proxy.dialects.fields import refusal
from claude_proxy.errors import ProxyError

__all__ = ["MAX_IMAGE_BYTES", "MAX_PDF_BYTES", "REASONING_PARTS", "TEXT_PARTS", "to_blocks"]

MAX_IMAGE_BYTES = 5 * 1024 * 1024  # decoded; what the Messages API takes
MAX_PDF_BYTES = 32 * 1024 * 1024  # decoded; what the Messages API takes as one whole request

# The field of each part of text that holds the text.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
REASONING_PARTS = frozenset({"reasoning", "thinking", "think", "redacted_thinking"})

_MAX_URL = 8192
_SHOWN = 60
_DATA_URL = re.compile(r"data:([^;,\s]*+)((?:;[^;,\s]*+)*+),", re.IGNORECASE)
_NOT_IN_URL = re.compile(r"[\x00-\x20\x7f]")

_IMAGES: dict[str, Callable[[bytes], bool]] = {
    "image/png": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": lambda data: data.startswith(b"\xff\xd8\xff"),
    "image/gif": lambda data: data.startswith((b"GIF87a", b"GIF89a")),
    "image/webp": lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP",
}
_PDF = "application/pdf"
_ALIASES = {"image/jpg": "image/jpeg", "application/x-pdf": _PDF}
_PDF_MARK_WITHIN = 1024  # readers of PDF look for its mark this far


def to_blocks(content: object, where: str) -> list[dict[str, Any]]:
    """
    Put a message's content into blocks: in order, none for what is empty, null or blank.

    @param content: a string, a list of parts, or None.
    @param where: the path of the content in the request, such as ``messages[3].content``.
    @raise ProxyError: INVALID_VALUE with the path of what is not acceptable.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return _text_block(content)
    if not isinstance(content, list):
        raise refusal(where, "must be a string or a list of parts")
    blocks: list[dict[str, Any]] = []
    for position, part in enumerate(content):
        blocks += _part(part, f"{where}[{position}]")
    return blocks


def _part(part: object, at: str) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        raise refusal(at, 'must be an object, such as {"type": "text", "text": "..."}')
    kind = part.get("type")
    if not isinstance(kind, str):
        raise refusal(f"{at}.type", "must be a string, such as 'text'")
    if kind in TEXT_PARTS:
        return _text_block(_string(part, TEXT_PARTS[kind], at))
    if kind in REASONING_PARTS:
        return []
    if kind in ("image_url", "input_image"):
        return [_image(_image_url(part, at), f"{at}.image_url")]
    if kind == "file":
        return [_file(part.get("file"), f"{at}.file")]
    if kind == "input_file":
        return [_file(part, at)]
    raise _unknown(kind, at)


def _unknown(kind: str, at: str) -> ProxyError:
    if kind in ("input_audio", "audio"):
        return refusal(f"{at}.type", "is audio, which the agent cannot hear: send it as text")
    shown = kind[:_SHOWN]
    return refusal(
        f"{at}.type", f"is '{shown}', which is not known. Use 'text', 'image_url' or 'file'"
    )


def _text_block(text: str) -> list[dict[str, Any]]:
    # The model's provider refuses text that is blank.
    return [{"type": "text", "text": text}] if text and not text.isspace() else []


def _image_url(part: Mapping[str, object], at: str) -> str:
    """The URL of an image: ``{"url": ..., "detail": ...}``, or the bare string of other clients."""
    given = part.get("image_url")
    if isinstance(given, dict):
        return _string(given, "url", f"{at}.image_url")
    if given is None and part.get("file_id") is not None:
        raise refusal(f"{at}.file_id", "names a file, but this server stores none: send its data")
    return _string(part, "image_url", at)


def _image(url: str, at: str) -> dict[str, Any]:
    found = _DATA_URL.match(url)
    if found is None:
        _check_https(url, at)
        return {"type": "image", "source": {"type": "url", "url": url}}
    media_type = _media_type(found, at)
    if media_type not in _IMAGES:
        what = media_type[:_SHOWN]
        raise refusal(at, f"is of the media type '{what}'. Use one of {', '.join(_IMAGES)}")
    data, decoded = _base64(url, found.end(), MAX_IMAGE_BYTES, at)
    if not _IMAGES[media_type](decoded):
        actual = [name for name, is_one in _IMAGES.items() if is_one(decoded)]
        what = f"is {actual[0]}" if actual else f"is not {media_type}"
        raise refusal(
            at, f"says '{media_type}', but its data {what}: give the media type of the data"
        )
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": media_type, "data": data},
    }


def _check_https(url: str, at: str) -> None:
    try:
        parts = urlsplit(url)
        is_https = parts.scheme == "https" and bool(parts.hostname)
    except ValueError:
        is_https = False
    if not is_https or len(url) > _MAX_URL or _NOT_IN_URL.search(url):
        raise refusal(
            at,
            f"must be an https: URL of at most {_MAX_URL} characters, or a data: URL like "
            "'data:image/png;base64,...'",
        )


def _file(given: object, at: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise refusal(at, 'must be an object, such as {"filename": "a.pdf", "file_data": "..."}')
    for name in ("file_id", "file_url"):
        if given.get(name) is not None and given.get("file_data") is None:
            raise refusal(f"{at}.{name}", "is no data: send the file itself in 'file_data'")
    text = _string(given, "file_data", at)
    at = f"{at}.file_data"
    found = _DATA_URL.match(text)
    filename = given.get("filename")
    if found is not None:
        is_pdf = _media_type(found, at) == _PDF
        start = found.end()
    else:
        is_pdf = isinstance(filename, str) and filename.lower().endswith(".pdf")
        start = 0
    if not is_pdf:
        raise refusal(
            at,
            "must be a PDF, as 'data:application/pdf;base64,...', or as plain base64 beside a "
            "'filename' that ends in .pdf. Other files go into a workspace, or into the text",
        )
    data, decoded = _base64(text, start, MAX_PDF_BYTES, at)
    if b"%PDF-" not in decoded[:_PDF_MARK_WITHIN]:
        raise refusal(at, "does not hold a PDF")
    return {"type": "document", "source": {"type": "base64", "media_type": _PDF, "data": data}}


def _media_type(found: re.Match[str], at: str) -> str:
    if not found[2].lower().endswith(";base64"):
        raise refusal(at, "must carry its data as base64: 'data:TYPE;base64,...'")
    media_type = found[1].lower()
    return _ALIASES.get(media_type, media_type)


def _base64(text: str, start: int, limit: int, at: str) -> tuple[str, bytes]:
    """The base64 that begins here, and what it stands for."""
    if (len(text) - start) * 3 // 4 > limit + 2:  # padding stands for up to two bytes
        raise _too_large(limit, at)
    data = text[start:]
    try:
        decoded = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError):
        what = "is not valid base64: use the standard alphabet, padding, and no line breaks"
        raise refusal(at, what) from None
    if not decoded:
        raise refusal(at, "is empty")
    if len(decoded) > limit:
        raise _too_large(limit, at)
    return data, decoded


def _too_large(limit: int, at: str) -> ProxyError:
    return refusal(at, f"is too large: at most {limit // (1024 * 1024)} MiB, before base64")


def _string(given: Mapping[str, object], name: str, at: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise refusal(f"{at}.{name}", "is required, and must be a string")
    return value

"""
Parameters in the text: the block at the top of a message of a chat.

::

    workspace=project allowed-tools=["Bash(git *)", "Edit"]
    dangerously-skip-permissions=true

    The prompt begins here.

The block is read from the first word on: known names, each with ``=`` and its value directly after
it, parted by blanks or line ends, in any order.  The first word that is none of them ends it, and
from there on everything is the prompt, byte for byte (blank lines in between are dropped).  So
``x=1`` at the top is prompt, and a ``workspace=`` further down is too.  There is no parameter for
the prompt itself.

Values: strings and booleans as one word or in double quotes; lists as JSON arrays of strings, over
several lines if need be.  The loose lists that people write by hand are taken as well: items in
single quotes, which know no escapes, or with no quotes at all, such as ``[Bash(git *), Edit]``.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

import msgspec

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.workspaces import check_name

__all__ = ["TextParameters", "parse_parameters", "shown_session", "without_shown_block"]


class TextParameters(msgspec.Struct, frozen=True):
    """
    What the text of a message says.

    @ivar fields: the parameters under their hyphenated names, as JSON would have given them.
    @ivar prompt: everything below the block; the whole text where there is no block.
    """

    fields: dict[str, object]
    prompt: str

    def __repr__(self) -> str:
        # The prompt is what somebody wrote: it stays out of logs and tracebacks.
        return f"<TextParameters {', '.join(self.fields)}>"


_SAFE = ("workspace", "session-id")
_LISTS = ("allowed-tools", "disallowed-tools", "mcp-allowed-tools")
_NAMES = (*_SAFE, *_LISTS, "dangerously-skip-permissions")

_MAX_ITEMS = 256  # as in the other forms of a request

_FORMS = {
    "workspace": "workspace=project-name",
    "session-id": "session-id=01234567-89ab-4cde-8f01-23456789abcd",
    "allowed-tools": 'allowed-tools=["Bash(git *)", "Edit"]',
    "disallowed-tools": 'disallowed-tools=["WebFetch"]',
    "mcp-allowed-tools": 'mcp-allowed-tools=["mcp__github__get_repo"]',
    "dangerously-skip-permissions": "dangerously-skip-permissions=true",
}

# Possessive quantifiers: no text, whatever it repeats, is read more than once.
_SPACE = re.compile(r"\s*+")
_NAME = re.compile(rf"({'|'.join(_NAMES)})=")
_WORD = re.compile(r'"([^"\r\n]*+)"(?!\S)|([^\s"]++)(?!\S)')
_ITEM = re.compile(
    r"""
    (?P<json> "(?: [^"\\]++ | \\. )*+" )
    | '(?P<single> [^'\r\n]++ )'
    | (?P<bare> [^\s"'\[\](),]++ (?: \( [^()\r\n]*+ \) )?+ )
    """,
    re.VERBOSE | re.DOTALL,
)
_END = re.compile(r"(?!\S)")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BOOLEANS = {"true": True, "false": False}


def parse_parameters(text: str, allowed: str) -> TextParameters:
    """
    Take the block from the top of a message.  The time is linear in the length of the text.

    @param allowed: which parameters a text may set: ``all``; ``safe``, the workspace and the
        session; ``none``, and then nothing is read and all of the text is the prompt.
    @raise ProxyError: INVALID_VALUE, with the parameter's name: its value is malformed, it is given
        twice, or this server does not allow it in a text.  (To drop it in silence could widen
        permissions: ``disallowed-tools`` is one of them.)
    """
    fields: dict[str, object] = {}
    if allowed == "none":
        return TextParameters(fields, text)
    position = _skip(_SPACE, text, 0)
    end = 0
    while (found := _NAME.match(text, position)) is not None:
        name = found[1]
        if allowed != "all" and name not in _SAFE:
            raise _forbidden(name)
        if name in fields:
            message = f"The parameter '{name}' is given twice. Write it once."
            raise ProxyError(Failure.INVALID_VALUE, message, param=name)
        fields[name], end = _value(text, found.end(), name)
        position = _skip(_SPACE, text, end)
    return TextParameters(fields, text[_prompt_start(text, end, position) :] if fields else text)


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found is not None else position


def _prompt_start(text: str, end: int, word: int) -> int:
    """
    The start of the prompt: its first word, or, on a line of its own, the line's first blank.

    The indent of a first line belongs to the prompt: it may be a piece of code.
    """
    line = max(text.rfind("\n", end, word), text.rfind("\r", end, word)) + 1
    return line if line > end and word < len(text) else word


class _Value(NamedTuple):
    value: object
    end: int


def _value(text: str, start: int, name: str) -> _Value:
    """Read the value that begins here; at its end the text ends, or a blank stands."""
    if name in _LISTS:
        return _list(text, start, name)
    found = _WORD.match(text, start)
    if found is None:
        _malformed(name)
    word = found[1] if found[1] is not None else found[2]
    if name == "workspace":
        check_name(word)
    elif name == "session-id":
        if _UUID.fullmatch(word) is None:
            _malformed(name)
    else:
        value = _BOOLEANS.get(word.lower())
        if value is None:
            _malformed(name)
        return _Value(value, found.end())
    return _Value(word, found.end())


def _list(text: str, start: int, name: str) -> _Value:
    if not text.startswith("[", start):
        _malformed(name)
    items: list[str] = []
    position = _skip(_SPACE, text, start + 1)
    if not text.startswith("]", position):
        while True:
            found = _ITEM.match(text, position)
            if found is None:
                _malformed(name)
            items.append(_item(found, name))
            if len(items) > _MAX_ITEMS:
                message = f"The parameter '{name}' has too many items: at most {_MAX_ITEMS}."
                raise ProxyError(Failure.INVALID_VALUE, message, param=name)
            position = _skip(_SPACE, text, found.end())
            if not text.startswith(",", position):
                break
            position = _skip(_SPACE, text, position + 1)
    if not text.startswith("]", position) or _END.match(text, position + 1) is None:
        _malformed(name)
    return _Value(items, position + 1)


def _item(found: re.Match[str], name: str) -> str:
    if found["json"] is None:
        return str(found["single"] or found["bare"])
    try:
        return msgspec.json.decode(found["json"].encode(), type=str)
    except (msgspec.DecodeError, UnicodeError):
        _malformed(name)


def _malformed(name: str) -> NoReturn:
    message = (
        f"The value of the parameter '{name}' at the top of the message cannot be read. "
        f"Write it like this, with a blank or a new line after it: {_FORMS[name]}"
    )
    raise ProxyError(Failure.INVALID_VALUE, message, param=name)


def _forbidden(name: str) -> ProxyError:
    message = (
        f"This server does not let the text of a message set '{name}': its setting "
        f"CHAT_TEXT_PARAMETERS allows {' and '.join(_SAFE)} only. Send it in the 'claude' object "
        "of the request, or leave it out."
    )
    return ProxyError(Failure.INVALID_VALUE, message, param=name)


# The block that a server put above an answer.  It wrote each line itself, so that nothing there
# needs to be understood but the session's id; it ends with the first line of another kind.
_MAX_SHOWN_LINES = 32
_SHOWN_LINE = re.compile(r"[^\S\r\n]*+[a-z]++(?:-[a-z]++)*+=[^\r\n]*+(?:\r\n?|\n|\Z)")
_SHOWN_SESSION = re.compile(rf'\s*+session-id="?({_UUID.pattern})"?(?!\S)')


def shown_session(text: str) -> str | None:
    """
    The session id that an old answer shows in its parameter block, in lower case; None without one.

    Nothing else is read from there: an answer is the model's, and gives no permissions.
    """
    return _shown_block(text, 0)[0]


def without_shown_block(text: str) -> str:
    """An answer's text without the blocks at its top that show a session id."""
    end = 0
    while True:
        session, block_end = _shown_block(text, end)
        if session is None:
            return text[end:]
        end = block_end


def _shown_block(text: str, start: int) -> tuple[str | None, int]:
    """The session id in the block that begins here, or None, and the end of that block."""
    session = None
    position = _skip(_SPACE, text, start)
    for _ in range(_MAX_SHOWN_LINES):
        line = _SHOWN_LINE.match(text, position)
        if line is None:
            break
        shown = _SHOWN_SESSION.match(text, position)
        if session is None and shown is not None:
            session = shown[1].lower()
        position = line.end()
    return session, position

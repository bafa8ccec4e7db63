"""
What clients may call a model, and what that means for the CLI.

OpenAI's clients name a model in every request and look names up in a list; the CLI has names of its
own and a default.  In between stand the administrator's aliases.  A name is taken as it is: no
provider's prefix is cut off and capitals matter, so that what the list shows is what is accepted;
for anything else there are aliases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypedDict

import msgspec

from claude_proxy.errors import Failure, ProxyError

__all__ = [
    "DEFAULT_MODEL",
    "Aliases",
    "Model",
    "ModelList",
    "model_entry",
    "models_list",
    "needs_known",
    "resolve",
]

DEFAULT_MODEL = "claude-code"
"""The name of whatever model the CLI uses by itself."""

Aliases = Sequence[tuple[str, str]]
"""Names and the models that they mean, which are no aliases themselves; ``*`` is every name."""

_ANY = "*"
_OWNER = "anthropic"
_CLAUDE = re.compile(r"claude-[A-Za-z0-9._:/@\[\]-]{1,249}")
"""What the CLI is given without being asked whether it knows it."""

_SHOWN = 80

_encode = msgspec.json.Encoder().encode


class Model(TypedDict):
    """A model, in OpenAI's shape."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All models that are named here; every name that begins with `claude-` exists, too."""

    object: Literal["list"]
    data: list[Model]


def needs_known(name: str, aliases: Aliases) -> bool:
    """Whether only the CLI's own list of models tells what this name means."""
    return name != DEFAULT_MODEL and name not in dict(aliases) and not _CLAUDE.fullmatch(name)


def resolve(name: str, aliases: Aliases, known: Sequence[str]) -> str | None:
    """
    Find the model that a client means.

    @param name: as the client gave it.
    @param known: the names that the CLI gives; may be empty unless `needs_known`.
    @return: what to give the CLI; None is its default.
    @raise ProxyError: MODEL_NOT_FOUND; lists the names that there are.
    """
    meant = dict(aliases)
    if name == DEFAULT_MODEL:
        return None
    if name != _ANY and name in meant:
        model = meant[name]
    elif name in known or _CLAUDE.fullmatch(name):
        model = name
    elif _ANY in meant:
        model = meant[_ANY]
    else:
        raise _not_found(name, aliases, known)
    return None if model == DEFAULT_MODEL else model


def models_list(aliases: Aliases, known: Sequence[str], created: int) -> bytes:
    """
    The body of OpenAI's list of models.

    @param created: when each of them came to be, in seconds since 1970.
    """
    entries = [_entry(name, created) for name in _names(aliases, known)]
    listed: ModelList = {"object": "list", "data": entries}
    return _encode(listed)


def model_entry(name: str, aliases: Aliases, known: Sequence[str], created: int) -> bytes:
    """
    The body about one model: there is one for every name that a request may carry.

    @raise ProxyError: MODEL_NOT_FOUND, as from `resolve`.
    """
    resolve(name, aliases, known)
    return _encode(_entry(name, created))


def _entry(name: str, created: int) -> Model:
    return {"id": name, "object": "model", "created": created, "owned_by": _OWNER}


def _names(aliases: Aliases, known: Sequence[str]) -> list[str]:
    named = [DEFAULT_MODEL, *(name for name, _ in aliases if name != _ANY), *known]
    return list(dict.fromkeys(named))


def _not_found(name: str, aliases: Aliases, known: Sequence[str]) -> ProxyError:
    shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
    message = (
        f"The model '{shown}' does not exist here. There are: "
        f"{', '.join(_names(aliases, known))}, and every name that begins with 'claude-'. "
        "The server's administrator can add names with MODEL_ALIASES."
    )
    return ProxyError(Failure.MODEL_NOT_FOUND, message, param="model")

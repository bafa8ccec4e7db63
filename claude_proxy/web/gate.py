"""Who and what may come in: decided by a request's head, before any of its body is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.web.auth import Authenticator, Origins, presented_key

__all__ = ["Gate", "canonical_path", "is_preflight"]

_SLASHES = re.compile("//+")


@dataclass(frozen=True, slots=True)
class Gate:
    """
    Decides by a request's head whether it may come in.

    @ivar public: paths that need no key.
    @ivar json_paths: paths that take a JSON body by POST.
    @ivar max_body: largest body, in bytes.
    """

    authenticator: Authenticator
    origins: Origins
    public: frozenset[str]
    json_paths: frozenset[str]
    max_body: int

    def admit(self, method: str, path: str, head: Callable[[str], str | None]) -> str | None:
        """
        Let a request in.

        @param head: gives a header's value by its name.
        @return: the tenant; None for what needs none.
        @raise ProxyError: it may not come in.
        """
        self.origins.check(head("host"), head("origin"), head("sec-fetch-site"))
        if path in self.public or is_preflight(method, head):
            return None
        return self.authenticator.tenant(presented_key(head("authorization"), head("x-api-key")))

    def check_body(self, method: str, path: str, content_type: str | None, length: int) -> None:
        """
        Look at what the head says of the body.

        @param length: of the body as far as it is known, in bytes.
        @raise ProxyError: REQUEST_TOO_LARGE or UNSUPPORTED_MEDIA_TYPE.
        """
        if length > self.max_body:
            raise self.too_large()
        if method == "POST" and path in self.json_paths:
            media_type = (content_type or "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise ProxyError(Failure.UNSUPPORTED_MEDIA_TYPE)

    def too_large(self) -> ProxyError:
        """The error for a body over the limit."""
        message = (
            f"The request body is larger than the {self.max_body} bytes that this server takes."
        )
        return ProxyError(Failure.REQUEST_TOO_LARGE, message)


def is_preflight(method: str, head: Callable[[str], str | None]) -> bool:
    """Whether a browser asks by this request if another one is allowed (CORS)."""
    return method == "OPTIONS" and head("access-control-request-method") is not None


@lru_cache(maxsize=64)
def canonical_path(path: bytes) -> str | None:
    """
    The path in the one spelling that counts for gate and router; None if it is no text.

    What the gate protects must not be found by the router under another name.
    """
    try:
        return _SLASHES.sub("/", "/" + unquote_to_bytes(path).decode())
    except UnicodeDecodeError:
        return None

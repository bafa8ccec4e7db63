"""
Who may come in: keys, web origins, host names.  Pure.

Without keys the server is open to whoever can reach it, so a web page must not be able to: a page
that a name server points at this machine (DNS rebinding) is known by its Host, any other page by
its Origin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hmac import compare_digest

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.settings import ApiKey

__all__ = ["ANONYMOUS", "Authenticator", "Origins", "presented_key"]

ANONYMOUS = "anonymous"
"""The tenant of every request while no key is configured."""

_OTHER_SITES = frozenset({"cross-site", "same-site"})
"""What browsers say of a request that a page of another origin has made."""


def presented_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """
    The key that a request shows: ``Authorization: Bearer KEY`` (any case), else ``x-api-key``.
    """
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return x_api_key.strip() if x_api_key is not None else None


class Authenticator:
    """Tells tenants by their keys."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(key.secret.encode(), key.name) for key in keys]

    @property
    def required(self) -> bool:
        """Whether any key is configured."""
        return bool(self._keys)

    def tenant(self, key: str | None) -> str:
        """
        Whose key this is.  Every configured key is compared, each in constant time.

        @raise ProxyError: INVALID_API_KEY.
        """
        if not self._keys:
            return ANONYMOUS
        shown = (key or "").encode("utf-8", "surrogateescape")
        found = None
        for secret, name in self._keys:
            if compare_digest(secret, shown):
                found = name
        if found is None:
            if key:
                raise ProxyError(Failure.INVALID_API_KEY)
            message = (
                "Incorrect API key provided. No key was sent: send one of this server's keys as "
                "'Authorization: Bearer KEY'."
            )
            raise ProxyError(Failure.INVALID_API_KEY, message)
        return found


@dataclass(frozen=True, slots=True)
class Origins:
    """
    Which web pages and host names are answered.

    @ivar allowed: origins that browsers may call from; ``*`` stands for all.
    @ivar hosts: host names accepted besides IP literals and localhost.
    @ivar open: no key is configured, so Host and Origin are all that keeps web pages out.
    """

    allowed: tuple[str, ...]
    hosts: tuple[str, ...]
    open: bool

    def check(self, host: str | None, origin: str | None, site: str | None = None) -> None:
        """
        Refuse web pages that must not be answered.

        @param site: the ``Sec-Fetch-Site`` of a browser, which tells of a page also where no
            Origin does: an image or a script is fetched without one.
        @raise ProxyError: ORIGIN_NOT_ALLOWED.
        """
        if not self.open:
            return
        # Every browser sends a Host; a plain HTTP/1.0 client may not.
        name = _host_name(host) if host is not None else "localhost"
        if not _is_local_name(name) and name not in self.hosts:
            message = (
                f"This server has no API keys and does not answer under the host name "
                f"'{name[:100]}'. Use its IP address, or add the name to ALLOWED_HOSTS."
            )
            raise ProxyError(Failure.ORIGIN_NOT_ALLOWED, message)
        if origin is not None and self.permitted(origin) is None:
            message = (
                f"This server does not answer web pages from '{origin[:100]}'. Add the origin to "
                "CORS_ORIGINS to allow it."
            )
            raise ProxyError(Failure.ORIGIN_NOT_ALLOWED, message)
        if origin is None and site is not None and site.strip().lower() in _OTHER_SITES:
            message = (
                "This server has no API keys and does not answer what other web pages load or link "
                "to. Enter the address by hand, or set API_KEY."
            )
            raise ProxyError(Failure.ORIGIN_NOT_ALLOWED, message)

    def permitted(self, origin: str | None) -> str | None:
        """What to send as Access-Control-Allow-Origin, or None to send nothing."""
        if origin is None:
            return None
        if "*" in self.allowed:
            return "*"
        return origin if origin.lower() in self.allowed else None


def _host_name(host: str) -> str:
    """The name in a Host header, without its port, lowercased."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


@lru_cache(maxsize=32)
def _is_local_name(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

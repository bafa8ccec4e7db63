"""
Wrong keys, by the addresses they came from, and how long each has to wait for its answer.  Pure.

Only a wrong key waits, never a right one from the same address: behind a reverse proxy, or in an
office, all clients have the same one.  So this makes guessing slow, not impossible: that is for
long keys to do.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address

__all__ = ["ADDRESSES", "FORGIVEN", "LONGEST", "Guesses", "neighbourhood"]

FORGIVEN = 5
"""Wrong keys from an address that are answered at once; as many more are forgiven in a minute."""

FIRST = 0.25
"""Seconds that the next one waits; each further one waits twice as long as the one before."""

LONGEST = 8.0
"""Seconds that any of them waits at most."""

ADDRESSES = 4096
"""How many addresses are remembered."""

_FORGET = 60.0 / FORGIVEN
"""Seconds after which one wrong key is forgotten."""

_WORST = FORGIVEN + 6
"""The count that means the longest wait; more are not counted, so that it is forgotten soon."""


class Guesses:
    """Counts wrong keys."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def note(self, address: str, now: float) -> float:
        """
        Count a wrong key.

        @param now: in seconds.
        @return: seconds after which it is to be answered.
        """
        place = neighbourhood(address)
        count, since = self._counts.pop(place, (0.0, now))
        count = min(max(count - (now - since) / _FORGET, 0.0) + 1, _WORST)
        self._counts[place] = (count, now)
        if len(self._counts) > ADDRESSES:
            self._counts.popitem(last=False)
        if count <= FORGIVEN:
            return 0.0
        return min(float(FIRST * 2 ** (count - FORGIVEN - 1)), LONGEST)


def neighbourhood(address: str) -> str:
    """What counts as one address: of IPv6 the first 64 bits, which one customer has."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"

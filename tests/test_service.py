"""What the service decides by itself.  Its life is in tests/integration/test_daemon.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress, IListeningPort

from claude_proxy.service import is_public


class Port:
    """A port with an address."""

    def __init__(self, address: object) -> None:
        self._address = address

    def getHost(self) -> IAddress:
        return cast(IAddress, self._address)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (IPv4Address("TCP", "127.0.0.1", 3000), False),
        (IPv4Address("TCP", "127.0.0.9", 3000), False),
        (IPv4Address("TCP", "0.0.0.0", 3000), True),
        (IPv4Address("TCP", "192.168.0.1", 3000), True),
        # A socket that was passed may be of the other family than LISTEN says.
        (IPv4Address("TCP", "::", 3000), True),
        (IPv6Address("TCP", "::1", 3000), False),
        (IPv6Address("TCP", "::", 3000), True),
        (IPv6Address("TCP", "fe80::1%eth0", 3000), True),
        (UNIXAddress("/run/claude-proxy.sock"), False),
        (UNIXAddress(None), False),
        (object(), True),
    ],
)
def test_who_can_reach_it_follows_from_the_address(address: Any, public: bool) -> None:
    assert is_public(cast(IListeningPort, Port(address))) is public


def test_an_unknown_port_counts_as_public() -> None:
    assert is_public(None)

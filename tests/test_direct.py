"""Bytes leave at once, in their order, and never past what stands between them and the socket."""

from __future__ import annotations

from typing import Any, cast

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.protocols.policies import WrappingFactory

from claude_proxy.web.direct import DirectConnection
from claude_proxy.web.outlet import Outlet
from tests.descriptors import EVERYTHING, Socket
from tests.support import KeptRequests, encode_request, open_site


def connected(transport: object) -> DirectConnection:
    factory: WrappingFactory[Any] = WrappingFactory(Factory.forProtocol(Protocol))
    connection = DirectConnection(factory, Protocol())
    connection.makeConnection(cast(Any, transport))
    return connection


def send(connection: DirectConnection, *pieces: bytes) -> None:
    connection.gather()
    for piece in pieces:
        connection.write(piece)
    connection.send()


def test_what_is_gathered_leaves_at_once_and_in_one_piece() -> None:
    socket = Socket()
    connection = connected(socket)
    connection.gather()
    connection.write(b"head ")
    connection.writeSequence([b"5\r\n", b"first", b"\r\n"])
    assert socket.pieces == []
    connection.send()
    assert socket.pieces == [b"head 5\r\nfirst\r\n"]
    assert not socket.waits


def test_what_is_not_gathered_goes_the_usual_way() -> None:
    socket = Socket()
    connection = connected(socket)
    connection.write(b"one")
    connection.writeSequence([b"two", b"three"])
    assert (socket.pieces, socket.waits) == ([], True)
    socket.doWrite()
    assert (socket.pieces, socket.waits) == ([b"onetwothree"], False)


def test_the_rest_that_a_full_socket_does_not_take_follows_in_order() -> None:
    socket = Socket()
    connection = connected(socket)
    socket.room = 4
    send(connection, b"abcdefgh")
    assert (socket.pieces, socket.waits) == ([b"abcd"], True)
    socket.room = EVERYTHING
    send(connection, b"ijkl")  # must not overtake
    assert socket.pieces == [b"abcd"]
    socket.doWrite()
    assert b"".join(socket.pieces) == b"abcdefghijkl"
    send(connection, b"mnop")
    assert socket.pieces[-1] == b"mnop"


def test_what_twisted_has_begun_to_send_is_not_overtaken() -> None:
    socket = Socket()
    connection = connected(socket)
    socket.room = 2
    connection.write(b"abcd")
    socket.doWrite()
    socket.room = EVERYTHING
    send(connection, b"ef")
    assert socket.pieces == [b"ab"]
    socket.doWrite()
    assert b"".join(socket.pieces) == b"abcdef"


def test_an_error_of_the_socket_is_left_to_the_reactor() -> None:
    socket = Socket()
    connection = connected(socket)
    socket.error = ConnectionLost()
    send(connection, b"lost")
    assert socket.waits
    assert socket.doWrite() is socket.error


def test_a_connection_that_is_lost_takes_nothing() -> None:
    socket = Socket()
    connection = connected(socket)
    socket.connected = 0
    send(connection, b"late")
    assert (socket.pieces, socket.waits) == ([], False)


def test_bytes_that_are_to_be_encrypted_are_not_sent_past_the_encryption() -> None:
    below = Socket()

    class Encryption(StringTransport):
        """Like Twisted's TLS, it has all attributes of what is below."""

        def __getattr__(self, name: str) -> Any:
            return getattr(below, name)

    above = Encryption()
    send(connected(above), b"secret")
    assert (above.value(), below.pieces) == (b"secret", [])


def test_the_end_of_a_connection_comes_after_what_was_gathered() -> None:
    socket = Socket()
    connection = connected(socket)
    connection.gather()
    connection.write(b"last words")
    connection.loseConnection()
    assert socket.pieces == [b"last words"]
    assert socket.disconnecting
    connection.send()
    assert socket.pieces == [b"last words"]


@pytest.mark.parametrize("words", [[b"one"], [b"one", b"two"]])
def test_an_outlet_sends_each_piece_of_a_stream_at_once(words: list[bytes]) -> None:
    kept = KeptRequests()
    socket = Socket()
    channel: Any = open_site(kept, Clock()).buildProtocol(None)
    connection = DirectConnection(WrappingFactory(Factory.forProtocol(Protocol)), channel)
    connection.makeConnection(cast(Any, socket))
    connection.dataReceived(encode_request("GET"))
    outlet = Outlet(kept.requests[0], Clock(), 60.0)
    for word in words:
        outlet.write(word)
    head, *rest = socket.pieces
    assert head.startswith(b"HTTP/1.1 200 ")
    assert head.endswith(b"\r\n\r\n3\r\none\r\n")
    assert rest == [b"3\r\n%b\r\n" % word for word in words[1:]]

"""The way out to one client: its pauses, its patience, its end."""

from __future__ import annotations

import pytest
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from zope.interface.verify import verifyObject

from claude_proxy.web.outlet import Outlet
from tests.support import Connection, KeptRequests, encode_request, open_site

STALL = 60.0


class World:
    """A request that waits for its answer, and an outlet for it."""

    def __init__(self, method: str = "GET") -> None:
        self.clock = Clock()
        kept = KeptRequests()
        # The site has a clock of its own: its idle timeouts are not what is tested here.
        self.connection = Connection(open_site(kept, Clock()))
        self.connection.send(encode_request(method))
        self.heard: list[str] = []
        self.outlet = Outlet(
            kept.requests[0],
            self.clock,
            STALL,
            on_pause=lambda: self.heard.append("pause"),
            on_resume=lambda: self.heard.append("resume"),
            on_gone=lambda: self.heard.append("gone"),
        )

    @property
    def body(self) -> bytes:
        return self.connection.answers[0].body

    @property
    def complete(self) -> bool:
        return self.connection.answers[0].complete

    def hold(self, count: int) -> None:
        """Say how many bytes the socket has not yet taken."""
        self.connection.transport.dataBuffer = b"x" * count


def test_what_is_written_goes_out_at_once_and_the_end_at_the_end() -> None:
    world = World()
    verifyObject(IPushProducer, world.outlet)
    world.outlet.write(b"one")
    assert (world.body, world.complete) == (b"one", False)
    world.outlet.write(b"two")
    world.outlet.finish()
    assert (world.body, world.complete) == (b"onetwo", True)
    assert world.outlet.closed.called
    assert world.heard == []
    assert world.clock.getDelayedCalls() == []


def test_each_write_is_one_piece_on_the_wire() -> None:
    world = World()
    world.outlet.write(b"one")
    world.connection.transport.clear()
    world.outlet.write(b"twothree")
    assert world.connection.received == b"8\r\ntwothree\r\n"


def test_after_the_end_nothing_is_written() -> None:
    world = World()
    world.outlet.write(b"one")
    world.outlet.finish()
    world.outlet.write(b"two")
    world.outlet.finish()
    assert world.body == b"one"


def test_an_answer_may_be_empty() -> None:
    world = World()
    world.outlet.finish()
    assert (world.body, world.complete) == (b"", True)


def test_the_sockets_pauses_are_passed_on() -> None:
    world = World()
    world.connection.block()
    assert world.outlet.paused
    world.connection.unblock()
    assert not world.outlet.paused
    assert world.heard == ["pause", "resume"]
    assert world.clock.getDelayedCalls() == []


def test_an_end_that_comes_while_the_socket_is_full_waits_for_it() -> None:
    world = World()
    world.outlet.write(b"one")
    world.connection.block()
    world.outlet.finish()
    assert not world.complete
    assert not world.outlet.closed.called
    world.connection.unblock()
    assert world.complete
    assert world.outlet.closed.called
    assert world.heard == ["pause"], "there is nobody left to resume"
    assert world.clock.getDelayedCalls() == []


def test_a_client_that_takes_nothing_is_let_go() -> None:
    world = World()
    world.hold(1000)
    world.connection.block()
    world.clock.pump([15, 15, 15, 14.9])
    assert not world.connection.aborted
    with capturedLogs() as events:
        world.clock.advance(0.1)
    assert world.connection.aborted
    assert [event["seconds"] for event in events if event["type"] == "client_stalled"] == [STALL]
    world.connection.lose()
    assert world.heard == ["pause", "gone"]
    assert world.outlet.closed.called
    assert world.clock.getDelayedCalls() == []


def test_a_client_that_takes_nothing_of_a_finished_answer_is_let_go_as_well() -> None:
    world = World()
    world.hold(1000)
    world.connection.block()
    world.outlet.finish()
    world.clock.pump([15] * 4)
    assert world.connection.aborted
    world.connection.lose()
    assert world.outlet.closed.called


def test_a_slow_client_is_not_a_stalled_one() -> None:
    world = World()
    world.hold(1000)
    world.connection.block()
    for left in range(990, 900, -10):
        world.clock.pump([15] * 3)
        world.hold(left)
        world.clock.pump([10])
    assert not world.connection.aborted
    world.clock.pump([15] * 5)
    assert world.connection.aborted


def test_what_is_written_meanwhile_does_not_hide_that_a_client_is_reading() -> None:
    world = World()
    world.hold(1000)
    world.connection.block()
    world.outlet.write(b"y" * 1000)
    world.outlet.finish()
    for left in range(1900, 1000, -100):
        world.hold(left)
        world.clock.pump([15] * 2)
    assert not world.connection.aborted


def test_the_write_that_fills_the_socket_is_not_counted_twice() -> None:
    world = World()

    def fill(_: list[bytes]) -> None:
        world.hold(1000)
        world.connection.block()

    world.outlet.write(b"head")
    world.connection.transport.writeSequence = fill
    world.outlet.write(b"y" * 1000)
    world.clock.pump([15] * 4)
    assert world.connection.aborted


def test_a_client_that_pauses_often_is_measured_anew_each_time() -> None:
    world = World()
    for _ in range(10):
        world.connection.block()
        world.clock.pump([15, 15, 15])
        world.connection.unblock()
    assert not world.connection.aborted


def test_a_client_that_leaves_is_noticed_once() -> None:
    world = World()
    world.outlet.write(b"one")
    world.connection.lose()
    world.outlet.write(b"two")
    world.outlet.finish()
    world.outlet.stopProducing()
    assert world.heard == ["gone"]
    assert world.outlet.closed.called


def test_a_client_that_leaves_while_the_socket_is_full_leaves_no_timer() -> None:
    world = World()
    world.connection.block()
    world.connection.lose()
    assert world.heard == ["pause", "gone"]
    assert world.clock.getDelayedCalls() == []


def test_a_client_that_leaves_after_the_end_is_not_missed() -> None:
    world = World()
    world.outlet.finish()
    world.connection.lose()
    assert world.heard == []


def test_nobody_has_to_listen() -> None:
    kept = KeptRequests()
    connection = Connection(open_site(kept, Clock()))
    connection.send(encode_request())
    outlet = Outlet(kept.requests[0], Clock(), STALL)
    connection.block()
    connection.unblock()
    connection.lose()
    assert outlet.closed.called


@pytest.mark.parametrize("ended", [False, True])
def test_a_pause_after_all_is_over_starts_no_timer(ended: bool) -> None:
    world = World()
    if ended:
        world.outlet.finish()
    else:
        world.connection.lose()
    world.outlet.pauseProducing()
    assert world.clock.getDelayedCalls() == []


def test_a_head_request_gets_no_body() -> None:
    world = World("HEAD")
    world.outlet.write(b"one")
    world.outlet.write(b"two")
    world.outlet.finish()
    assert world.connection.received.endswith(b"\r\n\r\n")
    assert world.outlet.closed.called

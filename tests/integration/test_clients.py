"""Clients that misbehave: what becomes of their turns, and that nothing is left of them."""

from __future__ import annotations

import errno
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bad_days import (
    Step,
    ask,
    encode_turn,
    events_of,
    misbehaving,
    nothing_left,
    quick_ladder,
    read_all,
)
from tests.integration.server import Running, in_thread, is_alive, pause, until
from tests.support import in_reactor, parse_answers

STALL_SECONDS = 1.0
STALL = {"CLIENT_STALL_TIMEOUT_MS": "1000"}

BYE = "bye"
RESET = "reset"
WAYS = (BYE, RESET)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Do not wait a whole second on each polite rung of the kill ladder."""
    with quick_ladder():
        yield


def leave(client: socket.socket, way: str) -> None:
    """Close a connection politely, or as a machine does whose program has died."""
    if way == RESET:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def told(server: Running, name: str) -> str:
    """Wait for a word of the program."""
    return await until(lambda: server.told(name), f"the program says {name}")


def forget(server: Running, *names: str) -> None:
    """Take notes away that earlier turns have left."""
    for name in names:
        (server.folder / name).unlink(missing_ok=True)


# Clients that leave.

TURN = encode_turn([["init"], ["note", "begun"], ["leave"]])


@in_reactor
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sent", [b"", b"POST /api/cl", TURN[:60], TURN[:-5]], ids=["nothing", "line", "head", "body"]
)
async def test_who_leaves_before_the_request_is_complete_starts_nothing(
    tmp_path: Path, sent: bytes, way: str
) -> None:
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(sent)
            await pause(0.05)
            leave(client, way)
        await pause(0.1)
        assert server.told("begun") == ""


@in_reactor
@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_in_the_midst_of_a_long_body_leaves_no_file_of_it(
    tmp_path: Path, way: str
) -> None:
    long_turn = encode_turn("x" * 5_000_000)
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            await in_thread(client.sendall, long_turn[:-1])
            leave(client, way)


MANNERS: dict[str, list[Step]] = {
    "obeys": [["obey"]],
    "talks on": [["say_for_ever", 100, 0.01]],
    "writes as much as it can": [["say_for_ever", 10_000]],
    "ignores INT and TERM": [["be_stubborn"], ["hang"]],
}
"""What the process does whose client leaves."""


@in_reactor
@pytest.mark.parametrize(("stream", "way"), [(True, RESET), (True, BYE), (False, BYE)])
@pytest.mark.parametrize("manner", MANNERS)
async def test_who_leaves_in_mid_turn_has_it_stopped(
    tmp_path: Path, stream: bool, manner: str, way: str
) -> None:
    silent: list[Step] = [["note", "begun"], *MANNERS[manner]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        # Before the first event, and after it.
        for script in (silent, [["init"], *silent]):
            forget(server, "begun", "interrupted")
            with server.connect() as client:
                client.sendall(encode_turn(script, stream=stream))
                await told(server, "begun")
                pid = int(server.told("pid"))
                if stream and script is not silent:
                    await in_thread(client.recv, 10)
                leave(client, way)
            await until(lambda pid=pid: not is_alive(pid), "the process is gone")  # type: ignore[misc]
            assert bool(server.told("interrupted")) == (manner == "obeys")


@in_reactor
@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_while_the_process_starts_has_it_stopped(tmp_path: Path, way: str) -> None:
    async with misbehaving(tmp_path) as server, nothing_left(server):
        for delay in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032):
            with server.connect() as client:
                client.sendall(encode_turn([["hang"]]))
                await pause(delay)
                leave(client, way)


@in_reactor
@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_after_the_end_leaves_nothing(tmp_path: Path, way: str) -> None:
    with quick_ladder(0.5):
        async with misbehaving(tmp_path) as server, nothing_left(server):
            with server.connect() as client:
                client.sendall(encode_turn([["init"], ["result"], ["hang"]]))
                received = b""
                while not received.endswith(b"0\r\n\r\n"):
                    received += await in_thread(client.recv, 65536)
                assert is_alive(int(server.told("pid")))
                leave(client, way)
            assert b'"done"' in received


HOLD: list[Step] = [["init"], ["note", "held"], ["await_note", "go"], ["result"], ["leave"]]


@in_reactor
@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_while_waiting_for_the_session_leaves_the_queue(
    tmp_path: Path, way: str
) -> None:
    leases = "the next one waits"
    async with misbehaving(tmp_path) as server, nothing_left(server):
        session = (await ask(server, "hello")).headers["x-claude-session-id"]
        waiting = server.executor.context.leases
        with server.connect() as holder, server.connect() as second, server.connect() as third:
            holder.sendall(encode_turn(HOLD, session_id=session))
            await told(server, "held")
            for number, client in enumerate((second, third), 1):
                script: list[Step] = [["note", f"ran-{number}"], ["result", str(number)], ["leave"]]
                client.sendall(encode_turn(script, session_id=session, version="1.0"))
                await until(lambda number=number: waiting.waiting == number, leases)  # type: ignore[misc]
            leave(second, way)
            await until(lambda: waiting.waiting == 1, "the second is forgotten")
            (server.folder / "go").touch()
            [answer] = parse_answers(await in_thread(read_all, third), closed=True)
            assert events_of(answer)[-1]["result"] == "2"
        assert server.told("ran-1") == ""


# Clients that read nothing, or little.


@in_reactor
async def test_a_whole_answer_that_nobody_reads_is_given_up_and_holds_no_session(
    tmp_path: Path,
) -> None:
    async with misbehaving(tmp_path, **STALL) as server, nothing_left(server):
        session = (await ask(server, "hello")).headers["x-claude-session-id"]
        script: list[Step] = [["init"], ["result_much", 20_000_000], ["leave"]]
        with server.connect(receive_buffer=4096) as client:
            forget(server, "pid")
            client.sendall(encode_turn(script, session_id=session, stream=False))
            pid = int(await told(server, "pid"))
            await until(lambda: not is_alive(pid), "the process has ended")
            again = await ask(server, "again", session_id=session)
            assert events_of(again)[-1]["result"] == "done"
            await until(lambda: server.is_idle, "only the answer is left")
            await pause(STALL_SECONDS * 1.5)
            with pytest.raises(ConnectionResetError):
                await in_thread(read_all, client)


@in_reactor
async def test_a_stream_that_nobody_reads_is_given_up_with_its_stubborn_process(
    tmp_path: Path,
) -> None:
    script: list[Step] = [["be_stubborn"], ["fork", "own session", "stdout"], ["init"]]
    script += [["say_for_ever", 10_000]]
    async with misbehaving(tmp_path, **STALL) as server, nothing_left(server):
        with server.connect(receive_buffer=4096) as client:
            client.sendall(encode_turn(script))
            grandchild = int(await told(server, "grandchild"))
            pid = int(server.told("pid"))
            await pause(STALL_SECONDS / 2)
            assert is_alive(pid), "it waits for the client"
            await until(lambda: not is_alive(pid) and not is_alive(grandchild), "both are gone")
            with pytest.raises(ConnectionResetError):
                await in_thread(read_all, client)


def sip(client: socket.socket, rate: float, seconds: float) -> tuple[int, bool]:
    """
    Read a little at a time, on the whole so many bytes a second.

    @return: how much came, and whether the server has let go of the connection.
    """
    received, begin = 0, time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        try:
            # However late it is: what was missed is made up for.
            data = client.recv(max(1, int(passed * rate) - received))
        except ConnectionResetError:
            return received, True
        if not data:
            return received, True
        received += len(data)
        time.sleep(0.05)
    return received, False


def error_of(client: socket.socket) -> int:
    """What the system knows of the connection; the kernel tells only who writes or has read all."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@in_reactor
async def test_a_reader_that_takes_a_quarter_megabyte_within_the_stall_timeout_is_kept(
    tmp_path: Path,
) -> None:
    # What a client reads is seen only when its kernel asks for more, in steps of up to 128 KiB:
    # that much within the stall timeout is the least that keeps a connection.
    script: list[Step] = [["init"], ["say_for_ever", 10_000]]
    async with misbehaving(tmp_path, **STALL) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(encode_turn(script))
            await told(server, "pid")
            received, gone = await in_thread(sip, client, 260_000, STALL_SECONDS * 3)
            assert not gone
            assert 200_000 < received / (STALL_SECONDS * 3) < 270_000
            assert is_alive(int(server.told("pid")))
            assert error_of(client) == 0


@in_reactor
async def test_a_reader_of_some_bytes_a_second_is_let_go_like_one_that_reads_nothing(
    tmp_path: Path,
) -> None:
    script: list[Step] = [["init"], ["say_for_ever", 10_000]]
    async with misbehaving(tmp_path, **STALL) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(encode_turn(script))
            pid = int(await told(server, "pid"))
            _, gone = await in_thread(sip, client, 10, STALL_SECONDS * 2)
            await until(lambda: not is_alive(pid), "the process is gone")
            assert gone or error_of(client) == errno.ECONNRESET


@in_reactor
async def test_an_answer_that_the_system_holds_may_be_read_byte_by_byte(tmp_path: Path) -> None:
    async with misbehaving(tmp_path, **STALL) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(encode_turn("hello", version="1.0"))
            received, gone = await in_thread(sip, client, 300, 20.0)
            assert gone, "it was read to its end"
        whole = await ask(server, "hello")
        assert received > len(whole.body)
        assert received * 0.003 > STALL_SECONDS


# Clients that say that they have said everything.


@in_reactor
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [True, False])
async def test_who_half_closes_has_left(tmp_path: Path, stream: bool, version: str) -> None:
    script: list[Step] = [["init"], ["note", "begun"], ["obey"]]
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(encode_turn(script, stream=stream, version=version))
            await told(server, "begun")
            pid = int(server.told("pid"))
            client.shutdown(socket.SHUT_WR)
            await until(lambda: not is_alive(pid), "the turn is stopped")
            received = await in_thread(read_all, client)
        # What had been sent arrives; nothing follows, not even the end.
        assert b'"result"' not in received
        assert not received.endswith(b"0\r\n\r\n")
        assert server.told("interrupted") == "yes"


# Clients that ask again before they were answered.


@in_reactor
@pytest.mark.parametrize("way", WAYS)
async def test_what_was_pipelined_behind_a_turn_is_dropped_when_the_client_leaves(
    tmp_path: Path, way: str
) -> None:
    first = encode_turn([["init"], ["note", "begun"], ["obey"]])
    second = encode_turn([["note", "second"], ["leave"]])
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(first + second * 3)
            await told(server, "begun")
            leave(client, way)
        await until(lambda: server.executor.running == 0, "the turn is stopped")
        assert server.told("second") == ""


@in_reactor
async def test_pipelined_turns_run_one_after_the_other_whatever_their_end(tmp_path: Path) -> None:
    failing = encode_turn([["exit_with", 3]])
    broken = encode_turn([["init"], ["exit_with", 3]])
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(failing + broken + encode_turn("hello", version="1.0"))
            answers = parse_answers(await in_thread(read_all, client), closed=True)
    assert [answer.status for answer in answers] == [502, 200, 200]
    assert [answer.complete for answer in answers] == [True] * 3
    assert answers[0].error["code"] == "cli_failed"
    assert events_of(answers[1])[-1]["error"]["code"] == "cli_failed"
    assert events_of(answers[2])[-1]["result"] == "done"


# Clients of HTTP/1.0.


@in_reactor
async def test_an_http_1_0_client_learns_of_the_end_by_the_close(tmp_path: Path) -> None:
    broken: list[Step] = [["init"], ["exit_with", 3]]
    request = encode_turn(broken, version="1.0")
    async with misbehaving(tmp_path) as server, nothing_left(server):
        with server.connect() as client:
            client.sendall(request.replace(b"\r\n", b"\r\nConnection: keep-alive\r\n", 1))
            received = await in_thread(read_all, client)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.")
    assert b"chunked" not in head.lower()
    last = json.loads(body.split(b"\n\n")[-2].removeprefix(b"data: "))
    assert last["error"]["code"] == "cli_failed"

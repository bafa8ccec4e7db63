"""
How fast one stream goes through in the OpenAI dialect, beside a bare pipe in the same run.

    python -m benchmarks.chat_stream [EVENTS]

The client counts every character.  Each text comes from the child twice, in pieces and whole, so
that comparing the two is measured as well.  Aims: 150,000 events a second, and 0.5 CPU seconds for
100,000.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.children import MARK, chat_flood
from benchmarks.harness import Server, argument, connect, elapsed, request_bytes, server
from benchmarks.native_stream import through_pipe

_CHARACTERS = 200
_BODY: dict[str, object] = {
    "model": "claude-code",
    "messages": [{"role": "user", "content": "x"}],
    "stream": True,
}
_DONE = b"data: [DONE]\n\n"
_END = b"\r\n0\r\n\r\n"


def through_server(running: Server, expected: int) -> tuple[float, float]:
    """
    Seconds, and CPU seconds of the server, for one stream.

    @param expected: how many characters the child says.
    """
    cpu, begin = running.cpu(), time.perf_counter()
    buffer = bytearray(1 << 20)
    characters, tail, mark = 0, b"", MARK.encode()
    with connect(running.port) as connection:
        connection.sendall(request_bytes(_BODY, "/v1/chat/completions"))
        while not tail.endswith(_END):
            size = connection.recv_into(buffer)
            if not size:
                raise SystemExit("The stream was cut.")
            characters += buffer.count(mark, 0, size)
            tail = (tail + bytes(memoryview(buffer)[max(0, size - 100) : size]))[-100:]
    seconds = elapsed(begin)
    if _DONE not in tail:
        raise SystemExit(f"The stream has no end: {tail!r}")
    if characters != expected:
        raise SystemExit(f"{expected - characters} characters were lost.")
    return seconds, running.cpu() - cpu


def main() -> None:
    """Measure and print."""
    count = argument(1, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        child = chat_flood(Path(folder, "flood"), events=count, characters=_CHARACTERS)
        _, seconds = through_pipe(child)
        bare = count / seconds
        print(f"bare pipe      {bare:12,.0f} events/s")
        with server(child) as running:
            for _ in range(3):
                seconds, cpu = through_server(running, count * _CHARACTERS)
                rate = count / seconds
                print(
                    f"claude-proxy   {rate:12,.0f} events/s  {cpu / count * 1e5:.3f} CPU s "
                    f"per 100,000  {rate / bare:.2f} of the pipe  "
                    f"{count * _CHARACTERS:,} characters"
                )


if __name__ == "__main__":
    main()

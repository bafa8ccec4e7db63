"""What the plugin does to the process as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import ctypes, gc, os, sys, threading
from claude_proxy import tap
options = tap.Options()
options.parseOptions(['--port', '0', '--state-path', sys.argv[1]])
options.parent = None
tap.makeService(options)
"""

_COLLECTOR = "print(gc.get_freeze_count() > 50_000, *gc.get_threshold())"

_ARENAS = """
def fill():
    keep = [bytes(100_000) for _ in range(50)]
    barrier.wait(10)
barrier = threading.Barrier(6)
threads = [threading.Thread(target=fill) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
end, start = os.pipe()
stream = ctypes.c_void_p(libc.fdopen(start, b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(os.fdopen(end).read().count("<heap "))
"""


def printed_after_start(tmp_path: Path, program: str) -> str:
    """What a program prints that has built a service before."""
    done = subprocess.run(
        [sys.executable, "-c", _START + program, str(tmp_path / "state")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_started_server_spares_the_collector_its_own_code(tmp_path: Path) -> None:
    assert printed_after_start(tmp_path, _COLLECTOR) == "True 10000 1 1"


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_its_threads_share_what_the_allocator_keeps(tmp_path: Path) -> None:
    assert printed_after_start(tmp_path, _ARENAS) == "1"

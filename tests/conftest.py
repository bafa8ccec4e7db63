"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Generator

import pytest

from tests.secrecy import OUTPUT

# A job that a shell runs in the background ignores Ctrl-C, and so would every program that the
# tests start: daemons that are told to stop by it would run on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No log record of any test may show a secret.


def pytest_sessionstart() -> None:
    OUTPUT.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Look at what the test has logged, and its fixtures."""
    try:
        return (yield)
    finally:
        OUTPUT.check(item.nodeid)


def pytest_sessionfinish() -> None:
    OUTPUT.stop()
    OUTPUT.check("what came after the last test")

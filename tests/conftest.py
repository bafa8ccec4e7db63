"""What holds for all tests."""

from __future__ import annotations

import signal

# A job that a shell runs in the background ignores Ctrl-C, and so would every program that the
# tests start: daemons that are told to stop by it would run on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

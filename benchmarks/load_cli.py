"""
The CLI of the load run: the soak's, at a given pace, with the time in every piece of its text.

A piece begins with a stamp: its number, and the moment when it is written, in nanoseconds of the
monotonic clock, which all processes of a machine share.  Number 0 is the moment when the message
was there.  Orders know a few more words:

- `pieces`, `gap` and `first`: how many, and the seconds between two and before the first one,
- `breaks` and `fails`: before which piece it fails, and how: `exit`, `garbage` or `kill`,
- `stubborn`: it obeys nothing, neither signals nor the end of its input,
- `orphans`: it leaves a process of its own in the background.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tests.integration import soak_cli
from tests.integration.soak_cli import LiveCli
from tests.integration.storm_cli import GARBAGE

__all__ = ["main"]


class LoadCli(LiveCli):
    """One process."""

    _heard = 0
    _said = ""

    def begin(self) -> None:
        self._heard = time.monotonic_ns()
        self._said = ""
        if self.order.get("stubborn"):
            self.be_stubborn()
        if self.order.get("orphans"):
            os.posix_spawnp("sleep", ["sleep", "600"], os.environ, setsid=True)
        super().begin()

    def text(self) -> str:
        return self._said or super().text()

    def partials(self, between: Callable[[int], object] = lambda _: None) -> None:
        text, order = self.text(), self.order
        size = len(text) // order["pieces"] + 1
        due = time.monotonic() + order["first"]
        stamp = f"~0~{self._heard}~"
        for number, start in enumerate(range(0, len(text), size), 1):
            self.nap(due - time.monotonic())
            due += order["gap"]
            if number == order["breaks"]:
                self._fail(order["fails"])
            stamp += f"~{number}~{time.monotonic_ns()}~"
            delta = {"type": "text_delta", "text": stamp + text[start : start + size]}
            self._stream("content_block_delta", index=0, delta=delta)
            self.flush()
            self._said += delta["text"]
            stamp = ""
            between(number)

    def die(self) -> NoReturn:
        """Not before it has begun to answer."""
        self.begin()
        self.partials()
        super().die()

    def _fail(self, how: str) -> NoReturn:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "garbage":
            for line in GARBAGE:
                self.raw(line)
            self.flush()
        super().die()

    def _control(self, message: dict[str, Any]) -> None:
        if not self.input.stubborn:
            super()._control(message)


def main() -> None:
    """Be the CLI."""
    soak_cli.main(LoadCli)

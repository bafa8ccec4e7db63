"""
How many connections there may be, and which of them makes room for another.  Pure.

Twisted's own `LimitTotalConnectionsFactory` refuses whoever comes last: strangers who open
connections and send nothing would keep everybody else out.  Here the newcomer is let in, and the
one that has waited longest for something of its client goes.  Addresses are not counted: behind a
reverse proxy all clients have the same one.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

__all__ = ["OVERFLOW", "OWN_DESCRIPTORS", "Connections", "Stage", "connections_that_fit"]

OVERFLOW = 256
"""
Connections beyond the limit: those that are told to go and have not gone, and newcomers that are
refused.  The reactor takes a rush of newcomers before it closes what made room for them.
"""

OWN_DESCRIPTORS = 64
"""What the server itself opens: its database, its log, the reactor's own."""

_PER_PROCESS = 4
"""Three pipes to each agent process, and one for the moment of its start."""

_FEWEST = 8


class Stage(Enum):
    """What a connection waits for; in this order they make room for others."""

    NEW = auto()
    """The first request that may come in; or the end, after one that might not."""
    RESTING = auto()
    """The next request, after one that was answered."""
    SENDING = auto()
    """The rest of a request's body."""


class IGivesWay(Protocol):
    """A connection."""

    def give_way(self) -> None:
        """Close now: another one needs the place."""


class Connections:
    """
    All connections, by what they wait for.

    @ivar limit: how many there may be.
    @ivar overflow: how many more for a moment, see `OVERFLOW`.
    @ivar refused: how many newcomers are being told that there is no place.
    """

    def __init__(self, limit: int, overflow: int = OVERFLOW) -> None:
        self.limit = limit
        self.overflow = overflow
        self.refused = 0
        self._waiting: dict[Stage, dict[IGivesWay, None]] = {stage: {} for stage in Stage}
        self._stages: dict[IGivesWay, Stage | None] = {}
        self._leaving: set[IGivesWay] = set()

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def overflows(self) -> bool:
        """Whether there is no room even to refuse somebody politely."""
        return len(self._stages) + self.refused > self.limit + self.overflow

    def make_room(self) -> bool:
        """Whether one more may come in; if need be, one that waits is told to go."""
        if len(self._stages) - len(self._leaving) < self.limit:
            return True
        if len(self._stages) + self.refused >= self.limit + self.overflow:
            return False
        for waiting in self._waiting.values():
            for connection in waiting:
                self.move(connection, None)
                self._leaving.add(connection)
                connection.give_way()
                return True
        return False

    def add(self, connection: IGivesWay) -> None:
        """Count a connection, which is NEW."""
        self._stages[connection] = Stage.NEW
        self._waiting[Stage.NEW][connection] = None

    def move(self, connection: IGivesWay, stage: Stage | None) -> None:
        """Note what it waits for now; None while it waits for this server."""
        if connection not in self._stages or connection in self._leaving:
            return
        before = self._stages[connection]
        if before is not None:
            del self._waiting[before][connection]
        self._stages[connection] = stage
        if stage is not None:
            self._waiting[stage][connection] = None

    def remove(self, connection: IGivesWay) -> None:
        """Forget a connection that is closed."""
        self._leaving.discard(connection)
        stage = self._stages.pop(connection, None)
        if stage is not None:
            self._waiting[stage].pop(connection, None)


def connections_that_fit(wanted: int, processes: int, descriptors: int) -> tuple[int, int]:
    """
    How many of the wanted connections there is room for beside the agent processes.

    @param processes: how many there may be at once.
    @param descriptors: how many this process may have open; below zero for any number.
    @return: their number, and how many more there may be for a moment.
    """
    if descriptors < 0:
        return wanted, OVERFLOW
    room = max(descriptors - OWN_DESCRIPTORS - _PER_PROCESS * processes, 2 * _FEWEST)
    overflow = min(OVERFLOW, max(room - wanted, room // 3))
    return min(wanted, room - overflow), overflow

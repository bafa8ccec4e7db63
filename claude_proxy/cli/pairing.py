"""
Which events belong to which turn, in a process that has had turns before.

Every turn begins with an ``init`` event; what comes between our lines and that are echoes of
settings.  While tasks of an earlier turn go on in the background, the CLI (2.1.197) may begin a
turn of its own at any moment.  Then only the replay tells whose an answer is: the CLI repeats a
message that it has taken, under the uuid that it was sent with, before the first block of the
answer is complete.  What a local command (``/cost``) says has no replay.
"""

from __future__ import annotations

from enum import Enum, auto

from claude_proxy.cli.events import Event

__all__ = ["Pairing"]

_HELD = 2000
"""Events that are kept while it is not known whose they are; then partial messages are dropped."""


class _State(Enum):
    FRESH = auto()
    """Nothing has come, and all that will is ours."""
    BEFORE = auto()
    """Nothing of a turn has come."""
    HOLDING = auto()
    """A turn has begun, and it is not known whose."""
    OURS = auto()


class Pairing:
    """
    Gives a turn its own events, from what a process says.

    @ivar foreign_results: results of nobody's turn; whoever reads them takes them out.
    """

    def __init__(self, uuid: str, *, fresh: bool, cautious: bool, is_command: bool) -> None:
        """
        @param uuid: of the message that was sent.
        @param fresh: nobody's turn was here before: all that comes is ours, but for the echoes.
        @param cautious: something goes on in the background, so the replay is waited for.
        @param is_command: the message may be a local command, which has no replay.
        """
        self.foreign_results: list[Event] = []
        self._uuid = uuid
        self._cautious = cautious
        self._is_command = is_command
        self._state = _State.FRESH if fresh else _State.BEFORE
        self._held: list[Event] = []
        self._holds_partials = True

    @property
    def is_holding(self) -> bool:
        """Whether a turn has begun that may be ours."""
        return self._state is _State.HOLDING

    def sort(self, events: list[Event]) -> list[Event]:
        """The events that are the turn's own, of those that arrived together; mostly all."""
        if self._state is _State.OURS:
            return events
        if self._state is _State.FRESH:
            return self._begin(events)
        for position, event in enumerate(events):
            own = self._take(event)
            if own:
                return [*own, *events[position + 1 :]]
        return []

    def _begin(self, events: list[Event]) -> list[Event]:
        """The first events of a process, without the echoes of the settings that it was told."""
        own: list[Event] = []
        for position, event in enumerate(events):
            if event.type != "system" or event.subtype == "init":
                return self._found([*own, *events[position:]])
            if event.subtype != "status":
                own.append(event)
        return own

    def _take(self, event: Event) -> list[Event]:
        """Read one event; return what has turned out to be ours with it."""
        if event.is_replay and event.uuid == self._uuid:
            return self._found([*self._since_last_start(), event])
        if event.type == "system" and event.subtype == "init":
            self._state, self._held = _State.HOLDING, [event]
            self._holds_partials = True
            if not self._cautious:
                return self._found(self._held)
        elif self._state is _State.BEFORE:
            if event.type == "result":
                self.foreign_results.append(event)
        elif event.type == "result":
            if self._is_command and event.fields().get("num_turns") == 0:
                return self._found([*self._held, event])
            self.foreign_results.append(event)
            self._state, self._held = _State.BEFORE, []
        elif self._holds_partials or event.type != "stream_event":
            self._held.append(event)
            if self._holds_partials and len(self._held) >= _HELD:
                # The whole blocks say it all once more, and come after the replay.
                self._holds_partials = False
                self._held = [held for held in self._held if held.type != "stream_event"]
        return []

    def _found(self, events: list[Event]) -> list[Event]:
        self._state, self._held = _State.OURS, []
        return events

    def _since_last_start(self) -> list[Event]:
        """
        The turn's ``init`` and what the model said last.

        A message that comes while a tool runs joins the turn that runs: what was said before in it
        is not for us.
        """
        if not self._held:
            return []
        init, *said = self._held
        starts = [i for i, event in enumerate(said) if b'"message_start"' in event.line]
        return [init, *said[starts[-1] if starts else 0 :]]

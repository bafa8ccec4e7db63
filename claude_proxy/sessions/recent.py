"""
The sessions that were looked up last, so that a live one need not wait for the store again.

Only what turns do not change is to be read from these records: whose a session is, its workspace,
that it has begun, and by which id the CLI resumes it.
"""

from __future__ import annotations

from claude_proxy.sessions.records import SessionRecord

__all__ = ["RecentSessions"]

_KEPT = 256


class RecentSessions:
    """
    Records of sessions by the names under which they are kept, the least recently used first.

    @ivar changes: goes up whenever an answer that is still on its way may be out of date.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._records: dict[str, SessionRecord] = {}

    def get(self, session: str) -> SessionRecord | None:
        """What is known of a session; None if it has to be looked up."""
        record = self._records.pop(session, None)
        if record is not None:
            self._records[session] = record
        return record

    def keep(self, record: SessionRecord, changes: int) -> None:
        """
        Keep what a lookup has told.

        @param changes: how many there were when it was asked.
        """
        if record.begun and changes == self.changes:
            self._records[record.id] = record
            if len(self._records) > _KEPT:
                del self._records[next(iter(self._records))]

    def begun(self, session: str, cli_id: str) -> None:
        """A turn of a session has begun, and the CLI knows it by this id."""
        record = self._records.get(session)
        if record is None or record.cli_id != cli_id:
            self.changes += 1
            self._records.pop(session, None)

    def forget(self) -> None:
        """Keep nothing: some of it is not so any more."""
        self.changes += 1
        self._records.clear()

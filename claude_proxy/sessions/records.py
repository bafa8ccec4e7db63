"""
What is remembered of each session, in the words of SQL.

Every function is given the open database and is one transaction.

A session has one id by which this server knows it, and the CLI may give it further ids (old
versions make a new one at every resume).  A client may come back with any of them, so all of them
stay known as aliases.  No id ever belongs to two sessions.

A session may also have a tip: the fingerprint of the history that ends with its last answer.  A
client that sends this history means this session.  Whatever the CLI takes up in a session makes its
tip untrue, so it is gone until the next answer gives it a new one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from claude_proxy.sessions.schema import StoreError, transaction

__all__ = [
    "SessionRecord",
    "begin",
    "claim",
    "create",
    "encoded",
    "find",
    "prune",
    "set_tip",
    "touch",
    "unclaim",
]

_COLUMNS = """
    id, cli_id, workspace, tenant, state, parameters, created, used, tip, claimed, conversation
"""

_SELECT = f"""
    SELECT {_COLUMNS} FROM sessions
    WHERE id = :name OR id = (SELECT session FROM aliases WHERE alias = :name)
"""  # noqa: S608 - nothing in it comes from outside

_LOSE_TIP = "tip = CASE WHEN tip IS NULL THEN NULL ELSE '' END, claimed = NULL"

_UPSERT = f"""
    INSERT INTO sessions (id, cli_id, workspace, tenant, state, parameters, created, used)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        cli_id = excluded.cli_id, workspace = excluded.workspace, state = excluded.state,
        parameters = excluded.parameters, used = excluded.used, {_LOSE_TIP}
"""  # noqa: S608 - nothing in it comes from outside

_BEGIN = f"UPDATE sessions SET state = 'begun', cli_id = ?, used = ?, {_LOSE_TIP} WHERE id = ?"  # noqa: S608 - as above

_SET_TIP = """
    UPDATE sessions SET tip = ?, claimed = NULL, conversation = coalesce(?, conversation)
    WHERE id = ?
"""

_PRUNE = """
    DELETE FROM sessions WHERE used < ? OR rowid IN (
        SELECT rowid FROM sessions ORDER BY used DESC, rowid DESC LIMIT -1 OFFSET ?
    )
"""

# Of several sessions with one history the client may mean the one that an answer showed, or that of
# the same name.  Two of the same rank cannot be told apart.
_SELECT_BY_TIPS = """
    SELECT id, CASE WHEN id = :hinted THEN 2 WHEN conversation IS :conversation THEN 1 ELSE 0 END
        AS rank
    FROM sessions
    WHERE tenant = :tenant AND tip IN (%s) AND tip != '' AND state = 'begun'
        AND (:workspace IS NULL OR workspace = :workspace)
        AND (:conversation IS NULL OR conversation IS NULL OR conversation = :conversation)
    ORDER BY rank DESC LIMIT 2
"""


@dataclass(frozen=True)
class SessionRecord:
    """
    One session as it is remembered.

    @ivar id: the UUID by which this server knows it.
    @ivar cli_id: the id by which the CLI resumes it now.
    @ivar workspace: the name of its workspace, None for the shared one.
    @ivar tenant: whose session it is.
    @ivar begun: whether the CLI ever began it; before that there is no transcript to resume.
    @ivar parameters: what later turns inherit, a JSON object; not in the repr, as it may hold
        prompts.
    @ivar created: when it was made, in Unix seconds.
    @ivar used: when it was last used, in Unix seconds.
    @ivar tip: the fingerprint of the history that ends with its last answer; None if it never had
        one, empty if it has none at present.
    @ivar claimed: the tip that a request has taken whose turn has not begun yet.
    @ivar conversation: the client's own name for the conversation.
    """

    id: str
    cli_id: str
    workspace: str | None
    tenant: str
    begun: bool
    parameters: Mapping[str, object] = field(repr=False)
    created: float
    used: float
    tip: str | None = None
    claimed: str | None = None
    conversation: str | None = None


def encoded(parameters: Mapping[str, object]) -> str:
    """
    The parameters as the database keeps them.

    @raise StoreError: they are not JSON.
    """
    try:
        return msgspec.json.encode(dict(parameters)).decode()
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise StoreError(f"The parameters are not JSON: {type(error).__name__}.") from error


def find(connection: sqlite3.Connection, name: str) -> SessionRecord | None:
    """The session that has this id, or had it once."""
    row = connection.execute(_SELECT, {"name": name}).fetchone()
    return None if row is None else _record(row)


def create(connection: sqlite3.Connection, record: SessionRecord, parameters: str) -> None:
    """
    Remember a new session, or replace what is known of it except when it was created.

    It has no tip then, whatever the record says: the CLI may have taken it up.
    """
    state = "begun" if record.begun else "new"
    row = (record.id, record.cli_id, record.workspace, record.tenant, state, parameters)
    with transaction(connection):
        known = find(connection, record.id)
        if known is not None and (known.id, known.tenant) != (record.id, record.tenant):
            raise StoreError(f"The session id {record.id} belongs to another session or tenant.")
        connection.execute(_UPSERT, (*row, record.created, record.used))
        _add_alias(connection, record.id, record.cli_id)


def begin(connection: sqlite3.Connection, name: str, cli_id: str, now: float) -> None:
    """Remember that the CLI took up a session and how it resumes it; its tip is gone."""
    with transaction(connection):
        session = _known(connection, name)
        _add_alias(connection, session, cli_id)
        connection.execute(_BEGIN, (cli_id, now, session))


def touch(
    connection: sqlite3.Connection, name: str, now: float, parameters: str | None = None
) -> None:
    """Remember that a session was used, and its parameters if any are given."""
    with transaction(connection):
        connection.execute(
            "UPDATE sessions SET used = ?, parameters = coalesce(?, parameters) WHERE id = ?",
            (now, parameters, _known(connection, name)),
        )


def set_tip(connection: sqlite3.Connection, name: str, tip: str, conversation: str | None) -> None:
    """Remember with which history a session ends; no name leaves the conversation its own."""
    with transaction(connection):
        connection.execute(_SET_TIP, (tip, conversation, _known(connection, name)))


def claim(
    connection: sqlite3.Connection,
    tenant: str,
    tips: Sequence[str],
    conversation: str | None,
    *,
    workspace: str | None,
    hinted: str | None,
) -> SessionRecord | None:
    """Take the tip of the one session that ends with a history."""
    named = {f"tip{number}": tip for number, tip in enumerate(tips)}
    select = _SELECT_BY_TIPS % ", ".join(f":{name}" for name in named)
    with transaction(connection):
        shown = None if hinted is None else find(connection, hinted)
        given = {
            "tenant": tenant,
            "conversation": conversation,
            "workspace": workspace,
            "hinted": None if shown is None else shown.id,
        }
        first, second = [*connection.execute(select, named | given), None, None][:2]
        if first is None or (second is not None and first[1] == second[1]):
            return None
        connection.execute("UPDATE sessions SET claimed = tip, tip = '' WHERE id = ?", first[:1])
        return find(connection, first[0])


def unclaim(connection: sqlite3.Connection, name: str, tip: str) -> None:
    """Give a tip back, unless the CLI has taken up the session meanwhile."""
    with transaction(connection):
        connection.execute(
            "UPDATE sessions SET tip = claimed, claimed = NULL WHERE id = ? AND claimed = ?",
            (name, tip),
        )


def prune(connection: sqlite3.Connection, before: float, keep: int) -> int:
    """Forget what was not used for long, and the oldest of what is too much; how many it were."""
    with transaction(connection):
        return connection.execute(_PRUNE, (before, keep)).rowcount


def _record(row: Sequence[Any]) -> SessionRecord:
    session, cli_id, workspace, tenant, state, parameters, created, used, *history = row
    begun = state == "begun"
    kept = msgspec.json.decode(parameters, type=dict[str, object])
    return SessionRecord(session, cli_id, workspace, tenant, begun, kept, created, used, *history)


def _known(connection: sqlite3.Connection, name: str) -> str:
    found = find(connection, name)
    if found is None:
        raise StoreError(f"There is no session {name}.")
    return found.id


def _add_alias(connection: sqlite3.Connection, session: str, alias: str) -> None:
    owner = find(connection, alias)
    if owner is None:
        connection.execute("INSERT INTO aliases (alias, session) VALUES (?, ?)", (alias, session))
    elif owner.id != session:
        raise StoreError(f"The session id {alias} belongs to another session.")

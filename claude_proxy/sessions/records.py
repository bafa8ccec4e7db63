"""
What is remembered of each session, in the words of SQL.

Every function is given the open database and is one transaction.

A session has one id by which this server knows it, and the CLI may give it further ids (old
versions make a new one at every resume).  A client may come back with any of them, so all of them
stay known as aliases.  No id ever belongs to two sessions.

A session may also have a tip: the fingerprint of the history that ends with its last answer.  A
client that sends this history means this session.  Whatever the CLI takes up in a session makes its
tip untrue, so it is gone until the next answer gives it a new one.

Of a session that is deleted nothing is left but its ids, for good: nobody is to continue it, though
the CLI still could.  What a turn that was under way still has to say of it is dropped.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from claude_proxy.sessions.schema import StoreError, transaction

__all__ = [
    "Place",
    "SessionRecord",
    "begin",
    "claim",
    "create",
    "delete",
    "encoded",
    "find",
    "finish_own_turn",
    "finish_turn",
    "is_deleted",
    "page",
    "prune",
    "set_tip",
    "unclaim",
]

_COLUMNS = """
    id, cli_id, workspace, tenant, state, parameters, created, used, tip, claimed, conversation,
    turns, cost, outcome, own_turns
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

_FINISH_TURN = """
    UPDATE sessions SET used = ?, turns = turns + 1, cost = cost + ?, outcome = ?, parameters = ?
    WHERE id = ?
"""

_FINISH_OWN_TURN = "UPDATE sessions SET own_turns = own_turns + 1, cost = cost + ? WHERE id = ?"

_PAGE = f"""
    SELECT {_COLUMNS} FROM sessions
    WHERE tenant = :tenant AND (created, id) < (:created, :id)
    ORDER BY created DESC, id DESC LIMIT :limit
"""  # noqa: S608 - nothing in it comes from outside

_BURY = """
    INSERT OR IGNORE INTO deleted (id)
    SELECT :session UNION SELECT alias FROM aliases WHERE session = :session
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
    @ivar turns: how many turns have ended.
    @ivar cost: of all of them and of its own, in US dollars.
    @ivar outcome: how the last one ended, in a word; None before that.
    @ivar own_turns: how many turns the agent began by itself.
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
    turns: int = 0
    cost: float = 0.0
    outcome: str | None = None
    own_turns: int = 0


class Place(NamedTuple):
    """A place in the list of sessions: when one was made, in Unix seconds, and its id."""

    created: float
    session_id: str


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


def is_deleted(connection: sqlite3.Connection, name: str) -> bool:
    """Whether this is an id of a session that was deleted."""
    return connection.execute("SELECT 1 FROM deleted WHERE id = ?", (name,)).fetchone() is not None


def page(
    connection: sqlite3.Connection, tenant: str, limit: int, before: Place | None
) -> list[SessionRecord]:
    """The tenant's sessions that follow a place in the list, the newest first."""
    created, session = before or (math.inf, "")
    given = {"tenant": tenant, "limit": limit, "created": created, "id": session}
    return [_record(row) for row in connection.execute(_PAGE, given)]


def create(connection: sqlite3.Connection, record: SessionRecord, parameters: str) -> None:
    """
    Remember a new session, or replace what is known of it except when it was created.

    It has no tip then, whatever the record says: the CLI may have taken it up.  Its turns stay as
    they were counted.
    """
    state = "begun" if record.begun else "new"
    row = (record.id, record.cli_id, record.workspace, record.tenant, state, parameters)
    with transaction(connection):
        if is_deleted(connection, record.id):
            return
        known = find(connection, record.id)
        if known is not None and (known.id, known.tenant) != (record.id, record.tenant):
            raise StoreError(f"The session id {record.id} belongs to another session or tenant.")
        connection.execute(_UPSERT, (*row, record.created, record.used))
        _add_alias(connection, record.id, record.cli_id)


def begin(connection: sqlite3.Connection, name: str, cli_id: str, now: float) -> None:
    """Remember that the CLI took up a session and how it resumes it; its tip is gone."""
    with transaction(connection):
        session = _known(connection, name)
        if session is not None:
            _add_alias(connection, session, cli_id)
            connection.execute(_BEGIN, (cli_id, now, session))
        elif find(connection, cli_id) is None:
            # Its last turn goes on under another id, which is deleted with it.
            connection.execute("INSERT OR IGNORE INTO deleted (id) VALUES (?)", (cli_id,))


def finish_turn(
    connection: sqlite3.Connection,
    name: str,
    now: float,
    cost: float,
    outcome: str,
    *,
    parameters: str,
) -> None:
    """Remember that a turn has ended: what it cost, how it ended, and what it hands on."""
    with transaction(connection):
        known = (now, _amount(cost), outcome, parameters, _known(connection, name))
        connection.execute(_FINISH_TURN, known)


def finish_own_turn(connection: sqlite3.Connection, name: str, cost: float) -> None:
    """Remember that a turn has ended that the agent began by itself."""
    with transaction(connection):
        connection.execute(_FINISH_OWN_TURN, (_amount(cost), _known(connection, name)))


def set_tip(connection: sqlite3.Connection, name: str, tip: str, conversation: str | None) -> None:
    """Remember with which history a session ends; no name leaves the conversation its own."""
    with transaction(connection):
        connection.execute(_SET_TIP, (tip, conversation, _known(connection, name)))


def delete(connection: sqlite3.Connection, name: str, tenant: str) -> SessionRecord | None:
    """Forget a session of this tenant but for its ids; what it was, or None if there is none."""
    with transaction(connection):
        record = find(connection, name)
        if record is None or record.tenant != tenant:
            return None
        connection.execute(_BURY, {"session": record.id})
        connection.execute("DELETE FROM sessions WHERE id = ?", (record.id,))
        return record


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


def _amount(cost: float) -> float:
    return cost if math.isfinite(cost) and cost > 0 else 0.0


def _record(row: Sequence[Any]) -> SessionRecord:
    session, cli_id, workspace, tenant, state, parameters, created, used, *history = row
    begun = state == "begun"
    kept = msgspec.json.decode(parameters, type=dict[str, object])
    return SessionRecord(session, cli_id, workspace, tenant, begun, kept, created, used, *history)


def _known(connection: sqlite3.Connection, name: str) -> str | None:
    """By which id a session is known; None if it is deleted, so that no row is met."""
    found = find(connection, name)
    if found is not None:
        return found.id
    if is_deleted(connection, name):
        return None
    raise StoreError(f"There is no session {name}.")


def _add_alias(connection: sqlite3.Connection, session: str, alias: str) -> None:
    owner = find(connection, alias)
    if (owner is not None and owner.id != session) or is_deleted(connection, alias):
        raise StoreError(f"The session id {alias} belongs to another session.")
    if owner is None:
        connection.execute("INSERT INTO aliases (alias, session) VALUES (?, ?)", (alias, session))

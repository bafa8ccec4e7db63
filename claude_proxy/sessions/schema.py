"""
The shape of the state database, and how an older one comes to have it.

An older database is brought up to date when it is opened; a newer one is left exactly as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PATIENCE", "VERSION", "StoreError", "damaged", "prepare", "transaction"]

# Each entry leads from the version that is its index to the next one; entries are only ever added.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE sessions (
            id TEXT PRIMARY KEY NOT NULL,
            cli_id TEXT NOT NULL,
            workspace TEXT,
            tenant TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('new', 'begun')),
            parameters TEXT NOT NULL,
            created REAL NOT NULL,
            used REAL NOT NULL
        )
        """,
        """
        CREATE TABLE aliases (
            alias TEXT PRIMARY KEY NOT NULL,
            session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE
        )
        """,
        "CREATE INDEX aliases_by_session ON aliases (session)",
    ),
    (
        # The fingerprint of the history that ends with the last answer; NULL if the session never
        # had one, empty if it has none at present.
        "ALTER TABLE sessions ADD COLUMN tip TEXT",
        # The tip that a request has taken whose turn has not begun yet.
        "ALTER TABLE sessions ADD COLUMN claimed TEXT",
        "ALTER TABLE sessions ADD COLUMN conversation TEXT",
        "CREATE INDEX sessions_by_tip ON sessions (tenant, tip)",
        "CREATE INDEX sessions_by_use ON sessions (used)",
    ),
    (
        "ALTER TABLE sessions ADD COLUMN turns INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE sessions ADD COLUMN cost REAL NOT NULL DEFAULT 0",  # in US dollars
        # How the last turn ended; NULL before the first end.
        "ALTER TABLE sessions ADD COLUMN outcome TEXT",
        "CREATE INDEX sessions_by_creation ON sessions (tenant, created, id)",
        # Every id that a deleted session ever had.
        "CREATE TABLE deleted (id TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID",
    ),
    (
        # Turns that nobody asked for: tasks in the background had ended.
        "ALTER TABLE sessions ADD COLUMN own_turns INTEGER NOT NULL DEFAULT 0",
    ),
)

VERSION = len(_MIGRATIONS)
"""The version of the database that this program makes and knows."""

PATIENCE = 5000
"""Milliseconds for which a call waits for another program's lock on the database."""

_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA secure_delete = ON",  # what is deleted is not to be found in the file's free pages
    "PRAGMA cache_size = -512",  # KiB: a call touches a few pages, and the system caches the file
)


class StoreError(Exception):
    """The state cannot be read or written; the text is a sentence that says why."""


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Do all of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have rolled back already
            connection.execute("ROLLBACK")
        raise


def damaged(named: str, finding: str) -> StoreError:
    """The error that says what to do about a file that is no sound database."""
    return StoreError(
        f"{named} is damaged or not a database ({finding}). Move it away, or set "
        "STATE_PATH to another directory: a new one is made at the next start."
    )


def prepare(connection: sqlite3.Connection, named: str) -> None:
    """
    Check a database that was just opened, and bring it up to date.

    @param named: what errors call the database.
    @raise StoreError: it is damaged, or of a newer version.
    @raise sqlite3.Error: it cannot be used, for instance not be written.
    """
    connection.execute(f"PRAGMA busy_timeout = {PATIENCE}")
    _check_version(connection, named)  # first: a newer database is left exactly as it is
    finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        raise damaged(named, finding)
    for pragma in _PRAGMAS:
        connection.execute(pragma)
    # Also when there is nothing to migrate: this is how an unwritable database shows now.
    with transaction(connection):
        for migration in _MIGRATIONS[_check_version(connection, named) :]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _check_version(connection: sqlite3.Connection, named: str) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version < 0:
        raise damaged(named, f"version {version}")
    if version > VERSION:
        raise StoreError(
            f"{named} has version {version}, newer than version {VERSION} "
            "which this program knows. Upgrade claude-code-proxy, or set STATE_PATH to "
            "another directory."
        )
    return version

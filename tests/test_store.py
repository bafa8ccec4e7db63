"""What the store remembers, and what it says when it cannot."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.interfaces import IReactorFromThreads

from claude_proxy.sessions import schema
from claude_proxy.sessions.records import encoded
from claude_proxy.sessions.store import Place, SessionRecord, Store, StoreError
from tests.support import in_reactor

REACTOR = cast(IReactorFromThreads, reactor)

A, B, C, D = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "abcd")

RECORD = SessionRecord(
    id=A,
    cli_id=A,
    workspace="project",
    tenant="alice",
    begun=False,
    parameters={"allowed-tools": ["Bash(git *)"], "deep": {"größe": 1.5, "none": None}},
    created=1000.25,
    used=1001.5,
)


async def opened(path: Path | None = None) -> Store:
    store = Store(path, REACTOR)
    await store.open()
    return store


async def failure_of(answer: Awaitable[object]) -> str:
    with pytest.raises(StoreError) as caught:
        await answer
    return str(caught.value)


@in_reactor
@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        replace(RECORD, workspace=None),
        replace(RECORD, begun=True),
        replace(RECORD, parameters={}),
        replace(RECORD, cli_id=B),
        replace(RECORD, tenant="'; DROP TABLE sessions; --\n\0"),
    ],
)
async def test_a_session_comes_back_as_it_was_given(record: SessionRecord) -> None:
    store = await opened()
    await store.create(record)
    assert await store.find(A) == record
    assert await store.find(record.cli_id) == record
    await store.close()


@in_reactor
async def test_what_nobody_waits_for_is_written_later_and_in_order() -> None:
    put_off: list[Callable[[], None]] = []
    store = Store(None, REACTOR, later=put_off.append)
    await store.open()
    created, begun = store.create(RECORD), store.begin(A, B, 2000.0)
    assert len(put_off) == 1
    assert (created.called, begun.called) == (False, False)
    put_off.pop()()
    await begun
    assert created.called
    # Whoever asks for something finds all that was to be written before.
    finished = store.finish_turn(A, 3000.0, 0.25, "success", {})
    found = await store.find(B)
    assert found is not None
    assert (finished.called, found.turns) == (True, 1)
    put_off.pop()()  # it has nothing left to do
    closed = store.set_tip(A, "tip", None)
    await store.close()
    assert closed.called
    assert len(put_off) == 1


@in_reactor
async def test_what_fails_among_others_fails_alone() -> None:
    put_off: list[Callable[[], None]] = []
    store = Store(None, REACTOR, later=put_off.append)
    await store.open()
    store.create(RECORD)
    failing = failure_of(store.begin(C, C, 2000.0))
    begun = store.begin(A, B, 2000.0)
    put_off.pop()()
    assert "session" in await failing
    await begun
    await store.close()


@in_reactor
async def test_an_unknown_session_is_not_found() -> None:
    store = await opened()
    await store.create(RECORD)
    assert await store.find(B) is None
    await store.close()


@in_reactor
async def test_every_id_that_a_session_ever_had_finds_it() -> None:
    store = await opened()
    await store.create(RECORD)
    await store.begin(A, A, 2000.0)
    assert await store.find(A) == replace(RECORD, begun=True, used=2000.0)
    await store.begin(A, B, 2001.0)
    await store.begin(B, C, 2002.0)
    await store.begin(A, B, 2003.0)
    expected = replace(RECORD, begun=True, cli_id=B, used=2003.0)
    assert [await store.find(name) for name in (A, B, C)] == [expected] * 3
    await store.close()


@in_reactor
async def test_a_finished_turn_is_counted_and_leaves_its_parameters() -> None:
    store = await opened()
    await store.create(RECORD)
    await store.begin(A, B, 2000.0)
    await store.finish_turn(B, 3000.0, 0.25, "success", {"permission-mode": "plan"})
    known = replace(RECORD, begun=True, cli_id=B, parameters={"permission-mode": "plan"})
    assert await store.find(A) == replace(known, used=3000.0, turns=1, cost=0.25, outcome="success")
    await store.finish_turn(A, 4000.0, 0.5, "cli_failed", {})
    assert await store.find(A) == replace(
        known, used=4000.0, turns=2, cost=0.75, outcome="cli_failed", parameters={}
    )
    await store.close()


@in_reactor
@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf, -1.0])
async def test_what_is_no_amount_costs_nothing(cost: float) -> None:
    store = await opened()
    await store.create(RECORD)
    await store.finish_turn(A, 3000.0, 0.25, "success", {})
    await store.finish_turn(A, 3000.0, cost, "success", {})
    found = await store.find(A)
    assert found is not None
    assert (found.turns, found.cost) == (2, 0.25)
    await store.close()


@in_reactor
async def test_a_list_has_the_tenants_sessions_newest_first_page_by_page() -> None:
    store = await opened()
    ids = [f"{number:02}" for number in range(10)]
    for name in ids:  # some are made at the same moment
        await store.create(replace(RECORD, id=name, cli_id=name, created=float(int(name) // 3)))
    await store.create(replace(RECORD, id=D, cli_id=D, tenant="bob"))
    await store.finish_turn("00", 9000.0, 0.0, "success", {})  # changes nothing in the order
    listed: list[str] = []
    place: Place | None = None
    while page := await store.page("alice", 4, place):
        assert len(page) <= 4
        listed += [record.id for record in page]
        place = Place(page[-1].created, page[-1].id)
        await store.delete(page[-1].id, "alice")  # a place is one, whatever becomes of it
        await store.create(replace(RECORD, id=f"new {place}", cli_id=f"new {place}"))
    assert listed == ids[::-1]
    [record] = await store.page("bob", 4)
    assert record == replace(RECORD, id=D, cli_id=D, tenant="bob")
    assert await store.page("nobody", 4) == []
    await store.close()


@in_reactor
async def test_a_deleted_session_is_forgotten_by_all_its_ids_and_known_as_deleted() -> None:
    store = await opened()
    await store.create(RECORD)
    await store.begin(A, B, 2000.0)
    await store.set_tip(A, "tip", "chat")
    assert await store.delete(A, "mallory") is None
    assert await store.delete(C, "alice") is None
    taken = await store.delete(B, "alice")
    assert taken is not None
    assert (taken.id, taken.cli_id) == (A, B)
    assert await store.delete(A, "alice") is None
    assert [await store.find(name) for name in (A, B)] == [None, None]
    assert [await store.is_deleted(name) for name in (A, B, C)] == [True, True, False]
    assert await store.claim("alice", ("tip",), None) is None
    assert await store.page("alice", 10) == []
    assert await store.prune(9e9, 0) == 0
    assert await store.is_deleted(B)
    await store.close()


@in_reactor
async def test_what_comes_late_does_not_bring_a_deleted_session_back() -> None:
    store = await opened()
    await store.create(RECORD)
    await store.create(replace(RECORD, id=D, cli_id=D))
    await store.delete(A, "alice")
    await store.create(RECORD)
    await store.begin(A, B, 2000.0)  # an old CLI goes on under a new id
    await store.begin(A, D, 2000.0)  # which is never that of another session
    await store.finish_turn(A, 2000.0, 1.0, "success", {})
    await store.set_tip(B, "tip", None)
    await store.unclaim(A, "tip")
    assert [await store.is_deleted(name) for name in (A, B, D)] == [True, True, False]
    assert [record.id for record in await store.page("alice", 10)] == [D]
    for taken in (A, B):
        assert "belongs to another session" in await failure_of(store.begin(D, taken, 2001.0))
        late = replace(RECORD, id=C, cli_id=taken)
        assert "belongs to another session" in await failure_of(store.create(late))
    await store.close()


@in_reactor
async def test_nothing_of_a_deleted_session_is_left_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    await store.create(replace(RECORD, workspace="the-workspace", parameters={"key": "of-mine"}))
    await store.set_tip(A, "the-tip", "the-conversation")
    await store.delete(A, "alice")
    await store.close()
    content = path.read_bytes()
    assert A.encode() in content
    for wiped in (b"the-workspace", b"of-mine", b"the-tip", b"the-conversation", b"alice"):
        assert wiped not in content


@in_reactor
async def test_creating_again_replaces_all_but_the_time_of_creation() -> None:
    store = await opened()
    await store.create(RECORD)
    again = replace(RECORD, cli_id=B, workspace=None, begun=True, parameters={}, used=9.0)
    await store.create(replace(again, created=5.0))
    assert await store.find(B) == again
    await store.close()


@in_reactor
@pytest.mark.parametrize(
    "taken",
    [
        pytest.param(replace(RECORD, tenant="mallory"), id="the id of another tenant's session"),
        pytest.param(replace(RECORD, id=B, tenant="mallory"), id="an alias of it"),
        pytest.param(replace(RECORD, id=B), id="an alias of the same tenant's session"),
        pytest.param(replace(RECORD, id=C, cli_id=A), id="a new session resumed as another"),
        pytest.param(replace(RECORD, id=C, cli_id=B), id="a new session resumed by an alias"),
    ],
)
async def test_no_session_takes_the_id_of_another(taken: SessionRecord) -> None:
    store = await opened()
    await store.create(RECORD)
    await store.begin(A, B, 2000.0)
    assert "belongs to another session" in await failure_of(store.create(taken))
    mine = replace(RECORD, begun=True, cli_id=B, used=2000.0)
    assert [await store.find(name) for name in (A, B, C)] == [mine, mine, None]
    await store.close()


@in_reactor
async def test_the_cli_cannot_move_an_id_from_one_session_to_another() -> None:
    store = await opened()
    other = replace(RECORD, id=C, cli_id=C, tenant="bob")
    await store.create(RECORD)
    await store.create(other)
    await store.begin(A, B, 2000.0)
    for taken in (A, B):
        assert "belongs to another session" in await failure_of(store.begin(C, taken, 2001.0))
    assert await store.find(C) == other
    await store.close()


@in_reactor
@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.begin(D, D, 1.0),
        lambda store: store.finish_turn(D, 1.0, 0.0, "success", {}),
        lambda store: store.set_tip(D, "tip", None),
    ],
)
async def test_changing_an_unknown_session_says_so(
    change: Callable[[Store], Deferred[None]],
) -> None:
    store = await opened()
    assert await failure_of(change(store)) == f"There is no session {D}."
    assert await store.find(D) is None
    await store.close()


@in_reactor
async def test_parameters_are_taken_as_they_are_at_the_call() -> None:
    store = await opened()
    parameters: dict[str, object] = {"model": "one"}
    creating = store.create(replace(RECORD, parameters=parameters))
    parameters["model"] = "two"
    await creating
    found = await store.find(A)
    assert found is not None
    assert found.parameters == {"model": "one"}
    await store.close()


@in_reactor
@pytest.mark.parametrize("value", [object(), "\ud800", {1j: 1}])
async def test_parameters_that_are_not_json_are_refused(value: object) -> None:
    store = await opened()
    await store.create(RECORD)
    bad = {"key": value}
    assert "not JSON" in await failure_of(store.create(replace(RECORD, parameters=bad)))
    assert "not JSON" in await failure_of(store.finish_turn(A, 1.0, 0.0, "success", bad))
    assert await store.find(A) == RECORD
    await store.close()


@in_reactor
async def test_an_id_that_is_no_text_is_an_error_and_the_store_lives_on() -> None:
    store = await opened()
    assert "cannot hold" in await failure_of(store.find("\ud800"))
    await store.create(RECORD)
    assert await store.find(A) == RECORD
    await store.close()


@in_reactor
async def test_of_two_claims_at_once_one_gets_the_session() -> None:
    store = await opened()
    await store.create(RECORD)
    await store.begin(A, A, 2000.0)
    await store.set_tip(A, "tip", "chat")
    claims = [store.claim("alice", ("tip", "other"), "chat") for _ in range(5)]
    first, *others = await gatherResults(claims)
    assert first == replace(
        RECORD, begun=True, used=2000.0, tip="", claimed="tip", conversation="chat"
    )
    assert others == [None] * 4
    await store.unclaim(A, "tip")
    again = await store.claim("alice", ("tip",), None, workspace="project", hinted=A)
    assert again == first
    await store.close()


@in_reactor
async def test_a_tip_is_found_after_a_restart_and_what_was_claimed_stays_claimed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    for session in (A, B):
        await store.create(replace(RECORD, id=session, cli_id=session))
        await store.begin(session, session, 2000.0)
        await store.set_tip(session, f"tip of {session}", None)
    await store.claim("alice", (f"tip of {A}",), None)
    await store.close()
    again = await opened(path)
    assert await again.claim("alice", (f"tip of {A}",), None) is None
    taken = await again.claim("alice", (f"tip of {B}",), None)
    assert taken is not None
    assert taken.id == B
    await again.close()


@in_reactor
async def test_pruning_tells_how_many_sessions_are_forgotten() -> None:
    store = await opened()
    await store.create(RECORD)
    assert await store.prune(RECORD.used, 1) == 0
    assert await store.prune(RECORD.used + 1, 1) == 1
    assert await store.find(A) is None
    await store.close()


def test_parameters_do_not_show_in_the_repr() -> None:
    assert "Bash" not in repr(RECORD)


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
    )
)
def test_any_parameters_are_encoded_or_refused(parameters: dict[str, object]) -> None:
    try:
        assert encoded(parameters).startswith("{")
    except StoreError as error:
        assert "not JSON" in str(error)  # noqa: PT017  # either is right, nothing else is


@in_reactor
async def test_a_closed_store_is_found_again_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state" / "state.db"
    store = await opened(path)
    await store.create(RECORD)
    await store.begin(A, B, 2000.0)
    await store.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["state.db"]  # checkpointed
    again = await opened(path)
    assert await again.find(B) == replace(RECORD, begun=True, cli_id=B, used=2000.0)
    await again.close()


@in_reactor
async def test_directory_and_files_are_for_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "state.db"
    old = os.umask(0)
    try:
        store = await opened(path)
        await store.create(RECORD)
    finally:
        os.umask(old)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    await store.close()


@in_reactor
async def test_a_database_that_was_readable_for_all_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.touch()
    path.chmod(0o644)
    store = await opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    await store.close()


WRITES_AND_DIES = """
import os, sys
from pathlib import Path
from twisted.internet import reactor
from claude_proxy.sessions.store import Place, SessionRecord, Store

async def main():
    store = Store(Path(sys.argv[1]), reactor)
    await store.open()
    await store.create(SessionRecord("a", "a", None, "alice", False, {}, 1.0, 1.0))
    await store.begin("a", "b", 2.0)
    os._exit(7)

from twisted.internet.defer import Deferred
Deferred.fromCoroutine(main())
reactor.run()
"""

NEVER_RUNS_ITS_REACTOR = """
import sys
from pathlib import Path
from twisted.internet import reactor
from claude_proxy.sessions.store import Store
Store(Path(sys.argv[1]), reactor).open()
"""


def run(script: str, path: Path) -> int:
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], check=False, timeout=60
    ).returncode


@in_reactor
async def test_what_was_answered_survives_the_death_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    assert run(WRITES_AND_DIES, path) == 7
    assert path.with_name("state.db-wal").stat().st_size > 0
    store = await opened(path)
    assert await store.find("b") == SessionRecord("a", "b", None, "alice", True, {}, 1.0, 2.0)
    await store.close()


def test_a_start_that_fails_elsewhere_does_not_leave_the_process_hanging(tmp_path: Path) -> None:
    assert run(NEVER_RUNS_ITS_REACTOR, tmp_path / "state.db") == 0


WRITES_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from claude_proxy.sessions.store import SessionRecord, Store

async def main():
    run = sys.argv[2]
    store = Store(Path(sys.argv[1]), reactor)
    await store.open()
    for number in count():
        name = f"{run}-{number}"
        writing = [
            store.create(SessionRecord(name, name, None, "alice", False, {}, number, number)),
            store.begin(name, f"{name}-alias", number),
            store.finish_turn(name, number, 0.25, "success", {"run": run, "padding": "x" * 2000}),
            store.set_tip(name, f"tip of {name}", "chat"),
        ]
        if number % 3 == 0:
            writing.append(store.delete(name, "alice"))
        for done in writing:
            await done
        print(number, flush=True)

Deferred.fromCoroutine(main()).addErrback(lambda failure: failure.printTraceback())
reactor.run()
"""


def last_before_the_kill(path: Path, run: int, least: int) -> int:
    """Kill a process that writes, some time after it has written so much; its last word."""
    argv = [sys.executable, "-c", WRITES_FOR_EVER, str(path), str(run)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(least):
            assert writer.stdout.readline()
        last = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        last = max([last, *map(int, writer.stdout.read().split())])
    assert writer.returncode == -signal.SIGKILL
    return last


@in_reactor
async def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    acknowledged: list[tuple[int, int]] = []
    for run, least in enumerate((0, 7, 23, 61, 118)):
        last = last_before_the_kill(path, run, least)
        acknowledged += [(run, number) for number in range(last + 1)]
    store = await opened(path)
    for pragma, sound in (("quick_check", "ok"), ("foreign_key_check", None)):
        row = await store._ask(lambda db, p=pragma: db.execute(f"PRAGMA {p}").fetchone())  # type: ignore[misc]
        assert (row and row[0]) == sound
    for run, number in acknowledged:
        name = f"{run}-{number}"
        for known_as in (name, f"{name}-alias"):
            found = await store.find(known_as)
            assert await store.is_deleted(known_as) == (number % 3 == 0) == (found is None)
            if found is not None:
                assert (found.turns, found.cost, found.tip) == (1, 0.25, f"tip of {name}")
    for record in await store.page("alice", 10_000):  # those in the midst of it are whole as well
        assert record.cost == 0.25 * record.turns
        assert ("padding" in record.parameters) == (record.turns == 1)
    await store.close()


def database(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@in_reactor
async def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    sentence = await failure_of(Store(path, REACTOR).open())
    assert "version 99, newer than version 4 " in sentence
    assert str(path) in sentence
    assert path.read_bytes() == before


def older(path: Path, version: int) -> None:
    """Make the database that a program of this version left, with a session in it."""
    steps = [statement for step in schema._MIGRATIONS[:version] for statement in step]
    columns = "id, cli_id, workspace, tenant, state, parameters, created, used"
    row = (
        f"INSERT INTO sessions ({columns}) VALUES ('{A}', '{B}', 'w', 'bob', 'begun', '{{}}', 1, 2)"
    )
    alias = f"INSERT INTO aliases VALUES ('{B}', '{A}')"
    database(path, *steps, row, alias, f"PRAGMA user_version = {version}")


@in_reactor
@pytest.mark.parametrize("version", range(1, schema.VERSION))
async def test_an_older_database_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "state.db"
    older(path, version)
    store = await opened(path)
    record = SessionRecord(A, B, "w", "bob", True, {}, 1.0, 2.0)
    assert await store.find(B) == record
    await store.finish_turn(B, 3.0, 0.5, "success", {})
    finished = replace(record, used=3.0, turns=1, cost=0.5, outcome="success")
    assert await store.page("bob", 10) == [finished]
    await store.finish_own_turn(B, 0.25)
    await store.finish_own_turn(A, float("nan"))
    assert await store.find(A) == replace(finished, cost=0.75, own_turns=2)
    await store.close()


@in_reactor
async def test_a_migration_is_done_wholly_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.db"
    older(path, schema.VERSION - 1)
    *before, last = schema._MIGRATIONS
    monkeypatch.setattr(schema, "_MIGRATIONS", (*before, (*last, "SELECT the impossible")))
    assert "no such column" in await failure_of(Store(path, REACTOR).open())
    monkeypatch.undo()
    store = await opened(path)
    assert await store.find(B) == SessionRecord(A, B, "w", "bob", True, {}, 1.0, 2.0)
    await store.close()


@in_reactor
async def test_a_database_without_a_sensible_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database(path, "PRAGMA user_version = -1")
    assert "damaged or not a database" in await failure_of(Store(path, REACTOR).open())


@in_reactor
async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("this is the diary of a cat\n" * 100)
    sentence = await failure_of(Store(path, REACTOR).open())
    assert "damaged or not a database" in sentence
    assert "cat" not in sentence
    assert path.read_text().startswith("this is the diary")


@in_reactor
async def test_a_page_of_rubbish_is_noticed_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    for number in range(200):
        await store.create(replace(RECORD, id=f"{number}", cli_id=f"{number}"))
    await store.close()
    content = bytearray(path.read_bytes())
    content[8192:12288] = b"\xa5" * 4096
    path.write_bytes(content)
    assert "damaged or not a database" in await failure_of(Store(path, REACTOR).open())


@in_reactor
async def test_a_record_spoilt_by_hand_is_an_error_that_does_not_show_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    await store.create(RECORD)
    for spoilt in ("'{secret'", "'[1]'", "CAST(x'736563726574ff' AS TEXT)"):
        database(path, f"UPDATE sessions SET parameters = {spoilt}")
        sentence = await failure_of(store.find(A))
        assert "The state database" in sentence
        assert "secret" not in sentence
    await store.close()


@in_reactor
async def test_a_file_in_the_way_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "state.db"
    sentence = await failure_of(Store(path, REACTOR).open())
    assert f"The state database {path} cannot be made:" in sentence


@in_reactor
async def test_a_directory_in_the_way_of_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.mkdir(mode=0o750)
    assert "unable to open" in await failure_of(Store(path, REACTOR).open())
    assert path.stat().st_mode & 0o777 == 0o750


@in_reactor
async def test_an_unwritable_database_is_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    await store.close()
    connect = sqlite3.connect

    def read_only(path: Path, **options: object) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    assert "readonly database" in await failure_of(Store(path, REACTOR).open())


@in_reactor
async def test_without_a_thread_the_store_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert "can't start new thread" in await failure_of(Store(None, REACTOR).open())


@in_reactor
async def test_the_settings_of_the_database_are_as_meant(tmp_path: Path) -> None:
    store = await opened(tmp_path / "state.db")
    names = (
        "journal_mode",
        "synchronous",
        "busy_timeout",
        "foreign_keys",
        "secure_delete",
        "cache_size",
        "user_version",
    )
    values = await store._ask(
        lambda db: [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
    )
    assert values == ["wal", 1, 5000, 1, 1, -512, 4]
    await store.close()


@in_reactor
async def test_all_work_is_done_in_order_by_one_thread_that_ends() -> None:
    store = await opened()
    seen: list[int] = []

    def work(number: int, _: sqlite3.Connection) -> threading.Thread:
        seen.append(number)
        return threading.current_thread()

    threads = await gatherResults([store._ask(partial(work, number)) for number in range(50)])
    assert seen == list(range(50))
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    assert threads[0].is_alive()
    await store.close()
    assert not threads[0].is_alive()


@in_reactor
async def test_closing_finishes_what_is_queued_and_may_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    creating, first, second = store.create(RECORD), store.close(), store.close()
    await gatherResults([creating, first, second])
    await store.close()
    again = await opened(path)
    assert await again.find(A) == RECORD
    await again.close()


@in_reactor
async def test_closing_does_not_fail_where_the_journal_cannot_be_emptied(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    await store.create(RECORD)
    denied = sqlite3.SQLITE_DENY
    await store._ask(lambda db: db.set_authorizer(lambda *_: denied))
    await store.close()
    again = await opened(path)
    assert await again.find(A) == RECORD
    await again.close()


@in_reactor
async def test_a_closed_or_never_opened_store_answers_nothing() -> None:
    fresh, closed = Store(None, REACTOR), await opened()
    await closed.close()
    for store in (fresh, closed):
        calls: list[Awaitable[object]] = [
            store.find(A),
            store.create(RECORD),
            store.begin(A, A, 1.0),
            store.finish_turn(A, 1.0, 0.0, "success", {}),
            store.is_deleted(A),
            store.page("alice", 10),
            store.delete(A, "alice"),
            store.set_tip(A, "tip", None),
            store.claim("alice", ("tip",), None),
            store.unclaim(A, "tip"),
            store.prune(1.0, 1),
        ]
        for call in calls:
            assert await failure_of(call) == "The state store is not open."
    assert "opened before" in await failure_of(closed.open())
    await fresh.close()
    assert "opened before" in await failure_of(fresh.open())


@in_reactor
async def test_calls_behind_a_failed_open_fail_too(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("no database, but long enough to be looked at" * 100)
    store = Store(path, REACTOR)
    opening, finding = store.open(), store.find(A)
    assert "damaged" in await failure_of(opening)
    assert "could not be opened" in await failure_of(finding)
    assert await failure_of(store.find(A)) == "The state store is not open."


@in_reactor
async def test_too_many_waiting_calls_are_refused_until_some_are_done() -> None:
    store = Store(None, REACTOR, max_pending=3)
    await store.open()
    go = threading.Event()
    blocked = store._ask(lambda _: go.wait(60))
    waiting = [store.find(A), store.find(A)]
    assert "too many calls" in await failure_of(store.find(A))
    waiting[0].cancel()  # the thread has it still, so it counts still
    with pytest.raises(CancelledError):
        await waiting[0]
    assert "too many calls" in await failure_of(store.find(A))
    go.set()
    assert await blocked
    assert await waiting[1] is None
    assert await store.find(A) is None
    await store.close()


@in_reactor
async def test_a_database_locked_for_too_long_is_an_error_and_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PATIENCE", 300)
    path = tmp_path / "state.db"
    store = await opened(path)
    await store.create(RECORD)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    writes = [store.begin(A, A, 2000.0 + number) for number in range(50)]
    finding = store.find(A)
    for writing in writes:
        assert "database is locked" in await failure_of(writing)
    assert await finding == RECORD
    assert 0.3 <= time.monotonic() - began < 3  # fifty times the patience would be 15 seconds
    other.execute("ROLLBACK")
    await store.begin(A, B, 3000.0)
    assert await store.find(B) == replace(RECORD, begun=True, cli_id=B, used=3000.0)
    patience = await store._ask(lambda db: db.execute("PRAGMA busy_timeout").fetchone()[0])
    assert patience == 300
    other.close()
    await store.close()


def spoil(path: Path) -> None:
    """Overwrite all of a database but its first page."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


@in_reactor
async def test_a_database_that_is_spoilt_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await opened(path)
    padding = {"padding": "x" * 3000}
    for number in range(300):  # more than the cache holds
        name = f"{number}"
        await store.create(replace(RECORD, id=name, cli_id=name, parameters=padding))
    await store._ask(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)"))
    spoil(path)
    await store._ask(lambda db: db.execute("PRAGMA shrink_memory"))
    for answer in (
        store.find("1"),
        store.create(RECORD),
        store.finish_turn("1", 1.0, 0.0, "success", {}),
        store.page("alice", 1000),
        store.delete("1", "alice"),
    ):
        sentence = await failure_of(answer)
        assert "damaged or not a database" in sentence
        assert str(path) in sentence
    await store.close()  # does not fail


@in_reactor
@pytest.mark.parametrize(
    ("broken", "mended", "said"),
    [
        pytest.param("query_only = ON", "query_only = OFF", "readonly database", id="read-only"),
        pytest.param("max_page_count = 1", "max_page_count = 9999", "is full", id="a full disk"),
    ],
)
async def test_a_database_that_cannot_be_written_for_a_while_works_again_afterwards(
    tmp_path: Path, broken: str, mended: str, said: str
) -> None:
    store = await opened(tmp_path / "state.db")
    await store.create(RECORD)
    await store._ask(lambda db: db.execute(f"PRAGMA {broken}"))
    large = {"padding": "x" * 10_000}
    for writing in (
        store.create(replace(RECORD, id=B, cli_id=B, parameters=large)),
        store.finish_turn(A, 2000.0, 1.0, "success", large),
    ):
        assert said in await failure_of(writing)
    assert await store.find(A) == RECORD
    assert await store.find(B) is None
    await store._ask(lambda db: db.execute(f"PRAGMA {mended}"))
    await store.finish_turn(A, 2000.0, 1.0, "success", large)
    found = await store.find(A)
    assert found is not None
    assert (found.turns, found.cost) == (1, 1.0)
    await store.close()


def test_nothing_happens_before_open(tmp_path: Path) -> None:
    before = threading.active_count()
    Store(tmp_path / "state" / "state.db", REACTOR)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []

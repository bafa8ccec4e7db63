"""Which session a history means, and how long a session is remembered."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from claude_proxy.sessions import records, schema
from claude_proxy.sessions.records import SessionRecord


def database() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    schema.prepare(connection, "It")
    return connection


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = database()
    yield connection
    connection.close()


def add(
    db: sqlite3.Connection,
    name: str,
    tip: str | None = None,
    *,
    tenant: str = "alice",
    workspace: str | None = None,
    conversation: str | None = None,
    used: float = 1.0,
) -> None:
    records.create(db, SessionRecord(name, name, workspace, tenant, True, {}, 1.0, used), "{}")
    if tip is not None:
        records.set_tip(db, name, tip, conversation)


def claimed(
    db: sqlite3.Connection,
    *tips: str,
    tenant: str = "alice",
    conversation: str | None = None,
    workspace: str | None = None,
    hinted: str | None = None,
) -> str | None:
    found = records.claim(db, tenant, tips, conversation, workspace=workspace, hinted=hinted)
    return None if found is None else found.id


def found(db: sqlite3.Connection, name: str) -> SessionRecord:
    record = records.find(db, name)
    assert record is not None
    return record


def test_a_history_finds_the_session_that_ends_with_it_once(db: sqlite3.Connection) -> None:
    add(db, "a", "one", conversation="chat")
    add(db, "b", "two")
    taken = records.claim(db, "alice", ["zero", "one"], None, workspace=None, hinted=None)
    assert taken == SessionRecord("a", "a", None, "alice", True, {}, 1.0, 1.0, "", "one", "chat")
    assert claimed(db, "zero", "one") is None
    assert claimed(db, "two") == "b"


def test_no_history_finds_nothing_and_an_empty_one_no_session_without_tip(
    db: sqlite3.Connection,
) -> None:
    add(db, "a", "one")
    assert claimed(db) is None
    assert claimed(db, "one") == "a"
    assert claimed(db, "") is None


def test_a_history_never_finds_the_session_of_another_tenant(db: sqlite3.Connection) -> None:
    add(db, "a", "one", tenant="bob")
    assert claimed(db, "one") is None
    assert claimed(db, "one", hinted="a") is None
    assert claimed(db, "one", tenant="bob") == "a"


def test_a_session_that_never_began_has_nothing_to_continue(db: sqlite3.Connection) -> None:
    records.create(db, SessionRecord("a", "a", None, "alice", False, {}, 1.0, 1.0), "{}")
    records.set_tip(db, "a", "one", None)
    assert claimed(db, "one") is None


@pytest.mark.parametrize("names", [(None, None), ("x", "x"), ("y", "z")])
@pytest.mark.parametrize("asked", [None, "x"])
def test_sessions_that_nothing_tells_apart_are_not_continued(
    db: sqlite3.Connection, names: tuple[str | None, str | None], asked: str | None
) -> None:
    for name, conversation in zip("ab", names, strict=True):
        add(db, name, "one", conversation=conversation)
    assert claimed(db, "one", conversation=asked) is None
    assert [found(db, name).tip for name in "ab"] == ["one", "one"]


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [("x", "of x"), ("y", "of y"), (None, "of nobody"), ("z", "of nobody")],
)
def test_of_several_sessions_the_name_of_the_conversation_decides(
    db: sqlite3.Connection, conversation: str | None, expected: str
) -> None:
    add(db, "of x", "one", conversation="x")
    add(db, "of y", "one", conversation="y")
    add(db, "of nobody", "one")
    assert claimed(db, "one", conversation=conversation) == expected


def test_a_conversation_never_continues_that_of_another_name(db: sqlite3.Connection) -> None:
    add(db, "a", "one", conversation="x")
    assert claimed(db, "one", conversation="y") is None
    assert claimed(db, "one", conversation="y", hinted="a") is None
    assert claimed(db, "one") == "a"  # a client that gives no name may mean any


@pytest.mark.parametrize("hinted", ["b", "once b"])
def test_of_several_sessions_the_one_that_was_shown_is_meant(
    db: sqlite3.Connection, hinted: str
) -> None:
    for name in "abc":
        add(db, name, "one", conversation="x")
    records.begin(db, "b", "once b", 2.0)
    records.set_tip(db, "b", "one", None)
    assert claimed(db, "one", conversation="x", hinted="unknown") is None
    assert claimed(db, "one", conversation="x", hinted=hinted) == "b"


def test_a_named_workspace_finds_only_its_own_sessions(db: sqlite3.Connection) -> None:
    add(db, "a", "one", workspace="w")
    add(db, "b", "two")
    assert claimed(db, "one", workspace="v") is None
    assert claimed(db, "two", workspace="v") is None
    assert claimed(db, "two") == "b"
    assert claimed(db, "one", workspace="w") == "a"


def test_what_the_cli_takes_up_loses_its_tip(db: sqlite3.Connection) -> None:
    add(db, "a", "one")
    records.begin(db, "a", "a", 2.0)
    assert claimed(db, "one") is None
    assert found(db, "a").tip == ""


def test_a_session_that_is_written_down_anew_loses_its_tip(db: sqlite3.Connection) -> None:
    add(db, "a", "one")
    add(db, "a")
    assert claimed(db, "one") is None


def test_a_session_that_never_had_a_tip_is_told_from_one_that_lost_it(
    db: sqlite3.Connection,
) -> None:
    add(db, "a")
    records.begin(db, "a", "b", 2.0)
    assert found(db, "a").tip is None
    add(db, "a")
    assert found(db, "a").tip is None


def test_a_claim_that_came_to_nothing_is_given_back_once(db: sqlite3.Connection) -> None:
    add(db, "a", "one")
    assert claimed(db, "one") == "a"
    records.unclaim(db, "a", "one")
    records.unclaim(db, "a", "one")
    records.unclaim(db, "unknown", "one")
    assert (found(db, "a").tip, found(db, "a").claimed) == ("one", None)
    assert claimed(db, "one") == "a"


@pytest.mark.parametrize("tip", [None, "two"])
def test_a_claim_is_not_given_back_when_the_session_has_moved_on(
    db: sqlite3.Connection, tip: str | None
) -> None:
    add(db, "a", "one")
    assert claimed(db, "one") == "a"
    records.begin(db, "a", "a", 2.0)
    if tip is not None:
        records.set_tip(db, "a", tip, None)
    records.unclaim(db, "a", "one")
    assert claimed(db, "one") is None
    assert found(db, "a").tip == (tip or "")


def test_a_conversation_keeps_its_name_until_it_gets_another(db: sqlite3.Connection) -> None:
    add(db, "a", "one", conversation="x")
    records.set_tip(db, "a", "two", None)
    assert found(db, "a").conversation == "x"
    records.set_tip(db, "a", "three", "y")
    assert found(db, "a").conversation == "y"


def test_what_is_old_or_too_much_is_forgotten_with_all_its_ids(db: sqlite3.Connection) -> None:
    for number in range(10):
        add(db, f"{number}", f"tip {number}", used=float(number))
        records.begin(db, f"{number}", f"alias {number}", float(number))
    assert records.prune(db, 3.0, 100) == 3
    assert records.prune(db, 0.0, 5) == 2
    left = [number for number in range(10) if records.find(db, f"{number}") is not None]
    assert left == [5, 6, 7, 8, 9]
    assert db.execute("SELECT count(*) FROM aliases").fetchone() == (5,)
    assert records.prune(db, 0.0, 5) == 0
    assert records.prune(db, 0.0, 0) == 5
    assert db.execute("SELECT count(*) FROM aliases").fetchone() == (0,)


def test_a_long_list_is_paged_without_being_sorted_or_walked_through(
    db: sqlite3.Connection,
) -> None:
    given = {"tenant": "alice", "limit": 10, "created": 1.0, "id": "a"}
    plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {records._PAGE}", given))
    assert "USING INDEX sessions_by_creation (tenant=? AND (created,id)<(?,?))" in plan
    assert "TEMP B-TREE" not in plan


NAMES = st.sampled_from("abcdef")
TIPS = st.sampled_from(["one", "two"])
MAYBE = st.sampled_from([None, "x", "y"])


class Conversations(RuleBasedStateMachine):
    """Sessions come, move on and are claimed in any order, beside a plain model of them."""

    def __init__(self) -> None:
        super().__init__()
        self.db = database()
        self.model: dict[str, SessionRecord] = {}
        self.deleted: set[str] = set()
        self.now = 0.0

    def teardown(self) -> None:
        self.db.close()

    def lose_tip(self, name: str, **changed: object) -> None:
        known = self.model[name]
        tip = None if known.tip is None else ""
        self.model[name] = replace(known, tip=tip, claimed=None, **changed)  # type: ignore[arg-type]

    @rule(name=NAMES, workspace=MAYBE, tenant=st.sampled_from(["alice", "bob"]))
    def create(self, name: str, workspace: str | None, tenant: str) -> None:
        if name in self.model:
            return
        self.now += 1
        record = SessionRecord(name, name, workspace, tenant, False, {}, self.now, self.now)
        records.create(self.db, record, "{}")
        if name not in self.deleted:
            self.model[name] = record

    @precondition(lambda self: self.deleted)
    @rule(data=st.data(), tip=TIPS)
    def come_late(self, data: st.DataObject, tip: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.deleted)))
        records.begin(self.db, name, name, self.now)
        records.set_tip(self.db, name, tip, None)
        records.finish_turn(self.db, name, self.now, 1.0, "success", parameters="{}")

    @rule(name=NAMES, tenant=st.sampled_from(["alice", "bob"]))
    def delete(self, name: str, tenant: str) -> None:
        known = self.model.get(name)
        expected = known if known is not None and known.tenant == tenant else None
        assert records.delete(self.db, name, tenant) == expected
        if expected is not None:
            del self.model[name]
            self.deleted.add(name)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), cost=st.sampled_from([0.25, 1.5]))
    def finish_turn(self, data: st.DataObject, cost: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.now += 1
        records.finish_turn(self.db, name, self.now, cost, "success", parameters="{}")
        known = self.model[name]
        self.model[name] = replace(
            known,
            used=self.now,
            turns=known.turns + 1,
            cost=known.cost + cost,
            outcome="success",
        )

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.now += 1
        records.begin(self.db, name, name, self.now)
        self.lose_tip(name, begun=True, used=self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tip=TIPS, conversation=MAYBE)
    def set_tip(self, data: st.DataObject, tip: str, conversation: str | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        records.set_tip(self.db, name, tip, conversation)
        known = self.model[name]
        self.model[name] = replace(
            known, tip=tip, claimed=None, conversation=conversation or known.conversation
        )

    @rule(
        tenant=st.sampled_from(["alice", "bob"]),
        tips=st.sets(TIPS),
        conversation=MAYBE,
        workspace=MAYBE,
        hinted=st.none() | NAMES,
    )
    def claim(
        self,
        tenant: str,
        tips: set[str],
        conversation: str | None,
        workspace: str | None,
        hinted: str | None,
    ) -> None:
        taken = claimed(
            self.db,
            *tips,
            tenant=tenant,
            conversation=conversation,
            workspace=workspace,
            hinted=hinted,
        )
        possible = {
            name: known
            for name, known in self.model.items()
            if known.tenant == tenant
            and known.begun
            and known.tip in tips
            and (workspace is None or known.workspace == workspace)
            and (conversation is None or known.conversation in {None, conversation})
        }
        if len(possible) > 1 and hinted in possible:
            possible = {hinted: possible[hinted]}
        if len(possible) > 1:
            possible = {n: p for n, p in possible.items() if p.conversation == conversation}
        expected = next(iter(possible)) if len(possible) == 1 else None
        assert taken == expected
        if expected is not None:
            known = self.model[expected]
            self.model[expected] = replace(known, tip="", claimed=known.tip)

    @rule(name=NAMES, tip=TIPS)
    def unclaim(self, name: str, tip: str) -> None:
        records.unclaim(self.db, name, tip)
        known = self.model.get(name)
        if known is not None and known.claimed == tip:
            self.model[name] = replace(known, tip=tip, claimed=None)

    @rule(age=st.integers(0, 20), keep=st.integers(3, 6))
    def prune(self, age: int, keep: int) -> None:
        before = self.now - age
        count = records.prune(self.db, before, keep)
        newest = sorted(self.model, key=lambda name: self.model[name].used)[-keep:]
        left = {n: self.model[n] for n in newest if self.model[n].used >= before}
        assert count == len(self.model) - len(left)
        self.model = left

    @invariant()
    def both_remember_the_same(self) -> None:
        remembered = {name: records.find(self.db, name) for name in "abcdef"}
        assert {n: r for n, r in remembered.items() if r is not None} == self.model
        assert {n for n in "abcdef" if records.is_deleted(self.db, n)} == self.deleted

    @invariant()
    def both_list_the_same(self) -> None:
        for tenant in ("alice", "bob"):
            mine = [record for record in self.model.values() if record.tenant == tenant]
            newest_first = sorted(mine, key=lambda r: (r.created, r.id), reverse=True)
            place, listed = None, []
            while page := records.page(self.db, tenant, 2, place):
                listed += page
                place = records.Place(page[-1].created, page[-1].id)
            assert listed == newest_first


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)

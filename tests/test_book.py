"""Which session a request means, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest
from twisted.logger import LogEvent, capturedLogs

from claude_proxy.cli.command import SessionStart, StartKind
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.book import Plan, SessionBook
from claude_proxy.sessions.store import SessionRecord, Store
from claude_proxy.sessions.turns import TurnRequest
from tests.support import inline_store, result_of

OLD = capabilities_of("1.0.24")
NEW = capabilities_of("2.1.197")

ASK = TurnRequest(content="x", tenant="alice", request_id="r", received=0.0)


class Fixture:
    """A book with ids and times that can be foretold: new-1, new-2, ... at 1000."""

    def __init__(self, *, adopt_unknown: bool = True) -> None:
        self.store: Store = inline_store()
        numbers = count(1)
        self.book = SessionBook(
            self.store,
            adopt_unknown=adopt_unknown,
            now=lambda: 1000.0,
            make_id=lambda: f"new-{next(numbers)}",
        )

    def resolve(self, request: TurnRequest, can: Capabilities = NEW) -> Plan:
        plan: Plan = result_of(self.book.resolve(request, can))
        return plan

    def refusal(self, request: TurnRequest, can: Capabilities = NEW) -> ProxyError:
        with pytest.raises(ProxyError) as caught:
            self.resolve(request, can)
        return caught.value

    def find(self, session: str) -> SessionRecord | None:
        record: SessionRecord | None = result_of(self.store.find(session))
        return record

    def turn(self, request: TurnRequest, cli_id: str, can: Capabilities = NEW) -> str:
        """Go through a whole turn; the id under which the session is kept."""
        plan = self.resolve(request, can)
        self.book.planned(plan, request)
        kept = self.book.begun(plan, request, cli_id)
        self.book.used(kept, request)
        return kept


@pytest.fixture
def logged() -> Iterator[Sequence[LogEvent]]:
    with capturedLogs() as events:
        yield events


def test_a_new_session_gets_its_id_from_us() -> None:
    fixture = Fixture()
    plan = fixture.resolve(replace(ASK, workspace="w"))
    assert plan == Plan("new-1", "new-1", SessionStart(StartKind.NEW, "new-1"), "w")


def test_a_new_session_is_written_down_before_it_begins() -> None:
    fixture = Fixture()
    request = replace(ASK, workspace="w", allowed_tools=("Bash",), skip_permissions=True)
    plan = fixture.resolve(request)
    fixture.book.planned(plan, request)
    record = fixture.find("new-1")
    assert record == SessionRecord(
        id="new-1",
        cli_id="new-1",
        workspace="w",
        tenant="alice",
        begun=False,
        parameters={"allowed-tools": ["Bash"], "dangerously-skip-permissions": True},
        created=1000.0,
        used=1000.0,
    )
    assert fixture.book.begun(plan, request, "new-1") == "new-1"
    assert fixture.find("new-1") == replace(record, begun=True)


def test_an_old_cli_names_the_session_itself() -> None:
    fixture = Fixture()
    plan = fixture.resolve(ASK, OLD)
    assert plan == Plan(None, "new-1", SessionStart(StartKind.NEW, None), None)
    fixture.book.planned(plan, ASK)
    assert fixture.find("new-1") is None
    assert fixture.book.begun(plan, ASK, "cli-a") == "cli-a"
    record = fixture.find("cli-a")
    assert record is not None
    assert record.begun


def test_a_known_session_is_resumed_in_its_workspace() -> None:
    fixture = Fixture()
    fixture.turn(replace(ASK, workspace="w"), "new-1")
    again = replace(ASK, session_id="new-1")
    expected = Plan(
        "new-1", "new-1", SessionStart(StartKind.RESUME, "new-1"), "w", record_id="new-1"
    )
    assert fixture.resolve(again) == expected
    assert fixture.resolve(replace(again, workspace="w")) == expected


def test_every_id_that_an_old_cli_gave_leads_to_the_latest_and_to_one_lease() -> None:
    fixture = Fixture()
    assert fixture.turn(ASK, "cli-a", OLD) == "cli-a"
    assert fixture.turn(replace(ASK, session_id="cli-a"), "cli-b", OLD) == "cli-a"
    assert fixture.turn(replace(ASK, session_id="cli-b"), "cli-c", OLD) == "cli-a"
    for name in ("cli-a", "cli-b", "cli-c"):
        plan = fixture.resolve(replace(ASK, session_id=name), OLD)
        assert plan.start == SessionStart(StartKind.RESUME, "cli-c")
        assert (plan.session_id, plan.lease_key) == ("cli-c", "cli-a")


def test_another_workspace_is_refused_and_its_own_is_named() -> None:
    fixture = Fixture()
    fixture.turn(replace(ASK, workspace="mine"), "new-1")
    error = fixture.refusal(replace(ASK, session_id="new-1", workspace="other"))
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, "workspace")
    assert "'mine'" in error.message


def test_a_session_of_the_shared_workspace_takes_no_named_one() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "new-1")
    error = fixture.refusal(replace(ASK, session_id="new-1", workspace="other"))
    assert "the shared workspace" in error.message


@pytest.mark.parametrize("adopt_unknown", [True, False])
def test_another_tenants_session_does_not_exist(adopt_unknown: bool) -> None:
    fixture = Fixture(adopt_unknown=adopt_unknown)
    fixture.turn(replace(ASK, workspace="secret"), "new-1")
    request = replace(ASK, tenant="bob", session_id="new-1", workspace="other")
    for fork in (False, True):
        error = fixture.refusal(replace(request, fork=fork))
        assert (error.failure, error.param) == (Failure.SESSION_NOT_FOUND, "session-id")
        assert "secret" not in error.message


def test_an_unknown_session_is_no_session_where_it_could_be_anybodys() -> None:
    error = Fixture(adopt_unknown=False).refusal(replace(ASK, session_id="foreign"))
    assert (error.failure, error.param) == (Failure.SESSION_NOT_FOUND, "session-id")


def test_an_unknown_session_is_tried_in_the_named_workspace_and_then_kept() -> None:
    fixture = Fixture()
    request = replace(ASK, session_id="foreign", workspace="w")
    plan = fixture.resolve(request)
    assert plan == Plan("foreign", "foreign", SessionStart(StartKind.RESUME, "foreign"), "w")
    fixture.book.planned(plan, request)
    assert fixture.find("foreign") is None
    assert fixture.book.begun(plan, request, "foreign") == "foreign"
    record = fixture.find("foreign")
    assert record is not None
    assert (record.begun, record.workspace) == (True, "w")


def test_an_adopted_session_keeps_its_name_when_an_old_cli_renames_it() -> None:
    fixture = Fixture()
    assert fixture.turn(replace(ASK, session_id="foreign"), "cli-b", OLD) == "foreign"
    for name in ("foreign", "cli-b"):
        plan = fixture.resolve(replace(ASK, session_id=name), OLD)
        assert (plan.lease_key, plan.start.session_id) == ("foreign", "cli-b")


def test_a_fork_is_a_new_session_that_copies_a_leased_one() -> None:
    fixture = Fixture()
    fixture.turn(replace(ASK, workspace="w"), "new-1")
    request = replace(ASK, session_id="new-1", fork=True)
    plan = fixture.resolve(request)
    start = SessionStart(StartKind.FORK, "new-2", source="new-1")
    assert plan == Plan("new-2", "new-2", start, "w", source_key="new-1")
    fixture.book.planned(plan, request)
    assert fixture.book.begun(plan, request, "new-2") == "new-2"
    copy, original = fixture.find("new-2"), fixture.find("new-1")
    assert copy is not None
    assert (copy.begun, copy.workspace, copy.cli_id) == (True, "w", "new-2")
    assert original is not None
    assert original.cli_id == "new-1"


def test_a_fork_by_an_old_cli_learns_its_name_and_leaves_the_source_alone() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "cli-a", OLD)
    request = replace(ASK, session_id="cli-a", fork=True)
    plan = fixture.resolve(request, OLD)
    assert plan.session_id is None
    assert plan.start == SessionStart(StartKind.FORK, None, source="cli-a")
    assert fixture.turn(request, "cli-f", OLD) == "cli-f"
    source, copy = fixture.find("cli-a"), fixture.find("cli-f")
    assert source is not None
    assert copy is not None
    assert (source.id, source.cli_id, copy.id) == ("cli-a", "cli-a", "cli-f")


def test_a_fork_of_an_unknown_session_copies_it_and_adopts_only_the_copy() -> None:
    fixture = Fixture()
    plan = fixture.resolve(replace(ASK, session_id="foreign", fork=True))
    assert (plan.source_key, plan.start.source) == ("foreign", "foreign")
    fixture.turn(replace(ASK, session_id="foreign", fork=True), "new-2")
    assert fixture.find("foreign") is None
    assert fixture.find("new-2") is not None


def unbegun(fixture: Fixture) -> None:
    request = replace(ASK, workspace="w")
    fixture.book.planned(fixture.resolve(request), request)


def test_a_session_that_never_began_is_begun_anew_under_its_id() -> None:
    fixture = Fixture()
    unbegun(fixture)
    request = replace(ASK, session_id="new-1")
    plan = fixture.resolve(request)
    assert plan == Plan(
        "new-1", "new-1", SessionStart(StartKind.NEW, "new-1"), "w", record_id="new-1"
    )
    assert fixture.turn(request, "new-1") == "new-1"
    record = fixture.find("new-1")
    assert record is not None
    assert record.begun


def test_there_is_nothing_to_copy_in_a_session_that_never_began() -> None:
    fixture = Fixture()
    unbegun(fixture)
    plan = fixture.resolve(replace(ASK, session_id="new-1", fork=True))
    start = SessionStart(StartKind.NEW, "new-2")
    assert plan == Plan("new-2", "new-2", start, "w", source_key="new-1")


def test_an_old_cli_begins_it_under_an_id_of_its_own() -> None:
    fixture = Fixture()
    unbegun(fixture)
    plan = fixture.resolve(replace(ASK, session_id="new-1"), OLD)
    assert plan == Plan(None, "new-2", SessionStart(StartKind.NEW, None), "w")


def test_a_turn_is_remembered_with_what_may_be_inherited_and_never_with_prompts() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "new-1")
    request = replace(
        ASK,
        session_id="new-1",
        allowed_tools=("Read",),
        disallowed_tools=("Bash",),
        mcp_tools=("mcp__a__b",),
        system_prompt="a secret of mine",
        append_system_prompt="another one",
    )
    fixture.book.used("new-1", request)
    record = fixture.find("new-1")
    assert record is not None
    assert record.parameters == {
        "allowed-tools": ["Read"],
        "disallowed-tools": ["Bash"],
        "mcp-allowed-tools": ["mcp__a__b"],
    }


def test_without_its_store_the_book_goes_on_and_says_so(logged: Sequence[LogEvent]) -> None:
    fixture = Fixture()
    result_of(fixture.store.close())
    plan = fixture.resolve(ASK)
    fixture.book.planned(plan, ASK)
    assert fixture.book.begun(plan, ASK, "new-1") == "new-1"
    fixture.book.used("new-1", ASK)
    resumed = fixture.resolve(replace(ASK, session_id="new-1"))
    assert resumed.start == SessionStart(StartKind.RESUME, "new-1")
    complaints = [event for event in logged if event.get("type") == "store_failed"]
    assert len(complaints) == 4


def test_without_its_store_a_session_of_unknown_owner_is_not_given_out() -> None:
    fixture = Fixture(adopt_unknown=False)
    result_of(fixture.store.close())
    error = fixture.refusal(replace(ASK, session_id="new-1"))
    assert error.failure is Failure.SESSION_NOT_FOUND


def test_another_store_can_take_over() -> None:
    fixture = Fixture()
    other = inline_store()
    fixture.book.use(other)
    fixture.turn(ASK, "new-1")
    assert result_of(other.find("new-1")) is not None
    assert fixture.find("new-1") is None

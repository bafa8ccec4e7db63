"""Which session a request means, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogEvent, capturedLogs

from claude_proxy.cli.command import SessionStart, StartKind
from claude_proxy.cli.outcomes import Outcome, OutcomeKind
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.book import KEPT_FOR, KEPT_SESSIONS, Plan, SessionBook
from claude_proxy.sessions.store import SessionRecord, Store
from claude_proxy.sessions.turns import Message, TurnRequest
from tests.support import inline_store, result_of

OLD = capabilities_of("1.0.24")
NEW = capabilities_of("2.1.197")

ASK = TurnRequest(content="x", tenant="alice", request_id="r", received=0.0)

ENDED = Outcome(OutcomeKind.SUCCESS, totals={"total_cost_usd": 0.25, "num_turns": 3})


class Fixture:
    """A book with ids and times that can be foretold: new-1, new-2, ... at 1000."""

    def __init__(self, *, adopt_unknown: bool = True) -> None:
        self.store: Store = inline_store()
        self.time = 1000.0
        numbers = count(1)
        self.book = SessionBook(
            self.store,
            adopt_unknown=adopt_unknown,
            now=lambda: self.time,
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

    def recognise(self, request: TurnRequest) -> TurnRequest:
        recognised: TurnRequest = result_of(self.book.recognise(request))
        return recognised

    def answered(self, request: TurnRequest, session: str, tip: str) -> None:
        """A turn that ended with an answer: the history has this tip then."""
        kept = self.turn(request, session)
        self.book.remember_tip(kept, tip, request.conversation)

    def turn(self, request: TurnRequest, cli_id: str, can: Capabilities = NEW) -> str:
        """Go through a whole turn; the id under which the session is kept."""
        plan = self.resolve(request, can)
        self.book.planned(plan, request)
        kept = self.book.begun(plan, request, cli_id)
        self.book.used(kept, request, ENDED)
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
    fixture.book.used("new-1", request, ENDED)
    record = fixture.find("new-1")
    assert record is not None
    assert record.parameters == {
        "allowed-tools": ["Read"],
        "disallowed-tools": ["Bash"],
        "mcp-allowed-tools": ["mcp__a__b"],
    }


def test_a_turn_is_remembered_with_its_end_and_its_cost() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "new-1")
    fixture.time += 5
    failed = Outcome(OutcomeKind.FAILURE, ProxyError(Failure.TURN_TIMEOUT))
    fixture.book.used("new-1", ASK, failed)
    record = fixture.find("new-1")
    assert record is not None
    assert (record.turns, record.cost, record.outcome) == (2, 0.25, "turn_timeout")
    assert (record.created, record.used) == (1000.0, 1005.0)


def test_without_its_store_the_book_goes_on_and_says_so(logged: Sequence[LogEvent]) -> None:
    fixture = Fixture()
    result_of(fixture.store.close())
    plan = fixture.resolve(ASK)
    fixture.book.planned(plan, ASK)
    assert fixture.book.begun(plan, ASK, "new-1") == "new-1"
    fixture.book.used("new-1", ASK, ENDED)
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


# What its owner asks for.


def test_a_tenant_sees_its_own_sessions_by_all_their_ids() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "cli-a", OLD)
    fixture.turn(replace(ASK, session_id="cli-a"), "cli-b", OLD)
    fixture.turn(replace(ASK, tenant="bob"), "of bob", OLD)
    for name in ("cli-a", "cli-b"):
        assert result_of(fixture.book.get("alice", name)).id == "cli-a"
    [record] = result_of(fixture.book.page("alice", 10, None))
    assert (record.id, record.turns) == ("cli-a", 2)
    [record] = result_of(fixture.book.page("bob", 10, None))
    assert record.id == "of bob"


@pytest.mark.parametrize("name", ["of bob", "unknown", "", "\0"])
def test_what_is_not_the_tenants_own_is_not_there(name: str) -> None:
    fixture = Fixture()
    fixture.turn(replace(ASK, tenant="bob"), "of bob", OLD)
    for ask in (fixture.book.get, fixture.book.delete):
        with pytest.raises(ProxyError) as caught:
            result_of(ask("alice", name))
        assert (caught.value.failure, caught.value.param) == (Failure.SESSION_NOT_FOUND, None)
    assert fixture.find("of bob") is not None


@pytest.mark.parametrize("adopt_unknown", [True, False])
def test_a_session_that_was_deleted_is_no_session_by_any_of_its_ids(adopt_unknown: bool) -> None:
    fixture = Fixture(adopt_unknown=adopt_unknown)
    fixture.turn(ASK, "cli-a", OLD)
    fixture.turn(replace(ASK, session_id="cli-a"), "cli-b", OLD)
    assert result_of(fixture.book.delete("alice", "cli-b")).id == "cli-a"
    for name in ("cli-a", "cli-b"):
        asked = replace(ASK, session_id=name, inherit=frozenset(INHERITED))
        for request in (asked, replace(asked, fork=True), replace(asked, tenant="bob")):
            assert fixture.recognise(request) is request
            error = fixture.refusal(request, OLD)
            assert (error.failure, error.param) == (Failure.SESSION_NOT_FOUND, "session-id")
        for ask in (fixture.book.get, fixture.book.delete):
            with pytest.raises(ProxyError):
                result_of(ask("alice", name))


@pytest.mark.parametrize(
    "known_by",
    [{}, {"conversation": "chat"}, {"conversation": "new-1"}, {"hinted_session": "new-1"}],
)
def test_a_conversation_whose_session_was_deleted_begins_anew(known_by: dict[str, str]) -> None:
    fixture = Fixture()
    fixture.answered(replace(ASK, conversation="chat"), "new-1", "one")
    result_of(fixture.book.delete("alice", "new-1"))
    request = replace(LATER, **known_by)  # type: ignore[arg-type]  # it takes any field
    assert fixture.recognise(request) is request
    assert fixture.resolve(request).start.kind is StartKind.NEW


def test_what_a_turn_says_after_its_session_was_deleted_brings_nothing_back(
    logged: Sequence[LogEvent],
) -> None:
    fixture = Fixture()
    fixture.turn(ASK, "cli-a", OLD)
    request = replace(ASK, session_id="cli-a")
    plan = fixture.resolve(request, OLD)
    result_of(fixture.book.delete("alice", "cli-a"))
    kept = fixture.book.begun(plan, request, "cli-a")
    fixture.book.resumed_by(kept, "cli-b")
    fixture.book.used(kept, request, ENDED)
    fixture.book.remember_tip(kept, "one", None)
    assert fixture.recognise(LATER) is LATER
    for name in ("cli-a", "cli-b"):
        assert fixture.find(name) is None
        assert fixture.refusal(replace(ASK, session_id=name)).failure is Failure.SESSION_NOT_FOUND
    assert [event for event in logged if event.get("type") == "store_failed"] == []


def test_without_its_store_nothing_can_be_listed_or_deleted(logged: Sequence[LogEvent]) -> None:
    fixture = Fixture()
    result_of(fixture.store.close())
    for answer in (
        fixture.book.page("alice", 10, None),
        fixture.book.get("alice", "new-1"),
        fixture.book.delete("alice", "new-1"),
    ):
        with pytest.raises(ProxyError) as caught:
            result_of(answer)
        assert caught.value.failure is Failure.INTERNAL_ERROR
        assert "memory of its sessions" in caught.value.message
    assert len([event for event in logged if event.get("type") == "store_failed"]) == 3


# Which session a conversation continues.

HISTORY = (
    Message("user", [{"type": "text", "text": "Hello"}]),
    Message("assistant", [{"type": "text", "text": "Hi!"}]),
)

LATER = replace(ASK, history=HISTORY, tips=("zero", "one"))
"""A request that sends the history whose tip is "one"."""


def test_a_history_continues_its_session_which_knows_it_already() -> None:
    fixture = Fixture()
    fixture.answered(replace(ASK, workspace="w"), "new-1", "one")
    request = fixture.recognise(LATER)
    assert request == replace(LATER, session_id="new-1", history=(), claimed="one")
    plan = fixture.resolve(request)
    assert (plan.start, plan.workspace) == (SessionStart(StartKind.RESUME, "new-1"), "w")


def test_a_conversation_goes_on_in_one_session_turn_after_turn() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "tip 1")
    for number in range(1, 10):
        request = fixture.recognise(replace(LATER, tips=(f"tip {number}",)))
        assert request.session_id == "new-1"
        fixture.answered(request, "new-1", f"tip {number + 1}")
    assert fixture.recognise(replace(LATER, tips=("tip 1",))).session_id is None


def test_an_old_cli_s_session_is_found_under_the_name_by_which_it_is_kept() -> None:
    fixture = Fixture()
    assert fixture.turn(ASK, "cli-a", OLD) == "cli-a"
    fixture.book.remember_tip("cli-a", "one", None)
    request = fixture.recognise(LATER)
    assert fixture.turn(request, "cli-b", OLD) == "cli-a"
    fixture.book.remember_tip("cli-a", "two", None)
    plan = fixture.resolve(fixture.recognise(replace(LATER, tips=("two",))), OLD)
    assert (plan.lease_key, plan.start.session_id) == ("cli-a", "cli-b")


def test_of_two_requests_with_one_history_the_second_gets_a_session_of_its_own() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    first, second = fixture.recognise(LATER), fixture.recognise(LATER)
    assert first.session_id == "new-1"
    assert second is LATER
    assert fixture.resolve(second).start.kind is StartKind.NEW


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(replace(LATER, tips=("edited",)), id="an edited history"),
        pytest.param(replace(LATER, tenant="bob"), id="the history of another tenant"),
        pytest.param(replace(LATER, workspace="other"), id="another workspace"),
        pytest.param(replace(LATER, conversation="other"), id="a conversation of another name"),
        pytest.param(replace(LATER, fork=True), id="a copy"),
        pytest.param(replace(LATER, tips=()), id="no history"),
        pytest.param(
            replace(LATER, tips=("edited",), hinted_session="new-1"),
            id="an edited history below an id that was shown",
        ),
        pytest.param(
            replace(LATER, tips=(), tenant="bob", hinted_session="new-1"),
            id="another tenant's id that was shown",
        ),
        pytest.param(
            replace(LATER, tips=(), tenant="bob", conversation="new-1"),
            id="another tenant's session as the name of the conversation",
        ),
    ],
)
@pytest.mark.parametrize("adopt_unknown", [True, False])
def test_what_is_not_exactly_that_conversation_begins_anew_and_takes_nothing(
    request_: TurnRequest, adopt_unknown: bool
) -> None:
    fixture = Fixture(adopt_unknown=adopt_unknown)
    fixture.answered(replace(ASK, workspace="w", conversation="chat"), "new-1", "one")
    assert fixture.recognise(request_) is request_
    assert fixture.recognise(LATER).session_id == "new-1"


def test_two_conversations_with_the_same_words_are_told_apart_by_their_names() -> None:
    fixture = Fixture()
    for number, name in ((1, "left"), (2, "right")):
        fixture.answered(replace(ASK, conversation=name), f"new-{number}", "one")
    assert fixture.recognise(LATER) is LATER
    for session, name in (("new-2", "right"), ("new-1", "left")):
        request = fixture.recognise(replace(LATER, conversation=name))
        assert request.session_id == session


def test_two_conversations_with_the_same_words_are_told_apart_by_the_id_that_was_shown() -> None:
    fixture = Fixture()
    for number in (1, 2):
        fixture.answered(ASK, f"new-{number}", "one")
    request = fixture.recognise(replace(LATER, hinted_session="new-2"))
    assert (request.session_id, request.claimed) == ("new-2", "one")


def test_of_a_name_of_any_length_only_so_much_is_kept() -> None:
    fixture = Fixture()
    name = "x" * 100_000
    fixture.answered(replace(ASK, conversation=name), "new-1", "one")
    record = fixture.find("new-1")
    assert record is not None
    assert record.conversation == "x" * 256
    assert fixture.recognise(replace(LATER, conversation=name)).session_id == "new-1"


def test_a_conversation_named_by_a_session_s_id_is_that_session() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    asked = replace(LATER, tips=("edited",), conversation="new-1")
    request = fixture.recognise(asked)
    assert request == replace(asked, session_id="new-1", history=())
    assert request.claimed is None


def test_the_workspace_of_a_session_that_is_named_is_still_checked() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    for asked in (
        replace(LATER, workspace="other", session_id="new-1"),
        replace(LATER, workspace="other", conversation="new-1"),
    ):
        error = fixture.refusal(fixture.recognise(asked))
        assert (error.failure, error.param) == (Failure.INVALID_VALUE, "workspace")


def test_a_named_session_goes_on_whatever_the_history_is() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    asked = replace(LATER, tips=("edited",), session_id="new-1")
    assert fixture.recognise(asked) == replace(asked, history=())
    fixture.turn(asked, "new-1")
    assert fixture.recognise(LATER) is LATER  # its tip is gone with that turn


def test_a_named_session_that_is_not_known_keeps_the_history_for_the_case_that_it_is_lost() -> None:
    asked = replace(LATER, session_id="foreign")
    assert Fixture().recognise(asked) is asked


def test_a_session_that_never_began_is_told_the_history() -> None:
    fixture = Fixture()
    unbegun(fixture)
    asked = replace(LATER, session_id="new-1", inherit=frozenset({"permission-mode"}))
    assert fixture.recognise(asked).history == HISTORY


def test_an_id_that_was_shown_by_another_server_is_tried_with_the_history_at_hand() -> None:
    asked = replace(LATER, hinted_session="foreign")
    assert Fixture().recognise(asked) == replace(asked, session_id="foreign")
    assert Fixture(adopt_unknown=False).recognise(asked) is asked


def test_an_id_that_was_shown_counts_for_a_session_that_never_had_a_tip() -> None:
    fixture = Fixture()
    fixture.turn(replace(ASK, workspace="w"), "new-1")
    asked = replace(LATER, hinted_session="new-1")
    assert fixture.recognise(asked) == replace(asked, session_id="new-1", history=())
    elsewhere = replace(asked, workspace="other")
    assert fixture.recognise(elsewhere) is elsewhere


def test_an_id_that_was_shown_does_not_count_for_a_session_whose_last_turn_failed() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    fixture.turn(fixture.recognise(LATER), "new-1")
    asked = replace(LATER, hinted_session="new-1")
    assert fixture.recognise(asked) is asked


INHERITED = {"allowed-tools", "dangerously-skip-permissions", "permission-mode", "workspace"}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(LATER, id="found by its history"),
        pytest.param(replace(ASK, session_id="new-1"), id="named"),
        pytest.param(replace(ASK, conversation="new-1"), id="named as the conversation"),
    ],
)
def test_a_session_that_is_continued_hands_on_its_parameters(asked: TurnRequest) -> None:
    fixture = Fixture()
    before = replace(
        ASK, workspace="w", allowed_tools=("Read",), mcp_tools=("mcp__a__b",), skip_permissions=True
    )
    fixture.answered(before, "new-1", "one")
    request = fixture.recognise(replace(asked, inherit=frozenset(INHERITED)))
    assert request.session_id == "new-1"
    assert (request.allowed_tools, request.skip_permissions) == (("Read",), True)
    assert (request.workspace, request.mcp_tools) == (None, ())


def test_parameters_of_another_tenant_are_not_handed_on() -> None:
    fixture = Fixture()
    fixture.answered(replace(ASK, skip_permissions=True), "new-1", "one")
    asked = replace(ASK, tenant="bob", session_id="new-1", inherit=frozenset(INHERITED))
    assert fixture.recognise(asked) is asked


def test_a_claim_in_vain_can_be_taken_back() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    request = fixture.recognise(LATER)
    fixture.book.unclaim(LATER)  # has claimed nothing
    assert fixture.recognise(LATER) is LATER
    fixture.book.unclaim(request)
    assert fixture.recognise(LATER) == request


@pytest.mark.parametrize("request_", [LATER, replace(LATER, tips=("edited",))])
def test_a_client_that_leaves_while_it_is_recognised_takes_no_session(
    request_: TurnRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    claim, answer = fixture.store.claim, Deferred[SessionRecord | None]()
    monkeypatch.setattr(fixture.store, "claim", lambda *args, **named: answer)
    recognising = Deferred.fromCoroutine(fixture.book.recognise(request_))
    recognising.cancel()
    with pytest.raises(CancelledError):
        result_of(recognising)
    answer.callback(result_of(claim("alice", request_.tips, None)))
    monkeypatch.undo()
    assert fixture.recognise(LATER).session_id == "new-1"


def test_a_claim_holds_until_somebody_else_takes_the_session_up() -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    request = fixture.recognise(LATER)
    assert result_of(fixture.book.holds(request)) is True
    fixture.turn(replace(ASK, session_id="new-1"), "new-1")
    assert result_of(fixture.book.holds(request)) is False
    fixture.book.unclaim(request)
    assert fixture.recognise(LATER) is LATER
    assert result_of(fixture.book.holds(LATER)) is True


@pytest.mark.parametrize(
    "asked",
    [
        LATER,
        replace(LATER, conversation="chat"),
        replace(ASK, hinted_session="new-1"),
        replace(ASK, session_id="new-1", inherit=frozenset(INHERITED)),
    ],
)
def test_without_its_store_every_conversation_goes_on_as_it_is_sent(
    asked: TurnRequest, logged: Sequence[LogEvent]
) -> None:
    fixture = Fixture()
    fixture.answered(ASK, "new-1", "one")
    claimed = fixture.recognise(LATER)
    result_of(fixture.store.close())
    assert fixture.recognise(asked) is asked
    assert [event.get("type") for event in logged if event.get("type")] == ["store_failed"]
    assert result_of(fixture.book.holds(claimed)) is False


def test_what_nobody_has_come_back_to_for_long_is_forgotten_at_the_next_start() -> None:
    fixture = Fixture()
    fixture.turn(ASK, "new-1")
    fixture.time += KEPT_FOR
    fixture.turn(ASK, "new-2")
    fixture.time += 1
    second_run = SessionBook(
        fixture.store, adopt_unknown=True, now=lambda: fixture.time, make_id=lambda: "new-3"
    )
    fixture.book = second_run
    fixture.turn(ASK, "new-3")
    assert [fixture.find(f"new-{number}") is None for number in (1, 2, 3)] == [True, False, False]


def test_the_number_of_sessions_is_looked_after_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixture = Fixture()
    asked: list[tuple[float, int]] = []
    prune = fixture.store.prune

    def noted(before: float, keep: int) -> Deferred[int]:
        asked.append((before, keep))
        return prune(before, 10)

    monkeypatch.setattr(fixture.store, "prune", noted)
    for number in range(1, 2002):
        fixture.time += 1
        request = replace(ASK, request_id=f"{number}")
        fixture.book.planned(fixture.resolve(request), request)
    assert asked == [(time - KEPT_FOR, KEPT_SESSIONS) for time in (1001.0, 2001.0, 3001.0)]
    left = [n for n in range(1, 2002) if fixture.find(f"new-{n}") is not None]
    assert left == list(range(1992, 2002))

"""What the ends that the CLI was seen to come to mean for a client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from claude_proxy.cli.events import parse_event
from claude_proxy.cli.outcomes import (
    Ending,
    Figures,
    Outcome,
    OutcomeKind,
    outcome_of_ending,
    outcome_of_result,
)
from claude_proxy.errors import Failure, ProxyError

NOBODY = "00000000-0000-0000-0000-000000000005"
ABORTED = "[ede_diagnostic] result_type=user last_content_type=n/a stop_reason=tool_use"
POLICY = (
    "API Error: Claude Code is unable to respond to this request, which appears to violate our "
    "Usage Policy (https://www.anthropic.com/legal/aup). Try rephrasing the request in a new "
    "session or change your model.\n\nRequest ID: req_1"
)


def result(**fields: object) -> dict[str, object]:
    return {"type": "result", "subtype": "success", "session_id": "s-1", **fields}


def failed(prose: str, status: int | None = None, **fields: object) -> dict[str, object]:
    """The shape of the newer versions."""
    return result(
        is_error=True,
        result=prose,
        api_error_status=status,
        stop_reason="stop_sequence",
        terminal_reason="completed",
        **fields,
    )


def failed_old(prose: str) -> dict[str, object]:
    """The shape of 1.0.24."""
    return result(is_error=True, result=prose)


def judged(
    fields: dict[str, Any], *, refused: bool = False, retry_after: int | None = None
) -> Outcome:
    event = parse_event(json.dumps(fields).encode())
    assert event is not None
    outcome = outcome_of_result(event, refused=refused, retry_after=retry_after)
    assert outcome.result is event
    assert (outcome.error is not None) == (outcome.kind is OutcomeKind.FAILURE)
    return outcome


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (
            result(
                is_error=False,
                result="Done.",
                api_error_status=None,
                stop_reason="end_turn",
                terminal_reason="completed",
            ),
            OutcomeKind.SUCCESS,
        ),
        (result(is_error=False, result="Done."), OutcomeKind.SUCCESS),
        (result(result="Done."), OutcomeKind.SUCCESS),
        (result(is_error=False, result="", stop_reason=None), OutcomeKind.SUCCESS),
        (
            result(is_error=False, result='{"name":"Bob"}', stop_reason="tool_use"),
            OutcomeKind.SUCCESS,
        ),
        (
            result(
                subtype="error_max_turns",
                is_error=True,
                stop_reason="tool_use",
                terminal_reason="max_turns",
                errors=["Reached maximum number of turns (1)"],
            ),
            OutcomeKind.LIMIT,
        ),
        (result(subtype="error_max_turns", is_error=False), OutcomeKind.LIMIT),
        (
            result(
                subtype="error_max_budget_usd",
                is_error=True,
                stop_reason="tool_use",
                errors=["Reached maximum budget ($0.0001)"],
            ),
            OutcomeKind.LIMIT,
        ),
        (
            failed(
                "API Error: Claude's response exceeded the 64000 output token maximum. To "
                "configure this behavior, set the CLAUDE_CODE_MAX_OUTPUT_TOKENS environment "
                "variable."
            ),
            OutcomeKind.LIMIT,
        ),
        (
            result(
                is_error=True,
                result=POLICY,
                api_error_status=None,
                stop_reason="refusal",
                terminal_reason="completed",
            ),
            OutcomeKind.REFUSAL,
        ),
    ],
)
def test_what_is_no_failure_carries_no_error(fields: dict[str, Any], kind: OutcomeKind) -> None:
    outcome = judged(fields)
    assert outcome.kind is kind
    assert outcome.code == kind.value
    assert outcome.session_id == "s-1"


def test_a_refusal_that_was_announced_needs_no_stop_reason() -> None:
    assert judged(failed(POLICY), refused=True).kind is OutcomeKind.REFUSAL
    assert judged(failed_old(POLICY), refused=True).kind is OutcomeKind.REFUSAL


def test_a_success_after_a_refusal_is_a_success() -> None:
    fields = result(is_error=False, result="ok", stop_reason="end_turn")
    assert judged(fields, refused=True).kind is OutcomeKind.SUCCESS


@pytest.mark.parametrize(
    ("fields", "failure"),
    [
        (failed("API Error: 400 scripted 400", 400), Failure.UPSTREAM_INVALID_REQUEST),
        (
            failed("Failed to authenticate. API Error: 401 scripted", 401),
            Failure.CLI_NOT_AUTHENTICATED,
        ),
        (
            failed("Failed to authenticate. API Error: 403 scripted 403", 403),
            Failure.CLI_NOT_AUTHENTICATED,
        ),
        (
            failed(
                "There's an issue with the selected model (claude-opus-4-8[1m]). It may not exist "
                "or you may not have access to it. Run --model to pick a different model.",
                404,
            ),
            Failure.MODEL_NOT_FOUND,
        ),
        (
            failed("Request too large (max 32MB). Try with a smaller file.", 413),
            Failure.UPSTREAM_INVALID_REQUEST,
        ),
        (
            failed("API Error: Request rejected (429) · scripted 429", 429),
            Failure.RATE_LIMIT_EXCEEDED,
        ),
        (
            failed("You've hit your session limit · resets Jan 15, 2027, 8am (UTC)", 429),
            Failure.RATE_LIMIT_EXCEEDED,
        ),
        (
            failed(
                "API Error: 500 scripted 500. This is a server-side issue, usually temporary — "
                "try again in a moment.",
                500,
            ),
            Failure.UPSTREAM_ERROR,
        ),
        (failed("API Error: 503 gone", 503), Failure.UPSTREAM_ERROR),
        (failed("API Error: 529 x", 529), Failure.UPSTREAM_OVERLOADED),
        (
            failed(
                "API Error: Repeated 529 Overloaded errors. The API is at capacity — this is "
                "usually temporary."
            ),
            Failure.UPSTREAM_OVERLOADED,
        ),
        (failed("Not logged in · Please run /login"), Failure.CLI_NOT_AUTHENTICATED),
        (
            failed("API Error: Unable to connect to API (ConnectionRefused)"),
            Failure.UPSTREAM_ERROR,
        ),
        (failed("API Error: Request timed out."), Failure.UPSTREAM_ERROR),
        (failed("API Error: Request rejected (429) · no status"), Failure.RATE_LIMIT_EXCEEDED),
        (
            failed_old(
                'API Error: 400 {"type":"error","error":{"type":"invalid_request_error",'
                '"message":"scripted 400"}}'
            ),
            Failure.UPSTREAM_INVALID_REQUEST,
        ),
        (
            failed_old(
                'API Error: 401 {"type":"error","error":{"type":"authentication_error"}} · '
                "Please run /login"
            ),
            Failure.CLI_NOT_AUTHENTICATED,
        ),
        (failed_old('API Error: 404 {"type":"error"}'), Failure.MODEL_NOT_FOUND),
        (
            failed_old(
                'API Error: 529 {"type":"error","error":{"type":"overloaded_error","message":'
                '"scripted 529"}}'
            ),
            Failure.UPSTREAM_OVERLOADED,
        ),
        (failed_old("Invalid API key · Please run /login"), Failure.CLI_NOT_AUTHENTICATED),
        (failed_old("API Error: Connection error."), Failure.UPSTREAM_ERROR),
        (failed_old("It held 404 things"), Failure.UPSTREAM_ERROR),
        (failed_old("API Error: 4000 things"), Failure.UPSTREAM_ERROR),
        (failed("odd", None) | {"api_error_status": "429"}, Failure.UPSTREAM_ERROR),
    ],
)
def test_a_failed_api_request_is_told_by_its_status_or_its_prose(
    fields: dict[str, Any], failure: Failure
) -> None:
    outcome = judged(fields)
    assert outcome.kind is OutcomeKind.FAILURE
    assert outcome.error is not None
    assert outcome.error.failure is failure
    assert outcome.code == failure.code
    prose = " ".join(fields["result"].split())
    assert outcome.error.message == f"{failure.sentence} The CLI said: {prose}"


def test_a_failure_without_prose_says_the_default_sentence() -> None:
    for fields in (failed("", 500), result(is_error=True)):
        error = judged(fields).error
        assert error is not None
        assert error.message == Failure.UPSTREAM_ERROR.sentence


def test_only_a_rate_limit_says_when_to_come_back() -> None:
    limited = judged(failed("limit", 429), retry_after=17).error
    assert limited is not None
    assert limited.retry_after == 17
    for status in (400, 500, 529):
        other = judged(failed("other", status), retry_after=17).error
        assert other is not None
        assert other.retry_after is None


@pytest.mark.parametrize(
    ("fields", "failure", "message"),
    [
        (
            result(
                subtype="error_during_execution",
                is_error=True,
                num_turns=0,
                stop_reason=None,
                errors=[f"No conversation found with session ID: {NOBODY}"],
            ),
            Failure.SESSION_NOT_FOUND,
            Failure.SESSION_NOT_FOUND.sentence,
        ),
        (
            result(
                subtype="error_during_execution",
                is_error=True,
                stop_reason="tool_use",
                terminal_reason="aborted_tools",
                errors=[ABORTED],
            ),
            Failure.CLI_FAILED,
            f"The Claude CLI could not finish the turn: {ABORTED}",
        ),
        (
            result(subtype="error_during_execution", is_error=False),
            Failure.CLI_FAILED,
            "The Claude CLI could not finish the turn: it reported error_during_execution",
        ),
        (
            result(
                subtype="error_max_structured_output_retries",
                is_error=True,
                stop_reason="tool_use",
                errors=["Failed to provide valid structured output after 5 attempts"],
            ),
            Failure.UPSTREAM_ERROR,
            (
                "The model gave no answer that fits the JSON schema. Ask again, or ask for less. "
                "The CLI said: Failed to provide valid structured output after 5 attempts"
            ),
        ),
        (
            result(subtype="error_of_the_future", is_error=True, errors=["one", 2, {"three": 3}]),
            Failure.CLI_FAILED,
            "The Claude CLI could not finish the turn: one; 2; {'three': 3}",
        ),
        (
            result(subtype="error_of_the_future", errors="not a list"),
            Failure.CLI_FAILED,
            "The Claude CLI could not finish the turn: it reported error_of_the_future",
        ),
        (
            {"type": "result"},
            Failure.CLI_FAILED,
            "The Claude CLI could not finish the turn: it reported None",
        ),
    ],
)
def test_other_ends_are_failures_with_what_the_cli_said(
    fields: dict[str, Any], failure: Failure, message: str
) -> None:
    outcome = judged(fields)
    assert outcome.kind is OutcomeKind.FAILURE
    assert outcome.error is not None
    assert (outcome.error.failure, outcome.error.message) == (failure, message)


def test_prose_is_one_line_of_bounded_length() -> None:
    error = judged(failed("API Error: 400 " + "a\n\n b\t" * 1000, 400)).error
    assert error is not None
    said = error.message.partition("The CLI said: ")[2]
    assert len(said) == 1000
    assert "\n" not in said
    assert "  " not in said


@pytest.mark.parametrize(
    ("fields", "totals"),
    [
        (
            {
                "usage": {
                    "input_tokens": 10,
                    "output_tokens": 20,
                    "cache_creation_input_tokens": 3,
                    "cache_read_input_tokens": 0,
                    "service_tier": "standard",
                    "server_tool_use": {"web_search_requests": 0},
                },
                "total_cost_usd": 0.00055,
                "num_turns": 2,
                "duration_ms": 791,
            },
            {
                "input_tokens": 10,
                "output_tokens": 20,
                "cache_creation_input_tokens": 3,
                "cache_read_input_tokens": 0,
                "total_cost_usd": 0.00055,
                "num_turns": 2,
            },
        ),
        ({"usage": None, "total_cost_usd": 0}, {"total_cost_usd": 0}),
        ({"usage": {"input_tokens": "many", "output_tokens": None}}, {}),
        ({"usage": [1], "num_turns": "2"}, {}),
        ({}, {}),
    ],
)
def test_totals_are_the_numbers_that_the_result_has(
    fields: dict[str, Any], totals: dict[str, float]
) -> None:
    assert judged(result(**fields)).totals == totals


# A process that ended without a result.


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (Ending(exit_code=0), "exit code 0"),
        (Ending(exit_code=143), "exit code 143"),
        (Ending(signal=9), "signal 9"),
        (Ending(lost=True), "it could not be ended"),
        (Ending(lost=True, exit_code=0), "it could not be ended"),
        (Ending(fault="it wrote too much", signal=15), "it wrote too much"),
        (Ending(fault="it wrote too much", lost=True), "it wrote too much"),
    ],
)
def test_an_ending_is_described_by_what_matters_most(ending: Ending, words: str) -> None:
    assert ending.describe() == words


def ended(ending: Ending, *, spoke: bool = False) -> ProxyError:
    outcome = outcome_of_ending(ending, spoke=spoke)
    assert outcome.kind is OutcomeKind.FAILURE
    assert outcome.result is None
    assert (outcome.session_id, outcome.totals) == (None, {})
    assert outcome.error is not None
    return outcome.error


@pytest.mark.parametrize(
    ("ending", "spoke", "message"),
    [
        (Ending(exit_code=0), True, "The Claude CLI ended without a result (exit code 0)."),
        (
            Ending(exit_code=1, stderr="Error: Session ID x is already in use."),
            False,
            (
                "The Claude CLI ended without a result (exit code 1): "
                "Error: Session ID x is already in use."
            ),
        ),
        (
            Ending(exit_code=1, stderr="MCP config is not a valid JSON"),
            False,
            "The Claude CLI ended without a result (exit code 1): MCP config is not a valid JSON",
        ),
        (Ending(signal=9), True, "The Claude CLI ended without a result (signal 9)."),
        (
            Ending(signal=9, fault="it wrote a line longer than this server accepts"),
            True,
            (
                "The Claude CLI ended without a result (it wrote a line longer than this server "
                "accepts)."
            ),
        ),
        (
            Ending(lost=True),
            False,
            "The Claude CLI ended without a result (it could not be ended).",
        ),
        (
            Ending(exit_code=127, stderr="from a tool"),
            True,
            "The Claude CLI ended without a result (exit code 127): from a tool",
        ),
    ],
)
def test_an_end_without_a_result_is_a_failure_of_the_cli(
    ending: Ending, spoke: bool, message: str
) -> None:
    error = ended(ending, spoke=spoke)
    assert (error.failure, error.message) == (Failure.CLI_FAILED, message)


@pytest.mark.parametrize("code", [126, 127])
def test_a_program_that_could_not_be_started_was_not_found(code: int) -> None:
    error = ended(Ending(exit_code=code, stderr="env: 'node': No such file or directory"))
    assert error.failure is Failure.CLI_NOT_FOUND
    assert error.message.startswith(Failure.CLI_NOT_FOUND.sentence)
    assert error.message.endswith("The system said: env: 'node': No such file or directory")


@pytest.mark.parametrize("spoke", [False, True])
def test_an_unknown_session_is_told_by_what_an_older_cli_complained_of(spoke: bool) -> None:
    stderr = f"No conversation found with session ID: {NOBODY}"
    error = ended(Ending(exit_code=1, stderr=stderr), spoke=spoke)
    assert error.failure is Failure.SESSION_NOT_FOUND
    assert error.message == Failure.SESSION_NOT_FOUND.sentence


def test_a_cli_that_refuses_root_is_a_matter_of_the_request() -> None:
    stderr = (
        "--dangerously-skip-permissions cannot be used with root/sudo privileges for security "
        "reasons"
    )
    error = ended(Ending(exit_code=1, stderr=stderr))
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, "dangerously-skip-permissions")
    assert "as root" in error.message


def test_an_outcome_has_a_code_for_the_log() -> None:
    assert Outcome(OutcomeKind.ABANDONED).code == "abandoned"
    assert Outcome(OutcomeKind.ABANDONED).figures == Figures(None, None)
    failure = Outcome(OutcomeKind.FAILURE, ProxyError(Failure.TURN_TIMEOUT))
    assert failure.code == "turn_timeout"

"""
How a turn ended: the CLI's ``result`` event, or its absence, as one `Outcome`.

The facts about the CLI were observed with versions 1.0.24, 1.0.128, 2.1.197 and 2.1.330: a failed
API request ends in a ``result`` whose subtype is ``success``, with ``is_error`` true, prose in
``result`` and the HTTP status in ``api_error_status``; the older versions have the status only in
the prose, and so has 2.1.197 for some failures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from claude_proxy.cli.events import Event
from claude_proxy.errors import Failure, ProxyError

__all__ = [
    "Ending",
    "Figures",
    "Outcome",
    "OutcomeKind",
    "died_unheard",
    "outcome_of_ending",
    "outcome_of_result",
]


@dataclass(frozen=True, slots=True)
class Ending:
    """
    How a process ended.

    @ivar exit_code: None if a signal ended it, or if it was never seen to end.
    @ivar signal: the number of the signal that ended it, or None.
    @ivar stderr: the last line of stderr that says something.
    @ivar fault: what was wrong with its output, or None.
    @ivar lost: it was given up: nothing ended it in time.
    """

    exit_code: int | None = None
    signal: int | None = None
    stderr: str = ""
    fault: str | None = None
    lost: bool = False

    KINDS: ClassVar = ("success", "failure", "signal", "fault", "lost")

    @property
    def kind(self) -> str:
        """One of `KINDS`: exit code 0, another one, a signal, bad output, or no end in time."""
        if self.fault is not None:
            return "fault"
        if self.lost:
            return "lost"
        if self.signal is not None:
            return "signal"
        return "success" if self.exit_code == 0 else "failure"

    def describe(self) -> str:
        """Say in a few words how it ended."""
        if self.fault is not None:
            return self.fault
        if self.lost:
            return "it could not be ended"
        if self.signal is not None:
            return f"signal {self.signal}"
        return f"exit code {self.exit_code}"


class OutcomeKind(Enum):
    """What kind of end it was."""

    SUCCESS = "success"
    LIMIT = "limit"
    """A limit of turns, budget or tokens that the request or the model set."""
    REFUSAL = "refusal"
    """The model declined to answer."""
    FAILURE = "failure"
    ABANDONED = "abandoned"
    """The client left."""


@dataclass(frozen=True, slots=True)
class Figures:
    """
    When a turn showed its first signs.

    @ivar first_event: seconds from the request to the first event, or None without one.
    @ivar first_token: seconds from the request to the first text, thinking or tool call.
    """

    first_event: float | None = None
    first_token: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How a turn ended.

    @ivar error: what to tell the client; set if and only if the kind is FAILURE.
    @ivar result: the CLI's own ``result`` event, if there was one.
    @ivar session_id: the session's id, if it is known.
    @ivar totals: of the result: tokens by kind, cost in USD, number of model turns.
    @ivar interrupted: somebody asked for this end, so that nobody wants it tried again.
    """

    kind: OutcomeKind
    error: ProxyError | None = None
    result: Event | None = None
    session_id: str | None = None
    figures: Figures = field(default_factory=Figures)
    totals: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def code(self) -> str:
        """One word for logs: the kind, or the error's code."""
        return self.error.failure.code if self.error is not None else self.kind.value


_LIMITS = ("error_max_turns", "error_max_budget_usd")

_BY_STATUS = {
    401: Failure.CLI_NOT_AUTHENTICATED,
    403: Failure.CLI_NOT_AUTHENTICATED,
    404: Failure.MODEL_NOT_FOUND,
    429: Failure.RATE_LIMIT_EXCEEDED,
    529: Failure.UPSTREAM_OVERLOADED,
}

_BY_PROSE = (
    ("Please run /login", Failure.CLI_NOT_AUTHENTICATED),
    ("529 Overloaded", Failure.UPSTREAM_OVERLOADED),
)

_STATUS_IN_PROSE = re.compile(r"API Error: (?:Request rejected )?\(?([45]\d\d)\b")

_NO_ROOT = "cannot be used with root"
"""Said by the versions that know no IS_SANDBOX; for the others the request was refused before."""

_NO_CONVERSATION = "No conversation found with session ID"

_NOTHING_FITS = "The model gave no answer that fits the JSON schema. Ask again, or ask for less."


def outcome_of_result(event: Event, *, refused: bool, retry_after: int | None) -> Outcome:
    """
    Read a ``result`` event.

    @param refused: the CLI said before that the model refused.
    @param retry_after: seconds until the provider's limit ends, where the CLI said so.
    """
    fields = event.fields()
    kind, error = _judge(fields, refused=refused, retry_after=retry_after)
    return Outcome(
        kind=kind,
        error=error,
        result=event,
        session_id=event.session_id,
        totals=_totals(fields),
    )


def _judge(
    fields: dict[str, Any], *, refused: bool, retry_after: int | None
) -> tuple[OutcomeKind, ProxyError | None]:
    subtype = fields.get("subtype")
    prose = _prose(fields)
    if subtype in _LIMITS:
        return OutcomeKind.LIMIT, None
    if subtype == "success" and fields.get("is_error") is not True:
        return OutcomeKind.SUCCESS, None
    if refused or fields.get("stop_reason") == "refusal":
        return OutcomeKind.REFUSAL, None
    if subtype == "success":
        if "output token maximum" in prose:
            return OutcomeKind.LIMIT, None
        return OutcomeKind.FAILURE, _upstream_error(fields, prose, retry_after)
    if _NO_CONVERSATION in prose:
        return OutcomeKind.FAILURE, ProxyError(Failure.SESSION_NOT_FOUND)
    if subtype == "error_max_structured_output_retries":
        message = f"{_NOTHING_FITS} The CLI said: {prose}" if prose else _NOTHING_FITS
        return OutcomeKind.FAILURE, ProxyError(Failure.UPSTREAM_ERROR, message)
    said = prose or f"it reported {subtype}"
    message = f"The Claude CLI could not finish the turn: {said}"
    return OutcomeKind.FAILURE, ProxyError(Failure.CLI_FAILED, message)


def _upstream_error(fields: dict[str, Any], prose: str, retry_after: int | None) -> ProxyError:
    status = fields.get("api_error_status")
    if not isinstance(status, int):
        in_prose = _STATUS_IN_PROSE.search(prose)
        status = int(in_prose[1]) if in_prose else None
    failure = _BY_STATUS.get(status) if status is not None else None
    if failure is None:
        failure = next((found for text, found in _BY_PROSE if text in prose), None)
    if failure is None:
        refused = status is not None and 400 <= status < 500  # noqa: PLR2004 - HTTP's classes
        failure = Failure.UPSTREAM_INVALID_REQUEST if refused else Failure.UPSTREAM_ERROR
    message = f"{failure.sentence} The CLI said: {prose}" if prose else None
    limited = failure is Failure.RATE_LIMIT_EXCEEDED
    return ProxyError(failure, message, retry_after=retry_after if limited else None)


def _prose(fields: dict[str, Any]) -> str:
    """What the CLI said of a failure, in at most 1000 characters on one line."""
    said = fields.get("result")
    if not isinstance(said, str):
        errors = fields.get("errors")
        said = "; ".join(map(str, errors)) if isinstance(errors, list) else ""
    return " ".join(said.split())[:1000]


_USAGE = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)


def _totals(fields: dict[str, Any]) -> dict[str, float]:
    usage = fields.get("usage")
    sources: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        (usage if isinstance(usage, dict) else {}, _USAGE),
        (fields, ("total_cost_usd", "num_turns")),
    ]
    return {
        key: source[key]
        for source, keys in sources
        for key in keys
        if isinstance(source.get(key), (int, float))
    }


# What a shell answers when it cannot start the program, or `env` when an interpreter is missing.
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


def outcome_of_ending(ending: Ending, *, spoke: bool) -> Outcome:
    """
    Judge a process that ended before its result.

    @param spoke: it had written an event before.
    """
    if not spoke and ending.exit_code in (_NOT_EXECUTABLE, _NOT_FOUND):
        message = f"{Failure.CLI_NOT_FOUND.sentence} The system said: {ending.stderr}"
        error = ProxyError(Failure.CLI_NOT_FOUND, message)
    elif _NO_ROOT in ending.stderr:
        error = ProxyError(
            Failure.INVALID_VALUE,
            "The Claude CLI on this server refuses to skip permissions as root. Run the server as "
            "another user; or name the tools to allow in 'allowed-tools' instead.",
            param="dangerously-skip-permissions",
        )
    elif _NO_CONVERSATION in ending.stderr:
        error = ProxyError(Failure.SESSION_NOT_FOUND)
    else:
        said = f": {ending.stderr}" if ending.stderr else "."
        message = f"The Claude CLI ended without a result ({ending.describe()}){said}"
        error = ProxyError(Failure.CLI_FAILED, message)
    return Outcome(OutcomeKind.FAILURE, error)


def died_unheard(outcome: Outcome) -> bool:
    """Whether a process ended by itself before it said anything of its turn."""
    return (
        outcome.error is not None
        and outcome.error.failure is Failure.CLI_FAILED
        and outcome.result is None
        and outcome.figures.first_event is None
    )

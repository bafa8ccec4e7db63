"""The catalogue of failures is a promise to clients."""

from __future__ import annotations

import json

import pytest

from claude_proxy.errors import Failure, ProxyError

PROMISED = {
    "invalid_api_key": (401, "invalid_request_error"),
    "origin_not_allowed": (403, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "session_not_found": (404, "invalid_request_error"),
    "session_busy": (409, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "malformed_request": (400, "invalid_request_error"),
    "head_too_large": (431, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "server_busy": (429, "rate_limit_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "upstream_invalid_request": (400, "invalid_request_error"),
    "upstream_overloaded": (503, "server_error"),
    "upstream_error": (502, "server_error"),
    "cli_not_authenticated": (502, "server_error"),
    "cli_not_found": (503, "server_error"),
    "cli_failed": (502, "server_error"),
    "turn_timeout": (504, "server_error"),
    "inactivity_timeout": (504, "server_error"),
    "workspace_unavailable": (500, "server_error"),
    "shutting_down": (503, "server_error"),
    "internal_error": (500, "server_error"),
}


def test_codes_statuses_and_types_are_the_promised_ones() -> None:
    catalogue = {failure.code: (failure.status, failure.type) for failure in Failure}
    assert catalogue == PROMISED
    assert len(list(Failure)) == len(PROMISED)


@pytest.mark.parametrize("failure", Failure, ids=lambda failure: failure.name)
def test_every_entry_says_a_whole_sentence_under_its_own_name(failure: Failure) -> None:
    assert failure.code == failure.name.lower()
    assert failure.sentence[0].isupper()
    assert failure.sentence.endswith(".")


@pytest.mark.parametrize("failure", Failure, ids=lambda failure: failure.name)
def test_an_error_without_a_message_says_the_default_sentence(failure: Failure) -> None:
    error = ProxyError(failure)
    assert error.envelope() == {
        "error": {
            "message": failure.sentence,
            "type": failure.type,
            "param": None,
            "code": failure.code,
        }
    }
    assert str(error) == f"{failure.code}: {failure.sentence}"
    assert (error.retry_after, error.allow) == (None, ())


def test_an_error_says_what_it_was_given() -> None:
    error = ProxyError(
        Failure.METHOD_NOT_ALLOWED, "Say 'größe'.", param="x", retry_after=7, allow=("GET", "HEAD")
    )
    assert json.loads(json.dumps(error.envelope())) == {
        "error": {
            "message": "Say 'größe'.",
            "type": "invalid_request_error",
            "param": "x",
            "code": "method_not_allowed",
        }
    }
    assert (error.retry_after, error.allow) == (7, ("GET", "HEAD"))
    assert str(error) == "method_not_allowed: Say 'größe'."


def test_an_empty_message_is_none() -> None:
    assert ProxyError(Failure.NOT_FOUND, "").message == Failure.NOT_FOUND.sentence

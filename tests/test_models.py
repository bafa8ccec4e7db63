"""Names of models: what they mean, and the list in OpenAI's form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.pagination import SyncPage
from openai.types import Model

from claude_proxy.dialects.models import (
    model_entry,
    models_list,
    needs_known,
    resolve,
)
from claude_proxy.errors import Failure, ProxyError

ALIASES = (
    ("gpt-4o", "claude-code"),
    ("fast", "haiku"),
    ("claude-old", "claude-sonnet-5"),
    ("opus", "opus[1m]"),
    ("openai/gpt-4o", "sonnet"),
)
ANY = (*ALIASES, ("*", "claude-code"))
KNOWN = ("opus[1m]", "sonnet", "sonnet[1m]", "opus")
NAMES = ["claude-code", *(name for name, _ in ALIASES), "opus[1m]", "sonnet", "sonnet[1m]"]
CREATED = 1_795_000_000


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("claude-code", None),
        ("gpt-4o", None),
        ("fast", "haiku"),
        ("claude-old", "claude-sonnet-5"),
        ("opus", "opus[1m]"),
        ("openai/gpt-4o", "sonnet"),
        ("claude-opus-4-8[1m]", "claude-opus-4-8[1m]"),
        ("claude-sonnet-4@20250514", "claude-sonnet-4@20250514"),
        ("sonnet[1m]", "sonnet[1m]"),
    ],
)
def test_a_name_means_a_model(name: str, model: str | None) -> None:
    assert resolve(name, ALIASES, KNOWN) == model
    assert resolve(name, ANY, KNOWN) == model


@pytest.mark.parametrize(
    "name",
    [
        "gpt-5",
        "haiku",
        "GPT-4O",
        "Sonnet",
        "default",
        "anthropic/claude-sonnet-5",
        "anthropic/sonnet",
        "claude",
        "claude-",
        "claude-x y",
        "claude-x\n",
        "claude-x\0",
        "claude-" + "x" * 250,
        "",
        "*",
    ],
)
def test_another_name_is_not_found_unless_every_name_is_taken(name: str) -> None:
    with pytest.raises(ProxyError) as caught:
        resolve(name, ALIASES, KNOWN)
    error = caught.value
    assert (error.failure, error.param) == (Failure.MODEL_NOT_FOUND, "model")
    assert error.failure.status == 404
    assert f"There are: {', '.join(NAMES)}, and every name" in error.message
    assert "MODEL_ALIASES" in error.message
    assert resolve(name, ANY, KNOWN) is None
    assert resolve(name, (("*", "opus"),), KNOWN) == "opus"


def test_a_long_name_is_not_told_in_full() -> None:
    with pytest.raises(ProxyError) as caught:
        resolve("x" * 1_000_000, (), ())
    assert f"'{'x' * 80}...'" in caught.value.message
    assert len(caught.value.message) < 400


def test_an_alias_of_an_alias_is_not_followed() -> None:
    aliases = (("a", "b"), ("b", "sonnet"))
    assert resolve("a", aliases, ()) == "b"


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("claude-code", False),
        ("gpt-4o", False),
        ("claude-sonnet-5", False),
        ("sonnet", True),
        ("gpt-5", True),
        ("claude-x y", True),
    ],
)
def test_the_cli_is_asked_only_where_it_matters(name: str, *, needed: bool) -> None:
    assert needs_known(name, ALIASES) is needed
    assert needs_known(name, ANY) is needed


@given(name=st.text() | st.from_regex(r"claude-\S*"), every=st.booleans())
def test_what_needs_no_list_means_the_same_with_and_without_one(name: str, *, every: bool) -> None:
    aliases = ANY if every else ALIASES
    if needs_known(name, aliases):
        return
    assert resolve(name, aliases, ()) == resolve(name, aliases, KNOWN)


def test_the_list_is_in_openai_s_form() -> None:
    body = models_list(ANY, KNOWN, CREATED)
    page = SyncPage[Model].model_validate_json(body, strict=True)
    assert (page.object, [model.id for model in page.data]) == ("list", NAMES)
    assert json.loads(body)["data"][0] == {
        "id": "claude-code",
        "object": "model",
        "created": CREATED,
        "owned_by": "anthropic",
    }
    for entry in json.loads(body)["data"]:
        assert Model.model_validate(entry, strict=True).to_dict() == entry


def test_without_a_cli_and_aliases_there_is_still_the_default() -> None:
    assert [entry["id"] for entry in json.loads(models_list((), (), 0))["data"]] == ["claude-code"]


@pytest.mark.parametrize("name", [*NAMES, "claude-opus-4-8[1m]", "claude-us/x"])
def test_every_name_that_is_accepted_can_be_looked_up(name: str) -> None:
    body = model_entry(name, ALIASES, KNOWN, CREATED)
    model = Model.model_validate_json(body, strict=True)
    assert (model.id, model.object, model.created) == (name, "model", CREATED)


def test_a_name_that_is_not_accepted_cannot_be_looked_up() -> None:
    with pytest.raises(ProxyError) as caught:
        model_entry("gpt-5", ALIASES, KNOWN, CREATED)
    assert caught.value.failure is Failure.MODEL_NOT_FOUND
    assert json.loads(model_entry("gpt-5", ANY, KNOWN, CREATED))["id"] == "gpt-5"

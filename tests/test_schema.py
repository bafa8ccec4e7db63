"""The JSON Schema of an answer: what is taken, what is changed, what is refused."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator

from claude_proxy.dialects.schema import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, checked_schema
from claude_proxy.errors import Failure, ProxyError

WHERE = "response_format.json_schema.schema"


def refused(schema: object) -> str:
    with pytest.raises(ProxyError) as caught:
        checked_schema(schema, WHERE)
    assert (caught.value.failure, caught.value.param) == (Failure.INVALID_VALUE, WHERE)
    return caught.value.message


def in_property(schema: object) -> dict[str, Any]:
    """A schema of an object with this one in it."""
    return {"type": "object", "properties": {"a": schema}}


PERSON: dict[str, Any] = {
    "title": "Person",
    "type": "object",
    "description": "Somebody.",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 80, "pattern": "^[A-Z][a-z-]+$"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 200, "default": 1},
        "size": {"anyOf": [{"type": "number", "multipleOf": 0.5}, {"type": "null"}]},
        "kind": {"enum": ["a", 1, None]},
        "fixed": {"const": {"x": [1]}},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        "friend": {"$ref": "#/$defs/Friend"},
        "more": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "any": True,
        "not": {"not": {"type": "null"}},
        "if": {"if": {"type": "string"}, "then": {"minLength": 1}, "else": False},
        "free": {"type": "object", "patternProperties": {"^x": {}}, "propertyNames": {}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"Friend": {"type": "object", "properties": {"of": {"$ref": "#"}}}},
}


def test_a_common_schema_comes_through_as_it_is() -> None:
    assert checked_schema(PERSON, WHERE) == PERSON


@pytest.mark.parametrize(
    "hint",
    [
        {"$schema": "https://json-schema.org/draft/2020-12/schema"},
        {"$id": "https://example.com/person"},
        {"$comment": "x"},
        {"discriminator": {"propertyName": "kind"}},
        {"x-order": 3},
        {"example": "x"},
        {"readOnly": True},
        {"nullable": True},
        {"then": {"type": "string"}},
        {"if": {"type": "string"}},
    ],
)
def test_what_limits_nothing_is_dropped(hint: dict[str, Any]) -> None:
    assert checked_schema(in_property(hint), WHERE) == in_property({})


def test_a_format_is_told_in_words() -> None:
    schema = in_property({"type": "string", "format": "date-time", "description": "When."})
    expected = in_property({"type": "string", "description": "When. (format: date-time)"})
    assert checked_schema(schema, WHERE) == expected


@pytest.mark.parametrize("schema", [{}, {"properties": {"a": {}}}, {"required": ["a"]}])
def test_an_object_is_said_to_be_one(schema: dict[str, Any]) -> None:
    assert checked_schema(schema, WHERE) == {**schema, "type": "object"}


@pytest.mark.parametrize("name", ["$defs", "definitions"])
def test_a_reference_at_the_root_is_followed(name: str) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": f"#/{name}/No~1de%20"}}}
    schema = {name: {"No/de ": node}, "$ref": f"#/{name}/No~1de%20"}
    assert checked_schema(schema, WHERE) == {**node, name: {"No/de ": node}}


@pytest.mark.parametrize("schema", [None, [], "x", 1, True])
def test_a_schema_must_be_there(schema: object) -> None:
    assert "is required, and must be a JSON Schema object" in refused(schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "'$.properties[...].type'"),
        ({"type": []}, "type"),
        ({"type": ["null", "null"]}, "'type' must not name anything twice"),
        ({"type": 1}, "type"),
        ({"type": None}, "type"),
        ({"properties": []}, "properties"),
        ({"properties": {"x": 1}}, "properties"),
        ({"required": "x"}, "required"),
        ({"required": ["x", "x"]}, "'required' must not name anything twice"),
        ({"required": [1]}, "required"),
        ({"enum": []}, "enum"),
        ({"enum": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}, "'enum' must not hold anything twice"),
        ({"anyOf": []}, "anyOf"),
        ({"oneOf": {}}, "oneOf"),
        ({"allOf": [1]}, "allOf"),
        ({"not": "x"}, "not"),
        ({"minLength": -1}, "minLength"),
        ({"minLength": "1"}, "minLength"),
        ({"multipleOf": 0}, "multipleOf"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"uniqueItems": 1}, "uniqueItems"),
        ({"items": [{}]}, "items"),
        ({"title": 1}, "title"),
        ({"$ref": 1}, "$ref"),
        ({"$defs": {"a": 1}}, "$defs"),
        (1, "properties"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(schema: object, said: str) -> None:
    message = refused(in_property(schema))
    assert "is not a JSON Schema that can be used" in message
    assert said in message


@pytest.mark.parametrize(
    "keyword",
    [
        "prefixItems",
        "minContains",
        "maxContains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
    ],
)
def test_what_an_answer_cannot_be_held_to_is_refused_rather_than_lost(keyword: str) -> None:
    assert f"an answer cannot be held to '{keyword}'" in refused(in_property({keyword: {}}))


@pytest.mark.parametrize(
    "ref",
    [
        "http://127.0.0.1:9/schema.json",
        "file:///etc/passwd",
        "other.json#/a",
        "#/$defs/missing",
        "#/properties/a/$ref",
        "#/required/0/x",
        "#/required/9",
        "#anchor",
        "",
        "#/" + "a/" * 30_000,
    ],
)
def test_a_reference_points_into_the_schema_and_nothing_is_fetched(ref: str) -> None:
    schema = {**in_property({"$ref": ref}), "required": ["a"]}
    assert "must point to a part of the schema" in refused(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {}},
        {"type": "string"},
        {"type": ["object", "null"]},
        {"anyOf": [{"type": "object"}]},
        {"oneOf": [{"type": "object"}], "type": "object"},
        {"allOf": [{"type": "object"}]},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": True}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
    ],
)
def test_the_root_must_be_an_object(schema: dict[str, Any]) -> None:
    assert "must describe an object at its root" in refused(schema)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^a|b$",
        r"^\d{3}(?:-\d{2,})?$",
        r"[\w.+-]+@[^\s@]+\.\w{2,}?",
        r"(?<year>\d+)(?=x)(?!y)(?<=z)(?<!w)\/\u00e9\x41",
        r"[\]\-\b]*",
        "ü+😀",
    ],
)
def test_patterns_of_javascript_are_taken(pattern: str) -> None:
    schema = {**in_property({"pattern": pattern}), "patternProperties": {pattern: {}}}
    assert checked_schema(schema, WHERE) == schema


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a)",
        "[a",
        "]",
        "a**",
        "*a",
        "a++",
        "{",
        "a{,3}",
        "(?P<x>a)",
        "(?i)a",
        "\\",
        r"\-",
        r"\Z",
    ],
)
@pytest.mark.parametrize("keyword", ["pattern", "patternProperties"])
def test_other_patterns_are_refused(pattern: str, keyword: str) -> None:
    value: Any = pattern if keyword == "pattern" else {pattern: {}}
    assert "JavaScript" in refused(in_property({keyword: value}))


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def test_a_schema_may_be_as_deep_as_is_said_and_no_deeper() -> None:
    checked_schema(nested(MAX_SCHEMA_DEPTH), WHERE)
    for levels in (MAX_SCHEMA_DEPTH + 1, 900):
        assert f"at most {MAX_SCHEMA_DEPTH} levels" in refused(nested(levels))


def test_a_schema_may_be_as_large_as_is_said_and_no_larger() -> None:
    frame = len(json.dumps({"title": ""}, separators=(",", ":")))
    checked_schema({"title": "x" * (MAX_SCHEMA_BYTES - frame)}, WHERE)
    message = refused({"title": "x" * (MAX_SCHEMA_BYTES - frame + 1)})
    assert "at most 128 KiB" in message


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {} for i in range(10_000)}},
        {"properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(3500)}, "$defs": {"a": {}}},
        {"enum": [[i] for i in range(15_000)]},
        {"type": [i if i % 2 else str(i) for i in range(15_000)]},
        {"required": [str(i) for i in range(13_000)]},
        {"pattern": "a?" * 60_000},
        {"pattern": "[a" * 60_000},
        {"pattern": "(" * 120_000},
        {"default": ["x" * 10] * 1_000_000},
        {"$ref": "#" + "/a" * 60_000},
    ],
)
def test_a_hostile_schema_takes_little_time(schema: dict[str, Any]) -> None:
    began = time.process_time()
    with suppress(ProxyError):
        checked_schema(schema, WHERE)
    # A tenth of that is usual: a general validator takes two to hundreds of seconds.
    assert time.process_time() - began < 1


TYPES = st.sampled_from(["string", "object", "array", "null", "nope"])
COUNTS = st.integers(-1, 3)
VALUES = st.recursive(
    st.none() | st.booleans() | COUNTS | st.text("a", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab$"), inner, max_size=2),
    max_leaves=4,
)


def schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    several = st.lists(inner, max_size=2)
    known = {
        "type": TYPES | st.lists(TYPES, max_size=2),
        "properties": named,
        "required": st.lists(st.sampled_from("ab"), max_size=2),
        "items": inner | several,
        "anyOf": several,
        "not": inner,
        "if": inner,
        "then": inner,
        "additionalProperties": inner,
        "$defs": named,
        "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/b", "nope"]),
        "enum": st.lists(VALUES, max_size=2),
        "const": VALUES,
        "minLength": COUNTS,
        "multipleOf": COUNTS,
        "maximum": COUNTS,
        "uniqueItems": st.booleans() | COUNTS,
        "pattern": st.text("a(b)[]*+", max_size=4),
        "format": st.just("date"),
        "x-other": VALUES,
    }
    return st.fixed_dictionaries({}, optional={name: one | VALUES for name, one in known.items()})


SCHEMAS: st.SearchStrategy[Any] = st.recursive(st.booleans() | st.just({}), schemas, max_leaves=4)


@settings(max_examples=300)
@given(SCHEMAS)
def test_what_is_taken_is_a_schema_of_both_drafts(schema: object) -> None:
    with suppress(ProxyError):
        taken = checked_schema(schema, WHERE)
        Draft7Validator.check_schema(taken)
        Draft202012Validator.check_schema(taken)
        assert taken["type"] == "object"
        assert checked_schema(taken, WHERE) == taken


@given(VALUES, VALUES)
def test_no_value_fails_in_another_way(schema: object, inner: object) -> None:
    for one in (schema, in_property(inner)):
        with suppress(ProxyError):
            assert isinstance(checked_schema(one, WHERE), dict)

"""The document for programs: it says what the code does, all of it and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from claude_proxy.dialects import chat, native
from claude_proxy.dialects.content import REASONING_PARTS, TEXT_PARTS
from claude_proxy.dialects.messages import ROLES
from claude_proxy.dialects.shapes import (
    AssistantMessage,
    ReasoningPart,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from claude_proxy.errors import Failure, ProxyError
from claude_proxy.web import openapi
from claude_proxy.web.api import JSON_PATHS, PUBLIC_PATHS, Api
from claude_proxy.web.operations import OPERATIONS, Operation
from tests.test_api import World

DOCUMENT: dict[str, Any] = json.loads(openapi.encoded(keys=True))
SESSION = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
USER = {"role": "user", "content": "hi"}
STRANGE = [
    *(None, "", "x", "a b", " ", "\n", "\0", "\x1f", "\x85", ".", "..", "a/b", "x" * 300, "low"),
    *(True, False, 0, 1, 1.0, -1, 1.5, 2**31, 10**30, [], {}, [None], [1], [""], ["x"], ["a\nb"]),
    *(["x" * 1024], ["x" * 1025], ["x"] * 257, {"a": 1}, SESSION, SESSION.upper()),
    *("plan", "claude-x[1m]", "mcp__a__b", {"include_usage": True}, {"include_usage": "yes"}),
    *({"include_usage": None}, {"fork": None}, {"session-id": ""}, {"session-id": "x"}),
    *({"workspace": "a", "max-turns": 2}, {"max-turns": 0}, {"unknown": None}),
    *({"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "xml"}),
    *(
        {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
    ),
    *("auto", "none", "required", ["text"], ["text", "audio"], "minimal"),
    *(
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required"}},
        {"type": "function", "function": {"name": "f"}},
    ),
]
"""Values that some field takes and others do not."""


def schema_of(name: str) -> Draft202012Validator:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return Draft202012Validator({**reference, "components": DOCUMENT["components"]})


def is_accepted(decode: Callable[[bytes], object], body: dict[str, Any]) -> bool:
    try:
        decode(json.dumps(body).encode())
    except ProxyError as error:
        return error.failure is not Failure.INVALID_VALUE
    return True


def decode_chat(body: bytes) -> object:
    return chat.decode_request(body, text_parameters="all", conversation=None, session_header=None)


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def resolved(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of the document, or the shared one that it refers to."""
    name = answer.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = DOCUMENT["components"]["responses"][name] if name else answer
    return found


# What there is.


def test_it_has_every_route_and_nothing_else() -> None:
    routes = {
        (method, re.sub(r"<[^>]*>", "{}", rule.rule))
        for rule in Api.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    documented = {(method, re.sub(r"{[^}]*}", "{}", path)) for method, path, _ in operations()}
    assert documented == routes


def test_the_gate_and_the_document_agree() -> None:
    public = {path for _, path, operation in operations() if operation.get("security") == []}
    assert public == PUBLIC_PATHS
    with_body = {path for _, path, operation in operations() if "requestBody" in operation}
    assert with_body == JSON_PATHS


def test_an_open_server_asks_for_no_key() -> None:
    with_keys, without = openapi.document(keys=True), openapi.document(keys=False)
    assert {} not in with_keys["security"]
    assert without.pop("security") == [*with_keys.pop("security"), {}]
    assert without == with_keys


def test_every_failure_is_told_somewhere_by_its_status_and_code() -> None:
    told = set()
    for _, _, operation in operations():
        for status, answer in operation["responses"].items():
            if "$ref" not in answer:
                continue
            media = resolved(answer)["content"]["application/json"]
            codes = media["schema"]["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"]
            assert set(codes) == set(media["examples"])
            told |= {(code, int(status)) for code in codes}
    of_others = {Failure.METHOD_NOT_ALLOWED}
    expected = {(one.code, one.status) for one in Failure if one not in of_others}
    assert told == expected


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_an_operation_s_failures_are_those_of_its_row(operation: Operation) -> None:
    answers = DOCUMENT["paths"][operation.path][operation.method.lower()]["responses"]
    statuses = {failure.status for failure in operation.failures} | set(operation.answers)
    assert {int(status) for status in answers} == statuses


def test_names_of_operations_are_unique() -> None:
    names = [operation.name for operation in OPERATIONS]
    assert len(set(names)) == len(names)


def test_answers_that_are_shared_mean_the_same_everywhere() -> None:
    # They are kept by their codes alone; what else is told of them must not differ.
    seen: dict[str, Any] = {}
    for operation in OPERATIONS:
        responses: dict[str, Any] = {}
        openapi._operation(operation, responses)
        for name, response in responses.items():
            assert seen.setdefault(name, response) == response


def test_every_reference_leads_somewhere() -> None:
    text = openapi.encoded(keys=True).decode()
    references = set(re.findall(r'"\$ref":"#/([^"]*)"', text))
    assert references
    for reference in references:
        found: Any = DOCUMENT
        for step in reference.split("/"):
            found = found[step]


def test_the_parameters_of_a_path_are_told() -> None:
    for _, path, operation in operations():
        told = [one["name"] for one in operation["parameters"] if one["in"] == "path"]
        assert told == re.findall(r"{([^}]*)}", path)


def test_the_sentence_for_unknown_paths_names_every_path() -> None:
    sentence = World().ask("GET", "/nothing").json["error"]["message"]
    for _, path, _ in operations():
        assert re.sub(r"{[^}]*}", "ID", path) in sentence


def test_it_is_served_to_who_has_a_key() -> None:
    world = World()
    answer = world.ask("GET", "/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == DOCUMENT
    assert world.ask("GET", "/openapi.json", X_Api_Key="wrong").status == 401


# What requests may hold.


def test_the_examples_of_requests_are_accepted() -> None:
    decoders = {"/api/claude": native.decode_request, "/v1/chat/completions": decode_chat}
    for path, decode in decoders.items():
        media = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = media["schema"]["$ref"].rpartition("/")[2]
        for example in media["examples"].values():
            schema_of(name).validate(example["value"])
            assert is_accepted(decode, example["value"])


_BY_HAND = {"fork": [True]}
"""What the types allow and the server refuses: without its session nothing can be copied."""


@pytest.mark.parametrize("field", DOCUMENT["components"]["schemas"]["NativeRequest"]["properties"])
def test_a_field_takes_what_its_schema_says(field: str) -> None:
    schema = schema_of("NativeRequest")
    agreed = set()
    for value in STRANGE:
        if value in _BY_HAND.get(field, []) and value is True:
            continue
        body = {"prompt": "hi", field: value}
        if field == "workspace" and isinstance(value, str) and value:
            continue  # is looked at when the workspace is made
        valid = schema.is_valid(body)
        if field in ("mcp-allowed-tools", "permission-mode") and not valid:
            continue  # is looked at when the configuration, or the CLI's version, is known
        assert is_accepted(native.decode_request, body) == valid, value
        agreed.add(valid)
    assert agreed


def test_an_unknown_field_is_refused_by_schema_and_server() -> None:
    body = {"prompt": "hi", "allowed_tools": None}
    assert not schema_of("NativeRequest").is_valid(body)
    assert not is_accepted(native.decode_request, body)


@pytest.mark.parametrize(
    "field",
    sorted(
        set(DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]["properties"]) - {"messages"}
    ),
)
def test_a_field_of_a_chat_takes_what_its_schema_says(field: str) -> None:
    schema = schema_of("ChatCompletionRequest")
    for value in STRANGE:
        body = {"messages": [USER], field: value}
        assert is_accepted(decode_chat, body) == schema.is_valid(body), value


_CONTENTS: list[Any] = [
    *(None, "", "hi", 1, True, {}, [], [None], ["x"], [{}], [{"type": 1}], [{"type": "x"}]),
    *([{"type": "text"}], [{"type": "text", "text": "x"}], [{"type": "text", "text": 1}]),
    *([{"type": "output_text", "text": "x"}], [{"type": "refusal", "refusal": "no"}]),
    *([{"type": "refusal", "text": "no"}], [{"type": "thinking", "thinking": 3}]),
    *([{"type": "input_audio"}], [{"type": "file"}], [{"type": "input_file"}]),
    *(
        [{"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}}],
        [{"type": "image_url", "image_url": "https://a/b.png"}],
        [{"type": "image_url", "image_url": "http://a/b.png"}],
        [{"type": "image_url", "image_url": {}}],
        [{"type": "image_url"}],
        [{"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0="}}],
        [{"type": "file", "file": {"file_id": "f"}}],
        [{"type": "input_file", "file_data": "data:application/pdf;base64,JVBERi0="}],
    ),
]


@pytest.mark.parametrize("role", [*ROLES, "robot", None, 1])
def test_a_message_takes_the_content_that_its_schema_says(role: Any) -> None:
    schema = schema_of("ChatCompletionRequest")
    for content in _CONTENTS:
        # Not the first one, because a system prompt must be text.
        body = {"messages": [USER, {"role": role, "content": content}, USER]}
        assert is_accepted(decode_chat, body) == schema.is_valid(body), content


@pytest.mark.parametrize(
    "calls",
    [
        *(None, [], "x", [None], [{}], [{"function": None}], [{"function": {}}]),
        *([{"function": {"name": "f"}}], [{"function": {"name": "f", "arguments": {"a": 1}}}]),
        *([{"function": {"name": 1}}], [{"type": "custom", "custom": {"name": "f"}}]),
    ],
)
def test_calls_of_tools_are_as_their_schema_says(calls: Any) -> None:
    schema = schema_of("ChatCompletionRequest")
    for role in ("assistant", "user"):
        body = {"messages": [USER, {"role": role, "content": "x", "tool_calls": calls}, USER]}
        assert is_accepted(decode_chat, body) == schema.is_valid(body)


@pytest.mark.parametrize("messages", [None, [], "x", {}, [None], [USER, 1]])
def test_messages_are_as_their_schema_says(messages: Any) -> None:
    body = {"messages": messages}
    assert not schema_of("ChatCompletionRequest").is_valid(body)
    assert not is_accepted(decode_chat, body)


def _words(of: type, field: str) -> set[str]:
    schema = DOCUMENT["components"]["schemas"][of.__name__]["properties"][field]
    return set(schema["enum"])


def test_the_words_of_the_shapes_are_those_that_are_read() -> None:
    messages = (SystemMessage, UserMessage, AssistantMessage, ToolMessage)
    assert set().union(*(_words(one, "role") for one in messages)) == set(ROLES)
    assert _words(TextPart, "type") | _words(RefusalPart, "type") == set(TEXT_PARTS)
    assert _words(ReasoningPart, "type") == REASONING_PARTS


# What answers hold.


def test_the_examples_of_answers_are_as_their_schemas_say() -> None:
    checked = 0
    for _, _, operation in operations():
        for answer in operation["responses"].values():
            for media in resolved(answer)["content"].values():
                examples = [one["value"] for one in media.get("examples", {}).values()]
                examples += [media["example"]] if "example" in media else []
                for example in examples:
                    root = {**media["schema"], "components": DOCUMENT["components"]}
                    Draft202012Validator(root).validate(example)
                    checked += 1
    assert checked > 40

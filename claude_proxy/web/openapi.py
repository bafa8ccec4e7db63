"""
The description of the interface for programs: ``GET /openapi.json``.

Schemas come from the types by which requests are checked and of which answers are made, codes and
sentences of failures from their catalogue.  What remains to be put together is here.  Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec

from claude_proxy import __version__
from claude_proxy.dialects.chat import ChatCompletionRequest, StreamOptions
from claude_proxy.dialects.fields import TurnFields
from claude_proxy.dialects.native import NativeRequest
from claude_proxy.dialects.sampling import IGNORED_FIELDS, TAKEN_VALUES
from claude_proxy.dialects.shapes import RECEIVED, reference
from claude_proxy.errors import ErrorEnvelope, Failure, ProxyError
from claude_proxy.web.operations import EDGE, OPERATIONS, Answer, Events, Operation, Parameter

__all__ = ["document", "encoded"]

_REQUESTS = (NativeRequest, ChatCompletionRequest, TurnFields, StreamOptions)
"""What requests are converted to: in an optional field of these, null and ``""`` mean absent."""

_TEMPLATE = "#/components/schemas/{name}"

_NULL = {"type": "null"}

_ABSENT = {
    "description": "Means the same as leaving the field out.",
    "anyOf": [_NULL, {"type": "string", "const": ""}],
}

_HEADERS: Mapping[str, Mapping[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's name in the server's log.",
        "required": True,
        "schema": {"type": "string"},
    },
    "X-Claude-Session-Id": {
        "description": "The session's id, where it is known.",
        "schema": {"type": "string"},
    },
    "X-Should-Retry": {
        "description": "For SDKs: do not repeat what took long, changed files or was interrupted.",
        "schema": {"type": "string", "const": "false"},
    },
    "Retry-After": {
        "description": "Seconds after which a repetition may succeed, where they are known.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {
        "description": "How to send a key.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
    "Cache-Control": {
        "description": "Tells proxies not to keep the answer.",
        "schema": {"type": "string"},
    },
    "X-Accel-Buffering": {
        "description": "Tells proxies not to hold back a stream.",
        "schema": {"type": "string", "const": "no"},
    },
}

_OF_STATUS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
"""The headers that belong to a status."""

_ABOUT = (
    "The Claude Code agent behind HTTP: its own dialect, and that of OpenAI's chat completions. "
    "Whoever has a key can run an agent on the server's machine."
)

_TAGS = {
    "turns": "Turns of the agent, with its own events.",
    "openai": "For clients of OpenAI's API.",
    "sessions": "The sessions of the caller's key.",
    "server": "The server itself.",
}


@cache
def encoded(*, keys: bool) -> bytes:
    """
    The document as JSON; made once.

    @param keys: whether the server has any, so that requests need one.
    """
    return msgspec.json.encode(document(keys=keys))


def document(*, keys: bool) -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    responses: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        methods = paths.setdefault(operation.path, {})
        methods[operation.method.lower()] = _operation(operation, responses)
    needed: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "claude-code-proxy",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        # Without keys they may be sent all the same: clients cannot do without.
        "security": needed if keys else [*needed, {}],
        "tags": [{"name": name, "description": about} for name, about in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": dict(sorted(responses.items())),
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


# The schemas.


def _schemas() -> dict[str, Any]:
    """All that have a name."""
    types = [*_REQUESTS, *RECEIVED, ErrorEnvelope]
    for operation in OPERATIONS:
        for answer in operation.answers.values():
            for body in answer.bodies.values():
                types += body.data if isinstance(body, Events) else [body]
    _, schemas = msgspec.json.schema_components(types, ref_template=_TEMPLATE)
    for request in _REQUESTS:
        _forgive(schemas[request.__name__])
    for schema in schemas.values():
        for field in schema["properties"].values():
            if field.get("type") == "array":
                field.setdefault("items", {})  # there are generators that cannot do without
    chat = schemas[ChatCompletionRequest.__name__]["properties"]
    for name, taken in TAKEN_VALUES.items():
        options = [*taken.get("anyOf", [taken]), _NULL]
        chat[name] = {"anyOf": options} if taken != _NULL else taken
    chat |= {name: {"description": f"No effect: {why}."} for name, why in IGNORED_FIELDS.items()}
    schemas["Absent"] = _ABSENT
    return dict(sorted(schemas.items()))


def _forgive(schema: dict[str, Any]) -> None:
    """Let null and the empty string stand for an optional field that is left out."""
    for name, field in schema["properties"].items():
        if name in schema["required"]:
            continue
        kept = {key: field.pop(key) for key in ("description", "default") if key in field}
        if kept.get("default") is None:
            kept.pop("default", None)
        # What a reference stands for has a type of its own.
        options = [_plain(option) for option in field.pop("anyOf", [field])]
        taken = [option for option in options if option != _NULL]
        field.clear()
        field |= {**kept, "anyOf": [*taken, {"$ref": _TEMPLATE.format(name="Absent")}]}


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"$ref": schema["$ref"]} if "$ref" in schema else dict(schema)


def _schema(of: Any) -> dict[str, Any]:
    """The schema of a type, by reference where it has a name."""
    (schema,), _ = msgspec.json.schema_components([of], ref_template=_TEMPLATE)
    return schema


# The operations.


def _operation(operation: Operation, responses: dict[str, Any]) -> dict[str, Any]:
    """@param responses: receives the answers that several operations share."""
    told: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
        "parameters": [_parameter(parameter) for parameter in operation.parameters],
    }
    if operation.request is not None:
        examples = {name: {"value": value} for name, value in operation.requests.items()}
        schema = {"$ref": reference(operation.request)}
        body = {"schema": schema, "examples": examples}
        told["requestBody"] = {"required": True, "content": {"application/json": body}}
    answers = {status: _answer(answer) for status, answer in operation.answers.items()}
    by_status: dict[int, list[Failure]] = {}
    for failure in Failure:
        if failure in operation.failures:
            by_status.setdefault(failure.status, []).append(failure)
    for status, failures in by_status.items():
        if status in answers:  # an answer of its own kind, as the health report is
            _also(answers[status], failures)
            continue
        name = "Or".join(_camel(failure.code) for failure in failures)
        headers = operation.failure_headers if not EDGE.issuperset(failures) else ()
        responses[name] = _failed(status, failures, headers)
        answers[status] = {"$ref": f"#/components/responses/{name}"}
    told["responses"] = {str(status): answers[status] for status in sorted(answers)}
    if operation.public:
        told["security"] = []
    return told


def _parameter(parameter: Parameter) -> dict[str, Any]:
    required = parameter.place == "path"
    schema = _schema(parameter.type)
    if not required:
        schema = _or_empty(schema)
    told = {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "required": required,
        "schema": schema,
    }
    return told if parameter.example is None else {**told, "example": parameter.example}


def _or_empty(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a parameter that may be empty, too."""
    if schema["type"] != "string":
        return {"anyOf": [schema, {"type": "string", "const": ""}]}
    if "pattern" not in schema:
        return dict(schema)
    # In one piece: there are generators that take no unions here.
    return {"type": "string", "pattern": schema["pattern"].removesuffix("$") + "?$"}


def _answer(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media_type, body in answer.bodies.items():
        schema = _event(body) if isinstance(body, Events) else _schema(body)
        content[media_type] = {"schema": schema}
        if media_type in answer.examples:
            content[media_type]["example"] = answer.examples[media_type]
    return {
        "description": answer.description,
        "headers": _headers(("X-Request-Id", *answer.headers)),
        "content": content,
    }


def _event(events: Events) -> dict[str, Any]:
    """
    One event of a stream.

    In OpenAPI 3.1 there is no word for the items of a stream; that the schema of a stream is that
    of its events is the custom.
    """
    options = [{"$ref": reference(one)} for one in events.data]
    data: list[dict[str, Any]] = [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": options},
        }
    ]
    if events.last is not None:
        data.insert(0, {"type": "string", "const": events.last})
    return {
        "description": "One event of the stream.",
        "type": "object",
        "required": ["data"],
        "properties": {"data": data[0] if len(data) == 1 else {"anyOf": data}},
    }


def _failed(status: int, failures: list[Failure], headers: Iterable[str]) -> dict[str, Any]:
    codes = {"type": "string", "enum": [failure.code for failure in failures]}
    exact = {"properties": {"error": {"properties": {"code": codes}}}}
    return {
        "description": _sentences(failures),
        "headers": _headers(("X-Request-Id", *_OF_STATUS.get(status, ()), *headers)),
        "content": {
            "application/json": {
                "schema": {"allOf": [{"$ref": reference(ErrorEnvelope)}, exact]},
                "examples": {
                    failure.code: {"value": ProxyError(failure).envelope()} for failure in failures
                },
            }
        },
    }


def _also(answer: dict[str, Any], failures: list[Failure]) -> None:
    """Let an answer be a failure as well."""
    answer["description"] += " Or: " + _sentences(failures)
    body = answer["content"]["application/json"]
    body["schema"] = {"anyOf": [body["schema"], {"$ref": reference(ErrorEnvelope)}]}


def _sentences(failures: Iterable[Failure]) -> str:
    return " ".join(f"`{failure.code}`: {failure.sentence}" for failure in failures)


def _headers(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _camel(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("_"))

"""
The JSON Schema that an answer must have, in the form that the CLI takes.

The CLI compiles the schema with a strict validator of draft 7, and the model's provider reads it as
draft 2020-12.  What either refuses makes the CLI answer in prose without a word, or fails upstream.
So a schema is reduced here to what both take: hints that limit nothing are dropped, a ``format`` is
told in the description, and what would limit the answer but cannot be held to is refused.

The check is one typed conversion, in time linear in the size: a general validator of JSON Schema
takes seconds for a schema of this size, and would hold up every other request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, Meta, UnsetType

from claude_proxy.dialects.fields import refusal
from claude_proxy.errors import ProxyError

__all__ = ["MAX_SCHEMA_BYTES", "MAX_SCHEMA_DEPTH", "checked_schema"]

MAX_SCHEMA_BYTES = 128 * 1024
"""The largest schema, as compact JSON."""

MAX_SCHEMA_DEPTH = 64
"""How deep its objects and lists may be nested."""

_Type = Literal["string", "number", "integer", "boolean", "object", "array", "null"]
_Count = Annotated[int, Meta(ge=0)] | UnsetType
_Number = int | float | UnsetType
_Step = Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0)] | UnsetType

_NAMES = {
    "ref": "$ref",
    "defs": "$defs",
    "all_of": "allOf",
    "any_of": "anyOf",
    "one_of": "oneOf",
    "not_": "not",
    "if_": "if",
    "else_": "else",
    "pattern_properties": "patternProperties",
    "additional_properties": "additionalProperties",
    "property_names": "propertyNames",
    "min_properties": "minProperties",
    "max_properties": "maxProperties",
    "min_items": "minItems",
    "max_items": "maxItems",
    "unique_items": "uniqueItems",
    "min_length": "minLength",
    "max_length": "maxLength",
    "exclusive_minimum": "exclusiveMinimum",
    "exclusive_maximum": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "prefix_items": "prefixItems",
    "min_contains": "minContains",
    "max_contains": "maxContains",
    "dependent_required": "dependentRequired",
    "dependent_schemas": "dependentSchemas",
    "unevaluated_items": "unevaluatedItems",
    "unevaluated_properties": "unevaluatedProperties",
    "dynamic_ref": "$dynamicRef",
}

_NOT_HELD = (
    "prefix_items",
    "min_contains",
    "max_contains",
    "dependencies",
    "dependent_required",
    "dependent_schemas",
    "unevaluated_items",
    "unevaluated_properties",
    "dynamic_ref",
)
"""Keywords that would limit an answer, but not in both drafts."""


class _Schema(msgspec.Struct, rename=_NAMES, kw_only=True):
    """One schema; keywords that are not named here are dropped."""

    ref: str | UnsetType = UNSET
    defs: dict[str, bool | _Schema] | UnsetType = UNSET
    definitions: dict[str, bool | _Schema] | UnsetType = UNSET
    title: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    default: Any = UNSET
    examples: list[Any] | UnsetType = UNSET
    format: str | UnsetType = UNSET
    type: _Type | Annotated[list[_Type], Meta(min_length=1)] | UnsetType = UNSET
    nullable: bool | UnsetType = UNSET
    enum: Annotated[list[Any], Meta(min_length=1)] | UnsetType = UNSET
    const: Any = UNSET
    all_of: Annotated[list[bool | _Schema], Meta(min_length=1)] | UnsetType = UNSET
    any_of: Annotated[list[bool | _Schema], Meta(min_length=1)] | UnsetType = UNSET
    one_of: Annotated[list[bool | _Schema], Meta(min_length=1)] | UnsetType = UNSET
    not_: bool | _Schema | UnsetType = UNSET
    if_: bool | _Schema | UnsetType = UNSET
    then: bool | _Schema | UnsetType = UNSET
    else_: bool | _Schema | UnsetType = UNSET
    properties: dict[str, bool | _Schema] | UnsetType = UNSET
    pattern_properties: dict[str, bool | _Schema] | UnsetType = UNSET
    additional_properties: bool | _Schema | UnsetType = UNSET
    property_names: bool | _Schema | UnsetType = UNSET
    required: list[str] | UnsetType = UNSET
    min_properties: _Count = UNSET
    max_properties: _Count = UNSET
    items: bool | _Schema | UnsetType = UNSET
    contains: bool | _Schema | UnsetType = UNSET
    min_items: _Count = UNSET
    max_items: _Count = UNSET
    unique_items: bool | UnsetType = UNSET
    min_length: _Count = UNSET
    max_length: _Count = UNSET
    pattern: str | UnsetType = UNSET
    minimum: _Number = UNSET
    maximum: _Number = UNSET
    exclusive_minimum: _Number = UNSET
    exclusive_maximum: _Number = UNSET
    multiple_of: _Step = UNSET
    prefix_items: Any = UNSET
    min_contains: Any = UNSET
    max_contains: Any = UNSET
    dependencies: Any = UNSET
    dependent_required: Any = UNSET
    dependent_schemas: Any = UNSET
    unevaluated_items: Any = UNSET
    unevaluated_properties: Any = UNSET
    dynamic_ref: Any = UNSET

    def __post_init__(self) -> None:
        """Check what the types do not say; an error is told with the path of this schema."""
        for name in _NOT_HELD:
            if getattr(self, name) is not UNSET:
                keyword = _NAMES.get(name, name)
                raise ValueError(f"an answer cannot be held to '{keyword}'")
        for keyword, values in (("type", self.type), ("required", self.required)):
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"'{keyword}' must not name anything twice")
        if self.enum is not UNSET and len({*map(_sorted_json, self.enum)}) < len(self.enum):
            raise ValueError("'enum' must not hold anything twice")
        patterns = [] if self.pattern is UNSET else [self.pattern]
        patterns += [] if self.pattern_properties is UNSET else self.pattern_properties
        if not all(map(_is_pattern, patterns)):
            what = "a pattern must be a regular expression as JavaScript has them (with its flag u)"
            raise ValueError(what)
        self._tidy()

    def _tidy(self) -> None:
        """Drop what the CLI's validator takes for a mistake although it limits nothing."""
        if self.format is not UNSET:
            hint = f"(format: {self.format})"
            self.description = f"{self.description or ''} {hint}".strip()
            self.format = UNSET
        if self.type is UNSET:
            self.nullable = UNSET
        if self.if_ is UNSET or (self.then is UNSET and self.else_ is UNSET):
            self.if_ = self.then = self.else_ = UNSET


def _sorted_json(value: object) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def checked_schema(schema: object, where: str) -> dict[str, Any]:
    """
    Check a schema and reduce it to what the CLI takes.  Nothing is fetched.

    @param where: the path of the schema in the request.
    @raise ProxyError: INVALID_VALUE; it is no JSON Schema, or none that an answer can be held to.
    """
    if not isinstance(schema, dict):
        raise refusal(where, "is required, and must be a JSON Schema object")
    _check_size(schema, where)
    try:
        typed = msgspec.convert(schema, _Schema)
    except msgspec.ValidationError as error:
        raise _not_a_schema(where, str(error)) from None
    reduced: dict[str, Any] = msgspec.to_builtins(typed)
    for ref in _references(typed):
        if _target(reduced, ref) is None:
            what = f"'$ref' {ref[:100]!r} must point to a part of the schema, as '#/$defs/NAME'"
            raise _not_a_schema(where, what)
    return _with_object_root(reduced, where)


def _not_a_schema(where: str, what: str) -> ProxyError:
    return refusal(where, f"is not a JSON Schema that can be used: {what.replace('`', chr(39))}")


def _check_size(schema: dict[str, Any], where: str) -> None:
    try:
        size = len(msgspec.json.encode(schema))
    except RecursionError:
        raise _too_deep(where) from None
    if size > MAX_SCHEMA_BYTES:
        raise refusal(
            where, f"is too large: at most {MAX_SCHEMA_BYTES // 1024} KiB as compact JSON"
        )
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise _too_deep(where)


def _too_deep(where: str) -> ProxyError:
    return refusal(where, f"is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels")


def _depth(schema: dict[str, Any]) -> int:
    """How deep objects and lists are nested."""
    depth = 0
    level: list[Any] = [schema]
    while level:
        depth += 1
        children = (
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
        )
        level = [child for child in children if isinstance(child, dict | list)]
    return depth


def _references(root: _Schema) -> Iterator[str]:
    """Every ``$ref``."""
    waiting: list[Any] = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, _Schema):
            if schema.ref is not UNSET:
                yield schema.ref
            for value in msgspec.structs.astuple(schema):
                if isinstance(value, list):
                    waiting += value
                elif isinstance(value, dict):
                    waiting += value.values()
                else:
                    waiting.append(value)


_INDEX = re.compile(r"[0-9]{1,6}")


def _target(root: dict[str, Any], ref: str) -> dict[str, Any] | bool | None:
    """What a ``$ref`` points to, None if that is no schema in here."""
    start, _, path = ref.partition("/")
    if start != "#":
        return None
    target: Any = root
    for step in path.split("/") if path else ():
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict):
            target = target.get(key)
        elif isinstance(target, list) and _INDEX.fullmatch(key):
            target = target[int(key)] if int(key) < len(target) else None
        else:
            return None
    return target if isinstance(target, dict | bool) else None


def _with_object_root(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """The schema as that of a tool's input, which is an object and says so at its root."""
    definitions: dict[str, Any] = {
        name: schema[name] for name in ("$defs", "definitions") if name in schema
    }
    root: dict[str, Any] | bool | None = schema
    for _ in range(MAX_SCHEMA_DEPTH):
        if not isinstance(root, dict) or "$ref" not in root:
            break
        # A schema that refers to itself, as recursive models do, has nothing else at its root.
        root = _target(schema, root["$ref"])
    if not isinstance(root, dict) or "$ref" in root:
        raise refusal(where, "must describe an object at its root")
    united = sorted({"anyOf", "oneOf", "allOf"} & root.keys())
    if united or root.get("type", "object") != "object":
        what = f"'{united[0]}'" if united else "another type"
        needed = 'must describe an object at its root: {"type": "object", "properties": ...}'
        raise refusal(where, f"{needed}, not {what}. Put it into a property")
    return {**root, **definitions, "type": "object"}


_ESCAPE = r"\\(?:[dDwWsSfnrtv]|[\^$\\.*+?()\[\]{}|/]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
_TOKEN = re.compile(
    rf"""
    (?P<open>    \((?:\?(?:[:=!]|<[=!]|<[A-Za-z_]\w*>))? )
    | (?P<close> \) )
    | (?P<repeat> (?:[*+?]|\{{[0-9]+(?:,[0-9]*)?\}})\?? )
    | (?P<bare>  \\[bB] | [\^$|] )
    | (?P<one>   {_ESCAPE} | \[\^?(?:[^\\\]]|{_ESCAPE}|\\[-b])*+\] | [^\\\[\](){{}}*+?^$|] )
    """,
    re.VERBOSE | re.DOTALL,
)


def _is_pattern(pattern: str) -> bool:
    """Whether JavaScript takes this for a regular expression; a few rare ones it takes are not."""
    position, depth, repeatable = 0, 0, False
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return False
        kind = token.lastgroup
        if kind == "repeat" and not repeatable:
            return False
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            return False
        repeatable = kind in ("one", "close")
        position = token.end()
    return depth == 0

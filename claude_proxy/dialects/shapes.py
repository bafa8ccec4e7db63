"""
The shapes of the OpenAI dialect's JSON objects, as far as this server knows them.

What it sends is checked against them by the type checker.  Messages that it is sent are read by
hand, because their errors have paths and advice; here they are told as types, from which the
schemas in ``/openapi.json`` are made.  Objects may hold more than is named here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from claude_proxy.dialects.fields import told

__all__ = [
    "RECEIVED",
    "AnswerMessage",
    "AssistantMessage",
    "ChatCompletion",
    "ChatCompletionChunk",
    "Choice",
    "ChunkChoice",
    "ClaudeFields",
    "FilePart",
    "FinishReason",
    "ImagePart",
    "InputFilePart",
    "JsonObjectFormat",
    "JsonSchemaFormat",
    "ReasoningPart",
    "RefusalPart",
    "SystemMessage",
    "TextFormat",
    "TextPart",
    "ToolMessage",
    "Usage",
    "UserMessage",
    "any_of",
    "reference",
]


def reference(to: type) -> str:
    """The reference to a type's schema in the document."""
    return f"#/components/schemas/{to.__name__}"


def any_of(*types: type) -> msgspec.Meta:
    """Tells that a value is of one of these shapes; msgspec knows no such union by itself."""
    return told(anyOf=[{"$ref": reference(one)} for one in types])


# What is received: the parts of a message's content.


class TextPart(TypedDict):
    """Text."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(TypedDict):
    """Text by which a model declined."""

    type: Literal["refusal"]
    refusal: str


class ReasoningPart(TypedDict):
    """What a model thought: it is left out."""

    type: Literal["reasoning", "thinking", "think", "redacted_thinking"]


_Url = Annotated[
    str,
    told(pattern=r"^(?:[Hh][Tt][Tt][Pp][Ss]://|[Dd][Aa][Tt][Aa]:)"),
    msgspec.Meta(
        description="An `https:` URL, or the image itself: PNG, JPEG, GIF or WebP as a `data:` "
        "URL with base64."
    ),
]


class ImageUrl(TypedDict):
    """Where an image is."""

    url: _Url


class ImagePart(TypedDict):
    """An image."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | _Url


_FileData = Annotated[str, msgspec.Meta(description="A PDF, as `data:application/pdf;base64,...`.")]


class FileData(TypedDict):
    """A file, sent whole."""

    file_data: _FileData
    filename: NotRequired[str]


class FilePart(TypedDict):
    """A PDF."""

    type: Literal["file"]
    file: FileData


class InputFilePart(TypedDict):
    """A PDF, in the shape of the Responses API."""

    type: Literal["input_file"]
    file_data: _FileData
    filename: NotRequired[str]


_Part = Annotated[
    Any, any_of(TextPart, ImagePart, FilePart, RefusalPart, ReasoningPart, InputFilePart)
]
_Content = str | list[_Part] | None


# The messages.


class SystemMessage(TypedDict):
    """Those at the beginning are the system prompt, and text only."""

    role: Literal["system", "developer"]
    content: NotRequired[_Content]


class UserMessage(TypedDict):
    """What is asked."""

    role: Literal["user"]
    content: NotRequired[_Content]


class CalledTool(TypedDict):
    """A tool of the client's, and what it was called with."""

    name: str
    arguments: NotRequired[Any]


class FunctionCall(TypedDict):
    """A call of a function."""

    function: CalledTool


class CustomCall(TypedDict):
    """A call of a custom tool."""

    type: Literal["custom"]
    custom: CalledTool


_Call = Annotated[Any, any_of(FunctionCall, CustomCall)]


class AssistantMessage(TypedDict):
    """What was answered; calls of tools become text."""

    role: Literal["assistant"]
    content: NotRequired[_Content]
    tool_calls: NotRequired[list[_Call] | None]
    function_call: NotRequired[CalledTool | None]


class ToolMessage(TypedDict):
    """What a tool of the client's gave."""

    role: Literal["tool", "function"]
    content: NotRequired[_Content]


# The form of an answer.


class TextFormat(TypedDict):
    """Text, as without any form."""

    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchemaWanted(TypedDict):
    """What the answer must be."""

    schema: Annotated[
        dict[str, Any], msgspec.Meta(description="A JSON Schema, of at most 128 KiB.")
    ]


class JsonSchemaFormat(TypedDict):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaWanted


RECEIVED: tuple[type, ...] = (
    TextPart,
    RefusalPart,
    ReasoningPart,
    ImagePart,
    FilePart,
    InputFilePart,
    FunctionCall,
    CustomCall,
    SystemMessage,
    UserMessage,
    AssistantMessage,
    ToolMessage,
    TextFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
)
"""The shapes that others refer to by name."""


# What is sent.


FinishReason = Literal["stop", "length", "content_filter"]


class ClaudeFields(TypedDict):
    """What OpenAI's shapes have no place for."""

    session_id: str | None
    workspace: str | None
    cost_usd: float | None
    num_turns: int | None


class PromptTokens(TypedDict):
    """How many of the prompt's tokens came from the provider's cache."""

    cached_tokens: int


class Usage(TypedDict):
    """The tokens of a turn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class AnswerMessage(TypedDict):
    """The answer; thinking and tool activity are `reasoning`, under both of its usual names."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class Choice(TypedDict):
    """The one answer."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """A whole answer; `model` is the one that served."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    claude: ClaudeFields


class Delta(TypedDict):
    """What is new."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class ChunkChoice(TypedDict):
    """A piece of the one answer."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """A piece of an answer; the last ones have `claude` and, if asked for, `usage`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    claude: NotRequired[ClaudeFields]

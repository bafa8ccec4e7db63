"""The content of a chat's message, as blocks."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.dialects.content import MAX_IMAGE_BYTES, MAX_PDF_BYTES, to_blocks
from claude_proxy.errors import Failure, ProxyError

WHERE = "messages[3].content"
FIRST = f"{WHERE}[0]"

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(20))
JPEG = b"\xff\xd8\xff\xe0" + bytes(20)
GIF = b"GIF89a" + bytes(20)
WEBP = b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(20)
PDF = b"%PDF-1.4\n%%EOF\n"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{b64(data)}"


def image(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def refused(content: object) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        to_blocks(content, WHERE)
    error = caught.value
    assert error.failure is Failure.INVALID_VALUE
    assert f"'{error.param}'" in error.message
    assert len(error.message) < 400
    return error


def shown_image(data: bytes, media_type: str) -> dict[str, Any]:
    source = {"type": "base64", "media_type": media_type, "data": b64(data)}
    return {"type": "image", "source": source}


def shown_pdf(data: bytes) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "application/pdf", "data": b64(data)}
    return {"type": "document", "source": source}


@pytest.mark.parametrize("content", [None, "", " \n", [], [text("")], [text("\t"), text("")]])
def test_content_that_says_nothing_has_no_blocks(content: object) -> None:
    assert to_blocks(content, WHERE) == []


@given(st.text(min_size=1).filter(lambda said: not said.isspace()))
def test_text_is_never_changed(said: str) -> None:
    assert to_blocks(said, WHERE) == [text(said)]
    assert to_blocks([text(said), text(said)], WHERE) == [text(said), text(said)]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "x"},
        {"type": "output_text", "text": "x", "annotations": []},
        {"type": "refusal", "refusal": "x"},
    ],
)
def test_forms_of_text(part: dict[str, Any]) -> None:
    assert to_blocks([part], WHERE) == [text("x")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "text": "hm"},
        {"type": "thinking", "thinking": "hm"},
        {"type": "think", "think": "hm"},
        {"type": "redacted_thinking", "data": "hm"},
    ],
)
def test_reasoning_that_a_client_sends_back_is_left_out(part: dict[str, Any]) -> None:
    assert to_blocks([part, text("x")], WHERE) == [text("x")]


def test_parts_keep_their_order() -> None:
    parts = [image(data_url(PNG)), text("and"), image(data_url(GIF, "image/gif")), text("?")]
    assert to_blocks(parts, WHERE) == [
        shown_image(PNG, "image/png"),
        text("and"),
        shown_image(GIF, "image/gif"),
        text("?"),
    ]


@pytest.mark.parametrize(
    ("url", "data", "media_type"),
    [
        (data_url(PNG), PNG, "image/png"),
        (data_url(JPEG, "image/jpeg"), JPEG, "image/jpeg"),
        (data_url(JPEG, "image/jpg"), JPEG, "image/jpeg"),
        (data_url(GIF, "image/gif"), GIF, "image/gif"),
        (data_url(WEBP, "image/webp"), WEBP, "image/webp"),
        (data_url(PNG, "IMAGE/Png"), PNG, "image/png"),
        (data_url(PNG, "image/png;charset=utf-8;name=a.png"), PNG, "image/png"),
        (data_url(PNG).replace("data:", "DATA:").replace(";base64", ";BASE64"), PNG, "image/png"),
    ],
)
def test_images_with_their_data(url: str, data: bytes, media_type: str) -> None:
    expected = [shown_image(data, media_type)]
    for part in (
        image(url),
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ):
        assert to_blocks([part], WHERE) == expected


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png?x=1#y", "HTTPS://example.org/a", "https://[::1]/a,b"]
)
def test_an_image_elsewhere_is_passed_on(url: str) -> None:
    block = {"type": "image", "source": {"type": "url", "url": url}}
    assert to_blocks([image(url)], WHERE) == [block]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://example.org/a.png", "https:"),
        ("ftp://example.org/a.png", "https:"),
        ("file:///etc/passwd", "https:"),
        ("/etc/passwd", "https:"),
        ("https://", "https:"),
        ("https://[", "https:"),
        ("https://example.org/a b", "https:"),
        ("https://example.org/\x00", "https:"),
        ("https://example.org/" + "a" * 9000, "8192"),
        ("", "https:"),
        ("data:", "data:"),
        ("data:image/png;base64", "data:"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,****", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGgo", "not valid base64"),
        ("data:image/png;base64,iVBORw0K\nGgo=", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGgo=AAAA", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGg\xe9=", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGgo\ud800", "not valid base64"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "image/png, image/jpeg"),
        ("data:image/" + "x" * 500 + ";base64,PHN2Zy8+", "image/png, image/jpeg"),
        ("data:;base64,PHN2Zy8+", "image/png, image/jpeg"),
        (data_url(PDF, "application/pdf"), "image/png, image/jpeg"),
        (data_url(JPEG), "is image/jpeg"),
        (data_url(PDF), "is not image/png"),
        (data_url(b"RIFF1234WAVE", "image/webp"), "is not image/webp"),
    ],
)
def test_an_image_that_cannot_be_taken_is_named(url: str, says: str) -> None:
    error = refused([image(url)])
    assert error.param == f"{FIRST}.image_url"
    assert says in error.message
    assert "iVBOR" not in error.message


def test_an_image_may_be_as_large_as_the_model_takes() -> None:
    largest = PNG + bytes(MAX_IMAGE_BYTES - len(PNG))
    assert to_blocks([image(data_url(largest))], WHERE) == [shown_image(largest, "image/png")]
    for more in (1, 2, 3, 100):
        error = refused([image(data_url(largest + bytes(more)))])
        assert error.param == f"{FIRST}.image_url"
        assert "5 MiB" in error.message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_data": data_url(PDF, "application/pdf")}},
        {"type": "file", "file": {"file_data": data_url(PDF, "application/x-pdf")}},
        {"type": "file", "file": {"filename": "A.PDF", "file_data": b64(PDF)}},
        {"type": "file", "file": {"file_data": data_url(PDF, "application/pdf"), "file_id": "x"}},
        {"type": "input_file", "filename": "a.pdf", "file_data": b64(PDF)},
        {"type": "input_file", "file_data": data_url(PDF, "application/pdf")},
    ],
)
def test_a_pdf_with_its_data(part: dict[str, Any]) -> None:
    assert to_blocks([part], WHERE) == [shown_pdf(PDF)]


@pytest.mark.parametrize(
    ("file", "field", "says"),
    [
        (None, "", "must be an object"),
        ("abc", "", "must be an object"),
        ({}, ".file_data", "is required"),
        ({"file_data": 5}, ".file_data", "must be a string"),
        ({"file_id": "file-123"}, ".file_id", "file_data"),
        ({"file_url": "https://example.org/a.pdf"}, ".file_url", "file_data"),
        ({"file_data": b64(PDF)}, ".file_data", "must be a PDF"),
        ({"file_data": b64(PDF), "filename": "a.txt"}, ".file_data", "must be a PDF"),
        ({"file_data": data_url(PDF, "text/plain")}, ".file_data", "must be a PDF"),
        ({"file_data": "data:application/pdf,abc"}, ".file_data", "as base64"),
        ({"file_data": "%%%", "filename": "a.pdf"}, ".file_data", "not valid base64"),
        ({"file_data": b64(PNG), "filename": "a.pdf"}, ".file_data", "does not hold a PDF"),
        ({"file_data": data_url(PNG, "application/pdf")}, ".file_data", "does not hold a PDF"),
        ({"file_data": "", "filename": "a.pdf"}, ".file_data", "is empty"),
    ],
)
def test_a_file_that_cannot_be_taken_is_named(file: object, field: str, says: str) -> None:
    error = refused([{"type": "file", "file": file}])
    assert error.param == f"{FIRST}.file{field}"
    assert says in error.message


def test_a_pdf_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    held = {"filename": "a.pdf", "file_data": "*" * (MAX_PDF_BYTES // 3 * 4 + 100)}
    error = refused([{"type": "file", "file": held}])
    assert error.param == f"{FIRST}.file.file_data"
    assert "32 MiB" in error.message


@pytest.mark.parametrize(
    ("content", "param", "says"),
    [
        (5, WHERE, "a string or a list"),
        (True, WHERE, "a string or a list"),
        (text("x"), WHERE, "a string or a list"),
        ([text("x"), "y"], f"{WHERE}[1]", "must be an object"),
        ([None], FIRST, "must be an object"),
        ([[]], FIRST, "must be an object"),
        ([{}], f"{FIRST}.type", "must be a string"),
        ([{"type": ["text"], "text": "x"}], f"{FIRST}.type", "must be a string"),
        ([{"type": "text"}], f"{FIRST}.text", "is required"),
        ([{"type": "text", "text": None}], f"{FIRST}.text", "is required"),
        ([{"type": "text", "text": {"value": "x"}}], f"{FIRST}.text", "must be a string"),
        ([{"type": "refusal", "text": "x"}], f"{FIRST}.refusal", "is required"),
        ([{"type": "image_url"}], f"{FIRST}.image_url", "is required"),
        ([image(None)], f"{FIRST}.image_url.url", "is required"),
        ([image(["x"])], f"{FIRST}.image_url.url", "must be a string"),
        ([{"type": "input_image", "file_id": "x"}], f"{FIRST}.file_id", "send its data"),
        ([{"type": "input_audio", "input_audio": {}}], f"{FIRST}.type", "audio"),
        ([{"type": "video", "video": {}}], f"{FIRST}.type", "'video'"),
        ([{"type": "v" * 10_000}], f"{FIRST}.type", "not known"),
    ],
)
def test_a_content_of_another_form_is_named(content: object, param: str, says: str) -> None:
    error = refused(content)
    assert error.param == param
    assert says in error.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
parts = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "refusal", "image_url", "input_image", "file", "input_file", "think", "x"]
        )
        | json_values
    },
    optional={
        name: json_values
        | st.sampled_from([data_url(PNG), data_url(PDF, "application/pdf"), "https://a/b"])
        | st.fixed_dictionaries({"url": st.sampled_from([data_url(PNG), "x"]) | json_values})
        | st.fixed_dictionaries({"file_data": st.just(data_url(PDF)) | json_values})
        for name in ("text", "refusal", "image_url", "file", "file_data", "filename")
    },
)


@given(json_values | st.lists(parts | json_values))
def test_any_content_becomes_blocks_or_is_refused(content: object) -> None:
    try:
        blocks = to_blocks(content, WHERE)
    except ProxyError as error:
        refusal = error
    else:
        assert {block["type"] for block in blocks} <= {"text", "image", "document"}
        json.dumps(blocks)
        return
    assert refusal.failure is Failure.INVALID_VALUE
    assert str(refusal.param).startswith(WHERE)

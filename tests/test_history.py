"""Fingerprints of conversations."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from claude_proxy.dialects.history import next_tip, spoken, tips
from claude_proxy.errors import Failure, ProxyError

SESSION = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"

Said = list[tuple[str, object]]


def text(said: object) -> dict[str, object]:
    return {"type": "text", "text": said}


def image(data: str, media_type: str = "image/png", **more: object) -> dict[str, Any]:
    url = f"data:{media_type};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(content: object) -> tuple[str, ...]:
    return tips([("user", content)])


def answered(content: object) -> tuple[str, ...]:
    return tips([("user", "hi"), ("assistant", content)])


def test_nothing_said_has_no_tip() -> None:
    assert tips([]) == ()
    assert tips([("system", "You are a test."), ("developer", "Be one.")]) == ()


def test_a_tip_is_a_fingerprint() -> None:
    (tip,) = user("hello")
    assert len(bytes.fromhex(tip)) == 32
    assert user("hello") == (tip,)


def test_the_tip_after_an_answer_finds_the_session_again() -> None:
    said: Said = [("system", "x"), ("user", "one")]
    for number in range(10):
        tip = next_tip(said, f"answer {number}")
        said.append(("assistant", [text(f"answer  {number}\n")]))
        assert tips(said) == (tip,)
        said.append(("user", f"and {number}?"))


@pytest.mark.parametrize(
    "contents",
    [
        ["a b", "  a\r\n\n b\t", [text("a b")], [text(""), text("a  b ")], ["a b"]],
        ["a", [{"type": "input_text", "text": "a"}], [text("a"), {"type": "thinking"}]],
        [None, "", " \n", [], [text("")], [None]],
        [
            [text("a"), image("AAAA")],
            [text("a"), image("AAAA", "image/gif", detail="high")],
            [text("a"), {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}],
            [text("a"), {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}],
        ],
        [
            [{"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}],
            [{"type": "file", "file": {"file_data": "AAAA", "filename": "a.pdf"}}],
            [{"type": "input_file", "file_data": "AAAA", "filename": "b.pdf"}],
        ],
        [[{"type": "x", "a": 1, "b": 2}], [{"b": 2, "a": 1, "type": "x"}]],
    ],
)
def test_forms_of_one_content_have_one_tip(contents: list[object]) -> None:
    assert len({user(content) for content in contents}) == 1


def test_contents_that_differ_have_different_tips() -> None:
    contents: list[object] = [
        None,
        "a",
        "A",
        "a b",
        "ab",
        [text("a"), text("b")],
        [text("b"), text("a")],
        "json 1 1",
        "text 1 a",
        [text("a"), image("AAAA")],
        [image("AAAA"), text("a")],
        [text("a"), image("AAAB")],
        [text("a"), image("AAAA"), image("AAAA")],
        [text("a"), text("AAAA")],
        [text("a"), {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
        [text("a"), {"type": "image_url", "image_url": {"url": "https://example.org/b.png"}}],
        [text("a"), {"type": "image_url", "image_url": {"url": ""}}],
        [text("a"), image("")],
        [text("a"), {"type": "x", "a": 1}],
        [text("a"), {"type": "x", "a": 2}],
        [text("a"), {"type": ["x"]}],
        [text(["a"])],
        [{"type": "file", "file": "a"}],
        [{"": "a", "type": "y"}],
        {"type": "text", "text": "b"},
        5,
        "5",
        "<thinking>a</thinking>",
        f"session-id={SESSION}\n\na",
    ]
    assert len({user(content) for content in contents}) == len(contents)


def test_what_system_messages_say_does_not_count() -> None:
    plain: Said = [("user", "a"), ("assistant", "b")]
    told: Said = [("system", "noon"), ("user", "a"), ("developer", "x"), ("assistant", "b")]
    assert tips(plain) == tips(told)
    assert next_tip(plain, "c") == next_tip(told, "c")


def test_roles_and_the_borders_of_messages_count() -> None:
    histories: list[Said] = [
        [("user", "a"), ("assistant", "b")],
        [("assistant", "a"), ("user", "b")],
        [("user", "a"), ("user", "b")],
        [("user", "a"), ("tool", "b")],
        [("user", "a"), ("function", "b")],
        [("user", [text("a"), text("b")])],
        [("user", "a b")],
        [("user", "a"), ("assistant", "b"), ("assistant", "")],
        [("user", "a"), ("assistant", ""), ("assistant", "b")],
    ]
    assert len({tips(history) for history in histories}) == len(histories)


REASONED = f"""session-id={SESSION}
workspace=a
allowed-tools=["Bash"]

<thinking>
Let me look.
</thinking>

One.

<thinking>Bash: ls</thinking>
Two.
"""


@pytest.mark.parametrize(
    "shown",
    [
        "One.\n\nTwo.",
        REASONED,
        f"session-id={SESSION}\nOne.\n\nTwo.",
        "<think>hm</think>One. Two.",
        "<think>hm</think>One.<think>\nhm\n</think>Two.",
        "<think>a <thinking> b</think>One. Two.",
        '<details type="reasoning" done="true">\n<summary>Hm</summary>\n> a\n</details>\nOne. Two.',
        "<details done='true' type='reasoning'>hm</details>One. Two.",
        f"<think>hm</think>session-id={SESSION}\n\nOne. Two.",
        [{"type": "think", "think": "hm"}, text("One. Two.")],
        [{"type": "output_text", "text": REASONED}],
    ],
)
def test_what_an_answer_showed_beside_its_text_does_not_count(shown: object) -> None:
    assert answered(shown) == answered("One. Two.")
    if isinstance(shown, str):
        assert answered("One. Two.")[0] == next_tip([("user", "hi")], shown)
        assert spoken(shown).split() == ["One.", "Two."]


@pytest.mark.parametrize(
    "said",
    [
        "a <thinking> b",
        "a </thinking> b",
        "a </think> b <think> c",
        "<thinking>a</think>b",
        "<thinking-aloud>a</thinking-aloud>",
        "<Think>a</Think>",
        "<details><summary>s</summary>a</details>",
        '<details type="reasonings">a</details>',
        '<details data-type="reasoning">a</details>',
        '<details type="reasoning">a',
        "a < b and <b>",
        f"see session-id={SESSION}",
        "workspace=a is how one says it",
    ],
)
def test_text_that_only_looks_like_thinking_is_said(said: str) -> None:
    assert spoken(said) == said


def test_a_section_that_never_ends_does_not_hide_another() -> None:
    assert spoken("<think>a <thinking>b</thinking> c") == "<think>a\n\nc"


def test_each_text_block_of_an_answer_stays_apart() -> None:
    assert spoken(REASONED) == "One.\n\nTwo."


@pytest.mark.parametrize("role", ["user", "tool"])
def test_only_answers_are_stripped_of_thinking(role: str) -> None:
    assert tips([(role, "<think>a</think>b")]) != tips([(role, "b")])


words = st.text("ab <>/=\n'\"", max_size=8) | st.sampled_from(
    [
        "<think>",
        "</think>",
        "<thinking>",
        "</thinking>",
        '<details type="reasoning">',
        "</details>",
        f"session-id={SESSION}\n",
        "workspace=a\n",
        "\n\n",
    ]
)


@given(st.lists(words).map("".join))
@example(f"session-id={SESSION}\n\nworkspace=a\nb")
def test_an_answer_shown_with_its_session_has_the_tip_of_its_text(answer: str) -> None:
    shown = f'session-id={SESSION}\nallowed-tools=["A"]\n\n{answer}'
    assert next_tip([("user", "hi")], answer) == next_tip([("user", "hi")], shown)


@given(st.lists(words).map("".join))
def test_an_answer_shown_with_its_thinking_has_the_tip_of_its_text(answer: str) -> None:
    assert spoken(f"<thinking>hm\n</thinking>\n\n{answer}") == spoken(f"\n\n{answer}")


plain_text = st.text("ab 1:,", max_size=6)
plain_content = plain_text | st.lists(
    plain_text.map(text) | st.sampled_from(["AAAA", "AAAB"]).map(image), max_size=3
)
histories = st.lists(st.tuples(st.sampled_from(["user", "tool"]), plain_content), max_size=4)


def meaning(said: Said) -> object:
    """A history without what may differ, in a form that shows all the rest."""
    told = []
    for role, content in said:
        parts = content if isinstance(content, list) else [text(content)]
        kept = [
            (part["type"], " ".join(str(part.get("text", part.get("image_url"))).split()))
            for part in parts
        ]
        told.append((role, [(kind, data) for kind, data in kept if data]))
    return told


@given(histories, histories)
@example([("user", "a"), ("user", "b")], [("user", [text("a"), text("b")])])
@example([("user", "a 1"), ("user", "b")], [("user", "a"), ("user", "1 b")])
def test_two_histories_have_one_tip_only_if_they_say_the_same(one: Said, other: Said) -> None:
    assert (tips(one) == tips(other)) == (meaning(one) == meaning(other))


@given(histories, st.text("ab", min_size=1), st.text("ab", min_size=1))
def test_another_answer_gives_another_tip(said: Said, one: str, other: str) -> None:
    assume(one != other)
    assert next_tip(said, one) != next_tip(said, other)
    assert (next_tip(said, one),) == tips([*said, ("assistant", one)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.text(max_size=9), json_values)))
def test_any_content_has_a_tip(said: Said) -> None:
    assert len(next_tip(said, "x")) == 64


def test_a_content_that_is_nested_too_deeply_is_refused() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ProxyError) as caught:
        user(nested)
    assert caught.value.failure is Failure.INVALID_VALUE


@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think>",
        "<think></think>",
        "<think>a</thinking>",
        "<details ",
        "<details type=",
        '<details type="reasoning">',
        "<details type=reasoning></details>",
        "<",
        "session-id=",
        f"session-id={SESSION}\n\n",
        "a=\n",
        " ",
    ],
)
def test_hostile_answers_are_read_in_linear_time(piece: str) -> None:
    began = time.process_time()
    spoken(piece * (1_000_000 // len(piece)))
    assert time.process_time() - began < 2  # what is not linear takes minutes


def test_the_order_of_fields_does_not_count() -> None:
    parts = '[{"type": "x", "a": {"b": 1, "c": 2}}]', '[{"a": {"c": 2, "b": 1}, "type": "x"}]'
    assert user(json.loads(parts[0])) == user(json.loads(parts[1]))

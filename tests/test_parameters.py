"""The block of parameters at the top of a message."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from claude_proxy.dialects.parameters import (
    TextParameters,
    parse_parameters,
    shown_session,
    without_shown_block,
)
from claude_proxy.errors import Failure, ProxyError

SESSION = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
LISTS = ("allowed-tools", "disallowed-tools", "mcp-allowed-tools")
NAMES = ("workspace", "session-id", *LISTS, "dangerously-skip-permissions")

EVERYTHING = f"""workspace=project-name
session-id={SESSION}
allowed-tools=["Bash(git *)","Edit"]
disallowed-tools=["WebFetch"]
mcp-allowed-tools=["mcp__github__get_repo"]
dangerously-skip-permissions=true

Your actual prompt here
"""
FIELDS: dict[str, object] = {
    "workspace": "project-name",
    "session-id": SESSION,
    "allowed-tools": ["Bash(git *)", "Edit"],
    "disallowed-tools": ["WebFetch"],
    "mcp-allowed-tools": ["mcp__github__get_repo"],
    "dangerously-skip-permissions": True,
}


def refused(text: str, allowed: str = "all") -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        parse_parameters(text, allowed)
    assert caught.value.failure is Failure.INVALID_VALUE
    return caught.value


def parsed_or_refused(text: str, allowed: str) -> TextParameters | ProxyError:
    try:
        return parse_parameters(text, allowed)
    except ProxyError as error:
        return error


def test_every_parameter_is_read() -> None:
    assert parse_parameters(EVERYTHING, "all") == TextParameters(
        FIELDS, "Your actual prompt here\n"
    )


def test_carriage_returns_at_line_ends_change_nothing() -> None:
    parsed = parse_parameters(EVERYTHING.replace("\n", "\r\n"), "all")
    assert parsed == TextParameters(FIELDS, "Your actual prompt here\r\n")


@pytest.mark.parametrize(
    ("text", "fields", "prompt"),
    [
        ("workspace=a fix it", {"workspace": "a"}, "fix it"),
        ("workspace=a\tfix it", {"workspace": "a"}, "fix it"),
        ("workspace=a", {"workspace": "a"}, ""),
        ("workspace=a\n\n \t\n", {"workspace": "a"}, ""),
        ("\n\n  workspace=a\nx", {"workspace": "a"}, "x"),
        ('workspace="a"\nx', {"workspace": "a"}, "x"),
        ("workspace=a\n\n\n    def f():\n", {"workspace": "a"}, "    def f():\n"),
        ("workspace=a\r\n\r\n\tdef f():", {"workspace": "a"}, "\tdef f():"),
        ("workspace=a\rx", {"workspace": "a"}, "x"),
        ("workspace=a\n\nallowed-tools=[] x", {"workspace": "a", "allowed-tools": []}, "x"),
        ("workspace=a\nx=1\nsession-id=?", {"workspace": "a"}, "x=1\nsession-id=?"),
        ("workspace=a\nallowed_tools=[1]", {"workspace": "a"}, "allowed_tools=[1]"),
        ("workspace=a\n\nprompt=hi", {"workspace": "a"}, "prompt=hi"),
        ("workspace=a\n@file /x ", {"workspace": "a"}, "@file /x "),
        ("dangerously-skip-permissions=FALSE x", {"dangerously-skip-permissions": False}, "x"),
        ('dangerously-skip-permissions="True" x', {"dangerously-skip-permissions": True}, "x"),
        ("allowed-tools=[]\nx", {"allowed-tools": []}, "x"),
        ("allowed-tools=[ ]\nx", {"allowed-tools": []}, "x"),
        ('allowed-tools=[\n  "A",\r\n  "B"\n]\nx', {"allowed-tools": ["A", "B"]}, "x"),
        ("allowed-tools=['A', 'B(c, d)'] x", {"allowed-tools": ["A", "B(c, d)"]}, "x"),
        ("allowed-tools=[A,B(git log:*, x) , mcp__c__d]x", None, ""),
        (
            "allowed-tools=[A,B(git log:*, x) , mcp__c__d] x",
            {"allowed-tools": ["A", "B(git log:*, x)", "mcp__c__d"]},
            "x",
        ),
        (
            r'allowed-tools=["a\"]b", "\u00e9\n"] x',
            {"allowed-tools": ['a"]b', "\N{LATIN SMALL LETTER E WITH ACUTE}\n"]},
            "x",
        ),
        (f"session-id={SESSION.upper()}\nx", {"session-id": SESSION.upper()}, "x"),
    ],
)
def test_forms_of_a_block(text: str, fields: dict[str, object] | None, prompt: str) -> None:
    if fields is None:
        refused(text)
    else:
        assert parse_parameters(text, "all") == TextParameters(fields, prompt)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "x=1",
        "  hello\n",
        "prompt=x",
        "Workspace=a",
        "workspace = a",
        "workspace: a",
        "session_id=5",
        "xworkspace=a",
        "# workspace=a",
        "```\nworkspace=a\n```",
        "hello\nworkspace=a\nallowed-tools=[",
    ],
)
def test_text_that_has_no_block_is_prompt(text: str) -> None:
    assert parse_parameters(text, "all") == TextParameters({}, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workspace", ""),
        ("workspace", '""'),
        ("workspace", "../etc"),
        ("workspace", ".git"),
        ("workspace", '"a'),
        ("workspace", 'a"b'),
        ("workspace", '"a"b'),
        ("workspace", "a" * 65),
        ("session-id", ""),
        ("session-id", "latest"),
        ("session-id", SESSION + "0"),
        ("session-id", "--help"),
        ("dangerously-skip-permissions", "yes"),
        ("dangerously-skip-permissions", "true."),
        ("dangerously-skip-permissions", ""),
        *(
            (name, value)
            for name in LISTS
            for value in (
                "",
                "Bash",
                "Bash,Edit",
                '"Bash"',
                "[",
                "[Bash",
                "[Bash,",
                "[Bash,]",
                "[,]",
                "[Bash Edit]",
                "[[Bash]]",
                '["Bash"',
                '["Bash]',
                "['Bash]",
                "['']",
                '["Bash"]Edit',
                '["Bash"],',
                r'["\x"]',
                r'["\ud800"]',
                '["a\nb"]',
                "[Bash(git *]",
                '{"a": 1}',
            )
        ),
    ],
)
def test_a_malformed_value_is_named(name: str, value: str) -> None:
    error = refused(f"{name}={value}\nsay hello")
    assert error.param == name
    if name != "workspace" or value in ("", '"a', 'a"b', '"a"b'):
        assert f"'{name}'" in error.message
        assert f" {name}=" in error.message  # the right form is shown


@pytest.mark.parametrize("name", NAMES)
def test_the_form_that_an_error_shows_is_right(name: str) -> None:
    shown = refused(f"{name}=").message.rpartition(": ")[2]
    parsed = parse_parameters(f"{shown}\nx", "all")
    assert list(parsed.fields) == [name]
    assert parsed.prompt == "x"


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_given_twice_is_refused(name: str) -> None:
    line = f"{name}={json.dumps(FIELDS[name])}\n"
    error = refused(line + line + "x")
    assert error.param == name
    assert "twice" in error.message


def test_a_list_of_too_many_items_is_refused() -> None:
    items = [f"Tool{number}" for number in range(256)]
    assert parse_parameters(f"allowed-tools={json.dumps(items)} x", "all").fields == {
        "allowed-tools": items
    }
    error = refused(f"allowed-tools={json.dumps([*items, 'More'])} x")
    assert error.param == "allowed-tools"
    assert "256" in error.message


def test_a_safe_server_takes_the_workspace_and_the_session() -> None:
    text = f"session-id={SESSION}\nworkspace=a\n\nx"
    assert parse_parameters(text, "safe") == TextParameters(
        {"session-id": SESSION, "workspace": "a"}, "x"
    )


@pytest.mark.parametrize("name", [*LISTS, "dangerously-skip-permissions"])
def test_a_safe_server_refuses_permissions_whatever_they_say(name: str) -> None:
    for value in (json.dumps(FIELDS[name]), "", "?"):
        error = refused(f"workspace=a\n{name}={value}\nx", "safe")
        assert error.param == name
        assert "CHAT_TEXT_PARAMETERS" in error.message


def test_a_safe_server_leaves_permissions_in_the_prompt_alone() -> None:
    text = "What does\nallowed-tools=[] mean?"
    assert parse_parameters(text, "safe") == TextParameters({}, text)


@pytest.mark.parametrize("text", [EVERYTHING, "workspace=", "allowed-tools=[", ""])
def test_a_server_that_allows_none_reads_nothing(text: str) -> None:
    assert parse_parameters(text, "none") == TextParameters({}, text)


def test_a_prompt_is_not_in_the_repr() -> None:
    assert "actual" not in repr(parse_parameters(EVERYTHING, "all"))


names = st.text("abcXYZ019._-", min_size=1, max_size=64).filter(lambda name: name[0] != ".")
values = st.fixed_dictionaries(
    {},
    optional={
        "workspace": names,
        "session-id": st.uuids().map(str),
        **{name: st.lists(st.text(max_size=20), max_size=5) for name in LISTS},
        "dangerously-skip-permissions": st.booleans(),
    },
)
separators = st.sampled_from([" ", "\n", "\r\n", "\t", "\n\n", " \n \n", "\r", "\v"])


@given(values, st.data())
def test_what_is_written_is_read(fields: dict[str, object], data: st.DataObject) -> None:
    text = ""
    for name in data.draw(st.permutations(sorted(fields))):
        value = fields[name]
        bare = isinstance(value, str) and data.draw(st.booleans())
        written = value if bare else json.dumps(value, ensure_ascii=data.draw(st.booleans()))
        text += f"{name}={written}" + data.draw(separators)
    assert parse_parameters(text + "prompt", "all") == TextParameters(fields, "prompt")


@given(st.text(), separators)
@example("  \n", "\n\n")
@example("\x85\r\nx\x00", "\n")
def test_what_stands_below_is_never_changed(prompt: str, separator: str) -> None:
    text = f"workspace=a{separator}say {prompt}"
    assert parse_parameters(text, "all").prompt == f"say {prompt}"


@given(st.text())
@example("workspace")
@example("\ufeffworkspace=a")
def test_text_without_a_block_comes_back_untouched(text: str) -> None:
    assume(not text.lstrip().startswith(tuple(f"{name}=" for name in NAMES)))
    assert parse_parameters(text, "all") == TextParameters({}, text)


pieces = st.sampled_from(
    [*(f"{name}=" for name in NAMES), *"[]\"'\\,() \n\r", "true", "a", SESSION, "\ud800"]
)


@given(st.lists(pieces).map("".join), st.sampled_from(["all", "safe", "none"]))
def test_any_text_is_parsed_or_refused(text: str, allowed: str) -> None:
    parsed = parsed_or_refused(text, allowed)
    if isinstance(parsed, ProxyError):
        assert parsed.failure is Failure.INVALID_VALUE
        assert parsed.param in NAMES
    else:
        assert text.endswith(parsed.prompt)
        assert bool(parsed.fields) or parsed.prompt == text
    shown_session(text)
    assert text.endswith(without_shown_block(text))


@pytest.mark.parametrize(
    "piece",
    [
        "workspace=",
        "workspace=a ",
        "x workspace=",
        "allowed-tools=[",
        "session-id=",
        f"session-id={SESSION}\n",
        f"session-id={SESSION}\n\n",
        "a=\n",
        "a-",
        "a",
        " ",
        "\r",
        "\n",
    ],
)
@pytest.mark.parametrize(
    "start", ["", "workspace=a ", "allowed-tools=", 'allowed-tools=["', "allowed-tools=['"]
)
def test_hostile_text_is_read_in_linear_time(start: str, piece: str) -> None:
    text = start + piece * (500_000 // len(piece))
    began = time.process_time()
    parsed = parsed_or_refused(text, "all")
    assert isinstance(parsed, TextParameters) or len(parsed.message) < 1000
    shown_session(text)
    without_shown_block(text)
    assert time.process_time() - began < 2  # what is not linear takes minutes


@pytest.mark.parametrize("piece", ["[", "[]", '"a",', "'a',", "a,", "a(", "a()", "\\", "'"])
def test_hostile_lists_are_read_in_linear_time(piece: str) -> None:
    text = "allowed-tools=[" + piece * (5_000_000 // len(piece))
    began = time.process_time()
    assert refused(text).param == "allowed-tools"
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "session"),
    [
        (f"session-id={SESSION}\nworkspace=a\n\nHello", SESSION),
        (f"session-id={SESSION.upper()}\r\n\r\nHello", SESSION),
        (f'\n workspace=a\nsession-id="{SESSION}"\nHello', SESSION),
        (f"allowed-tools=[broken\nsession-id={SESSION} workspace=a\n", SESSION),
        (f"session-id={SESSION}", SESSION),
        (f"session-id={SESSION}\nsession-id={SESSION[::-1]}\n", SESSION),
        (f"Hello\nsession-id={SESSION}\n", None),
        (f"workspace=a\n\nsession-id={SESSION}\n", None),
        (f"session-id={SESSION}x\n", None),
        ("session-id=latest\n", None),
        ("Hello", None),
        ("", None),
    ],
)
def test_the_session_that_an_answer_shows(text: str, session: str | None) -> None:
    assert shown_session(text) == session


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (f'session-id={SESSION}\nallowed-tools=["A"]\nmodel=x\n\n Hello', "\n Hello"),
        (f"session-id={SESSION}\nHello\nx=1", "Hello\nx=1"),
        (f"session-id={SESSION}\n\nx=1\nHello", "\nx=1\nHello"),
        (f"session-id={SESSION}\n\nsession-id={SESSION}\n\nHello", "\nHello"),
        ("workspace=a\nHello", "workspace=a\nHello"),
        (f"Hello\nsession-id={SESSION}", f"Hello\nsession-id={SESSION}"),
    ],
)
def test_the_block_of_an_answer_is_cut_out(text: str, rest: str) -> None:
    assert without_shown_block(text) == rest

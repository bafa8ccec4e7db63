"""The MCP configuration: every mistake is named, no secret is shown, tools find their servers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.sessions.mcp import (
    McpConfig,
    McpConfigError,
    load_mcp_config,
    parse_mcp_config,
)

EXAMPLE = Path(__file__).parent.parent / "mcp-config.json.example"
PLACE = "/conf/mcp.json"
STDIO = {"command": "run"}


def config(*names: str) -> McpConfig:
    return McpConfig(enabled=True, path=PLACE, servers=dict.fromkeys(names, STDIO))


def mistakes(content: Any) -> tuple[str, ...]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(McpConfigError) as caught:
        parse_mcp_config(text, PLACE)
    assert str(caught.value).startswith(f"The MCP configuration {PLACE} cannot be used:\n  ")
    return caught.value.mistakes


def refusal(mcp: McpConfig, *tools: str) -> str:
    with pytest.raises(ProxyError) as caught:
        mcp.servers_for(tools)
    assert caught.value.failure is Failure.INVALID_VALUE
    assert caught.value.param == "mcp-allowed-tools"
    return caught.value.message


@pytest.mark.parametrize(
    "entry",
    [
        {"command": "run"},
        {"type": "stdio", "command": "run", "args": ["-x", ""], "env": {"A": ""}},
        {"command": "run", "url": "anything", "alwaysLoad": True, "x": {"y": [1, 1.5, None]}},
        {"type": "http", "url": "https://a.example/mcp", "headers": {"X-Key": "k"}},
        {"type": "sse", "url": "HTTP://127.0.0.1:80", "alwaysLoad": False},
        {"type": "http", "url": "${BASE}/mcp"},
    ],
)
def test_an_entry_of_the_cli_is_kept_as_it_is(entry: dict[str, Any]) -> None:
    text = json.dumps({"mcpServers": {"a": entry}, "other": 1}).encode()
    mcp = parse_mcp_config(text, PLACE)
    assert mcp.enabled
    assert mcp.servers == {"a": entry}
    assert json.loads(mcp.subset_json(["a"])) == {"mcpServers": {"a": entry}}


def test_numbers_of_any_size_survive() -> None:
    text = b'{"mcpServers":{"a":{"command":"x","n":123456789012345678901234567890}}}'
    assert parse_mcp_config(text, PLACE).subset_json(["a"]) == text


def test_a_byte_order_mark_does_not_matter() -> None:
    assert parse_mcp_config(b'\xef\xbb\xbf{"mcpServers":{}}', PLACE).names == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "It is not JSON"),
        (b'{"mcpServers": {},}', "It is not JSON"),
        (b'{"a": "\xff"}', "It is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        ([], "It must be a JSON object."),
        ({}, 'It must have "mcpServers"'),
        ({"mcpServers": []}, "mcpServers must be an object"),
        ({"mcpServers": None}, "mcpServers must be an object"),
    ],
)
def test_what_is_no_configuration_is_refused(content: Any, said: str) -> None:
    (mistake,) = mistakes(content)
    assert said in mistake


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("text", "mcpServers.a must be an object"),
        ({}, "mcpServers.a.command must be a string that is not empty"),
        ({"command": ""}, "mcpServers.a.command must be a string that is not empty"),
        ({"command": 5}, "mcpServers.a.command must be a string that is not empty"),
        ({"command": "x", "args": "y"}, "mcpServers.a.args must be an array of strings"),
        ({"command": "x", "args": None}, "mcpServers.a.args must be an array of strings"),
        ({"command": "x", "args": ["y", 3]}, "mcpServers.a.args[1] must be a string"),
        ({"command": "x", "env": []}, "mcpServers.a.env must be an object of strings"),
        ({"command": "x", "env": {"PORT": 3}}, "mcpServers.a.env.PORT must be a string"),
        ({"command": "x", "env": {"A B": 3}}, "mcpServers.a.env['A B'] must be a string"),
        ({"url": "https://a"}, 'mcpServers.a.type must be "http" or "sse"'),
        ({"type": "ws", "url": "wss://a"}, 'mcpServers.a.type must be "stdio", "http" or "sse"'),
        ({"type": None, "command": "x"}, 'mcpServers.a.type must be "stdio", "http" or "sse"'),
        ({"type": ["http"], "url": "x"}, 'mcpServers.a.type must be "stdio", "http" or "sse"'),
        ({"type": "sdk", "name": "a"}, 'mcpServers.a.type "sdk" is'),
        ({"type": "http"}, "mcpServers.a.url must be an http:// or https:// address"),
        ({"type": "http", "url": "ftp://a"}, "mcpServers.a.url must be an http://"),
        ({"type": "sse", "url": "https://"}, "mcpServers.a.url must be an http://"),
        ({"type": "sse", "url": "https://a b"}, "mcpServers.a.url must be an http://"),
        (
            {"type": "http", "url": "http://a", "headers": {"X-Key": None}},
            "mcpServers.a.headers.X-Key must be a string",
        ),
    ],
)
def test_a_mistake_in_an_entry_is_named_with_its_place(entry: Any, said: str) -> None:
    (mistake,) = mistakes({"mcpServers": {"a": entry}})
    assert mistake.startswith(said)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "é", "a\n", "a*"])
def test_a_bad_server_name_is_a_mistake(name: str) -> None:
    (mistake,) = mistakes({"mcpServers": {name: STDIO}})
    assert mistake.startswith(f"mcpServers[{name!r}]: a server name is made of")


def test_every_mistake_is_reported_and_no_value_shown() -> None:
    found = mistakes(
        {
            "mcpServers": {
                "one": {"command": ["geheim"], "args": ["ok", {"geheim": 1}, 2], "env": {"K": [1]}},
                "b!d": "geheim",
                "two": {"type": "http", "url": "geheim", "headers": {"Auth": ["geheim"]}},
                "fine": STDIO,
                "three": {"type": "geheim"},
            }
        }
    )
    assert [mistake.split()[0] for mistake in found] == [
        "mcpServers.one.command",
        "mcpServers.one.args[1]",
        "mcpServers.one.args[2]",
        "mcpServers.one.env.K",
        "mcpServers['b!d']:",
        "mcpServers['b!d']",
        "mcpServers.two.url",
        "mcpServers.two.headers.Auth",
        "mcpServers.three.type",
    ]
    assert "geheim" not in " ".join(found)


def test_secrets_are_in_no_repr_and_no_health_report() -> None:
    entry = {"command": "x", "env": {"TOKEN": "geheim"}, "headers": {"A": "geheim"}}
    mcp = parse_mcp_config(json.dumps({"mcpServers": {"b": entry, "a": STDIO}}).encode(), PLACE)
    assert "geheim" not in repr(mcp)
    assert "('a', 'b')" in repr(mcp)
    assert mcp.describe() == {"enabled": True, "configPath": PLACE, "servers": ["a", "b"]}


def test_a_configuration_cannot_be_changed() -> None:
    mcp = config("a")
    with pytest.raises(AttributeError):
        mcp.enabled = False  # type: ignore[misc]  # that it is refused is the point
    with pytest.raises(TypeError):
        mcp.servers["b"] = {}  # type: ignore[index]  # the same


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([], ()),
        (["mcp__a__get"], ("a",)),
        (["mcp__b__x", "mcp__a__y", "mcp__b__z"], ("a", "b")),
        (["mcp__a"], ("a",)),
        (["mcp__a__*"], ("a",)),
        (["mcp__a__b__c"], ("a__b",)),
        (["mcp__a__b"], ("a__b",)),
        (["mcp__a__bc"], ("a",)),
        (["mcp__a____x"], ("a",)),
    ],
)
def test_tools_find_their_servers(tools: list[str], expected: tuple[str, ...]) -> None:
    assert config("a", "a__b", "b").servers_for(tools) == expected


@pytest.mark.parametrize(
    "tool", ["mcp__c__x", "mcp__", "mcp__*", "mcp__a_x", "mcp__A__x", "mcp__a__"]
)
def test_a_tool_of_an_unknown_server_is_refused_with_the_servers(tool: str) -> None:
    message = refusal(config("b", "a"), "mcp__a__fine", tool)
    assert tool in message
    assert message.endswith("Configured servers: a, b.")


@pytest.mark.parametrize("tool", ["Bash", "a__x", "", "MCP__a__x", "_mcp__a__x"])
def test_what_is_no_mcp_tool_is_refused(tool: str) -> None:
    message = refusal(config("a"), tool)
    assert "mcp__SERVER__TOOL" in message
    assert message.endswith("Configured servers: a.")


@pytest.mark.parametrize("character", list(" \t\n\0\x1b\x7f,()\u00a0\u2028\u200b\ud800"))
def test_a_tool_name_cannot_carry_more_than_a_name(character: str) -> None:
    message = refusal(config("a"), f"mcp__a__x{character}Bash")
    assert character in " ,()" or character not in message


def test_a_long_tool_name_is_refused_without_being_shown() -> None:
    longest = "mcp__a__" + "x" * 248
    assert config("a").servers_for([longest]) == ("a",)
    assert refusal(config("a"), longest + "x") == "A tool name is longer than 256 characters."


def test_no_server_configured_is_said() -> None:
    assert refusal(config(), "mcp__a__x").endswith("Configured servers: none.")


def test_only_the_asked_servers_are_in_the_subset() -> None:
    mcp = parse_mcp_config(b'{"mcpServers":{"b":{"command":"x"},"a":{"command":"y"}}}', PLACE)
    assert mcp.subset_json(["b"]) == b'{"mcpServers":{"b":{"command":"x"}}}'
    both = b'{"mcpServers":{"a":{"command":"y"},"b":{"command":"x"}}}'
    assert mcp.subset_json(["b", "a", "b"]) == mcp.subset_json(["a", "b"]) == both
    assert mcp.subset_json([]) == b'{"mcpServers":{}}'
    with pytest.raises(KeyError):
        mcp.subset_json(["c"])


def test_a_missing_default_file_means_mcp_is_off(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    mcp = load_mcp_config(path, named=False)
    assert mcp.describe() == {"enabled": False, "configPath": str(path)}
    assert mcp.servers_for([]) == ()
    message = refusal(mcp, "mcp__a__x")
    assert "MCP is off" in message
    assert str(path) in message


def test_a_missing_named_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    with pytest.raises(McpConfigError, match="no such file") as caught:
        load_mcp_config(path, named=True)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_cannot_be_read_is_an_error_in_any_case(named: bool, tmp_path: Path) -> None:
    with pytest.raises(McpConfigError, match="Is a directory"):
        load_mcp_config(tmp_path, named)
    with pytest.raises(McpConfigError, match="null byte"):
        load_mcp_config(Path("a\0b"), named=named)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes(b'{"mcpServers":{}}'.ljust(1024 * 1024))
    assert load_mcp_config(path, named=True).enabled
    os.truncate(path, 1024 * 1024 + 1)
    with pytest.raises(McpConfigError, match="larger than 1 MiB"):
        load_mcp_config(path, named=True)


def test_the_example_file_is_accepted() -> None:
    assert load_mcp_config(EXAMPLE, named=True).names == ("filesystem", "github", "tickets")


JSON_TEXT = st.text("ab_- .é\n", max_size=4)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | JSON_TEXT | st.just("http"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["mcpServers", "type", "command", "args", "env", "url"]) | JSON_TEXT,
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(servers=st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=3))
def test_any_json_is_accepted_or_a_named_mistake(servers: dict[str, Any]) -> None:
    text = json.dumps({"mcpServers": servers}).encode()
    try:
        mcp = parse_mcp_config(text, PLACE)
    except McpConfigError as error:
        for mistake in error.mistakes:
            assert mistake.startswith("mcpServers")
    else:
        assert json.loads(mcp.subset_json(mcp.names)) == {"mcpServers": servers}


@given(text=st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(text: bytes) -> None:
    with pytest.raises(McpConfigError):
        parse_mcp_config(text, PLACE)


@given(tool=st.text("ab_*m cp,(\n", max_size=20).map("mcp__".__add__))
def test_a_tool_belongs_to_a_configured_server_or_is_refused(tool: str) -> None:
    mcp = config("a", "b", "a__b")
    try:
        (owner,) = mcp.servers_for([tool])
    except ProxyError:
        assert refusal(mcp, tool)
    else:
        assert tool == f"mcp__{owner}" or tool.startswith(f"mcp__{owner}__")
        assert not set(tool) & set(" ,(\n")

"""Tools with the real CLIs: what runs, what is refused, what is offered, what it can see."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import Daemon, wait_until
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Answer, Server, StartServer

SECRET = "mcp-secret-0123456789"


def bash(command: str) -> str:
    return f"[[tool:Bash {json.dumps({'command': command})}]]"


def workspace_of(server: Server, name: str) -> Path:
    return server.daemon.base / "workspace" / name


def texts_of(answer: Answer) -> list[str]:
    """The texts of the tools' results."""
    return [result_text(result["content"]) for result in answer.tool_results]


def result_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(b.get("text", "") for b in content)


# Rules.


def test_an_allowed_tool_runs(server: Server) -> None:
    answer = server.ask(
        f"{bash('echo one > made; echo out')} [[then]] {bash('cat made')}",
        allowed_tools=["Bash"],
        workspace="allowed",
    )
    assert answer.text == "Done. Tool said: one"
    assert texts_of(answer) == ["out", "one"]
    assert (workspace_of(server, "allowed") / "made").read_text() == "one\n"


def test_a_tool_without_a_rule_is_refused_and_the_turn_goes_on(server: Server) -> None:
    answer = server.ask(f"{bash('touch made')} [[then]] [[text oh]]", workspace="refused")
    assert answer.text == "oh"
    assert [result["is_error"] for result in answer.tool_results] == [True]
    assert not (workspace_of(server, "refused") / "made").exists()
    if not server.claude.is_old:
        [denial] = answer.result["permission_denials"]
        assert denial["tool_name"] == "Bash"


@pytest.mark.parametrize(
    ("rules", "runs", "refused"),
    [
        (["Bash(git init:*)"], "git init --quiet", "touch made"),
        (["Bash(mkdir a b)", "Bash(touch c)"], "mkdir a b", "mkdir a"),
    ],
)
def test_a_rule_allows_just_what_it_says(
    server: Server, tmp_path: Path, rules: list[str], runs: str, refused: str
) -> None:
    workspace = f"rule-{tmp_path.name}"
    script = f"{bash(runs)} [[then]] {bash(refused)} [[then]] [[text over]]"
    answer = server.ask(script, allowed_tools=rules, workspace=workspace[:64])
    assert answer.text == "over"
    assert [bool(result.get("is_error")) for result in answer.tool_results] == [False, True]


@pytest.mark.parametrize(
    ("rule", "runs", "refused"),
    [
        ("Bash(git init *)", "git init --quiet", "touch made"),
        ("Bash(mkdir a,b)", "mkdir a,b", "mkdir a"),
    ],
)
def test_a_rule_with_blanks_commas_and_stars_is_one_rule(
    new_server: Server, rule: str, runs: str, refused: str
) -> None:
    script = f"{bash(runs)} [[then]] {bash(refused)} [[then]] [[text over]]"
    for field, errors in (("allowed_tools", [False, True]), ("disallowed_tools", [True, False])):
        workspace = f"{field}-{len(runs)}"
        fields = {"allowed_tools": ["Bash"], field: [rule], "workspace": workspace}
        answer = new_server.ask(script, **fields)
        assert [bool(result.get("is_error")) for result in answer.tool_results] == errors


@pytest.mark.parametrize("field", ["allowed_tools", "disallowed_tools"])
def test_a_rule_that_an_old_cli_would_cut_at_its_comma_is_refused(
    old_server: Server, field: str
) -> None:
    answer = old_server.ask("[[text hello]]", **{field: ["Edit", "Bash(mkdir a,b)"]})
    assert (answer.status, answer.error["code"]) == (400, "invalid_value")
    assert answer.error["param"] == field.replace("_", "-")
    assert "1.0.24" in answer.error["message"]


def test_a_disallowed_tool_is_not_offered(server: Server) -> None:
    answer = server.ask(
        f"{bash('touch made')} [[then]] [[text oh]]",
        allowed_tools=["Bash"],
        disallowed_tools=["Bash", "WebFetch"],
        workspace="disallowed",
    )
    assert answer.text == "oh"
    assert not {"Bash", "WebFetch"} & set(answer.events[0]["tools"])
    assert answer.tool_results[0]["is_error"] is True
    assert not (workspace_of(server, "disallowed") / "made").exists()


def test_a_disallowed_rule_wins_over_an_allowed_tool(server: Server) -> None:
    answer = server.ask(
        f"{bash('echo fine')} [[then]] {bash('touch made')} [[then]] [[text over]]",
        allowed_tools=["Bash"],
        disallowed_tools=["Bash(touch:*)"],
        workspace="deny-rule",
    )
    assert [bool(result.get("is_error")) for result in answer.tool_results] == [False, True]
    assert not (workspace_of(server, "deny-rule") / "made").exists()


def test_rules_are_not_remembered(server: Server) -> None:
    first = server.ask(f"{bash('touch one')} [[then]] [[text .]]", allowed_tools=["Bash"])
    assert not first.tool_results[0].get("is_error")
    second = server.ask(f"{bash('touch two')} [[then]] [[text .]]", session_id=first.session_id)
    assert second.tool_results[0]["is_error"] is True


# Sub-agents.


def test_a_sub_agent_works_and_reports(server: Server) -> None:
    answer = server.ask(
        f"[[subagent {bash('echo in-sub')}]] [[then]] [[text Back.]]",
        allowed_tools=["Task", "Bash"],
    )
    assert answer.text == "Back."
    inside = [event for event in answer.events if event.get("parent_tool_use_id")]
    assert "in-sub" in json.dumps(inside)


# What a tool sees.


def test_a_tool_sees_none_of_our_settings(claude: Claude, start_server: StartServer) -> None:
    keys = {"API_KEY": "sk-proxy-0123456789abcdef", "API_KEYS": "sk-proxy-fedcba9876543210"}
    ours = {"LOG_LEVEL": "debug", "MAX_BODY_BYTES": "1000000", "LIVE_SESSIONS": "2"}
    server = start_server(claude, {**keys, **ours, "THEIR_OWN": "kept"})
    server.key = keys["API_KEY"]
    answer = server.ask(bash("env"), allowed_tools=["Bash"])
    [seen] = texts_of(answer)
    names = {line.partition("=")[0] for line in seen.splitlines()}
    known = {"NODE_ENV", "CLAUDE_CLI", "WORKSPACE_BASE_PATH", "STATE_PATH", "PORT", "HOST"}
    assert not names & {*keys, *ours, *known}
    assert "sk-proxy" not in seen
    assert "THEIR_OWN=kept" in seen


# Hooks.


@pytest.mark.parametrize("wanted", [False, True])
def test_hooks_of_a_workspace_run_only_where_the_server_says_so(
    claude: Claude, start_server: StartServer, wanted: bool
) -> None:
    server = start_server(claude, {"WORKSPACE_HOOKS": str(wanted).lower()})
    workspace = workspace_of(server, "hooked")
    (workspace / ".claude").mkdir(parents=True)
    run = [{"matcher": "", "hooks": [{"type": "command", "command": f"touch {workspace}/ran"}]}]
    settings = {"hooks": {"PreToolUse": run}}
    (workspace / ".claude" / "settings.json").write_text(json.dumps(settings))
    answer = server.ask(bash("echo hello"), allowed_tools=["Bash"], workspace="hooked")
    assert answer.text == "Done. Tool said: hello"
    # The old CLI has no hooks yet.
    assert (workspace / "ran").exists() is (wanted and not claude.is_old)


# MCP.


@pytest.fixture(scope="module")
def mcp_folder(tmp_path_factory: pytest.TempPathFactory, everything_server: list[str]) -> Path:
    """Holds a configuration of two real servers, with a secret in each one's environment."""
    folder = tmp_path_factory.mktemp("mcp")
    command, *args = everything_server
    entry = {"command": command, "args": args, "env": {"MCP_SECRET": SECRET}}
    config = {"mcpServers": {"everything": entry, "other": entry}}
    (folder / "mcp-config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mcp_server(claude: Claude, mcp_folder: Path, messages_api: MessagesApi) -> Iterator[Server]:
    env = {"MCP_CONFIG_PATH": str(mcp_folder / "mcp-config.json")}
    # No process stays: what one leaves behind shows at once.
    env = {**env, "LIVE_SESSIONS": "0"}
    with Daemon(mcp_folder / claude.version, claude, messages_api.url, env=env) as daemon:
        yield Server(daemon, claude)


def test_a_tool_of_an_mcp_server_is_called(mcp_server: Server) -> None:
    answer = mcp_server.ask(
        '[[tool:mcp__everything__echo {"message": "ping"}]]',
        mcp_allowed_tools=["mcp__everything__echo"],
    )
    assert answer.text == "Done. Tool said: Echo: ping"
    assert answer.events[0]["mcp_servers"] == [{"name": "everything", "status": "connected"}]


def test_only_the_named_tools_of_a_server_are_allowed(mcp_server: Server) -> None:
    answer = mcp_server.ask(
        '[[tool:mcp__everything__echo {"message": "ping"}]]',
        mcp_allowed_tools=["mcp__everything__get-sum"],
    )
    assert answer.tool_results[0]["is_error"] is True


def test_a_server_that_is_not_named_is_not_offered(mcp_server: Server) -> None:
    answer = mcp_server.ask("[[echo]]")
    assert answer.events[0]["mcp_servers"] == []
    assert not [tool for tool in answer.told["tools"] if tool.startswith("mcp__")]


def test_a_tool_of_an_unknown_server_is_refused(mcp_server: Server) -> None:
    answer = mcp_server.ask("[[text hello]]", mcp_allowed_tools=["mcp__nobody__x"])
    assert (answer.status, answer.error["param"]) == (400, "mcp-allowed-tools")
    assert "everything, other" in answer.error["message"]


def test_the_workspace_s_own_servers_are_not_offered(mcp_server: Server, mcp_folder: Path) -> None:
    workspace = workspace_of(mcp_server, "own-mcp")
    workspace.mkdir(parents=True)
    config = (mcp_folder / "mcp-config.json").read_text().replace("other", "smuggled")
    (workspace / ".mcp.json").write_text(config)
    settings = {"enableAllProjectMcpServers": True}
    (workspace / ".claude").mkdir()
    (workspace / ".claude" / "settings.json").write_text(json.dumps(settings))
    answer = mcp_server.ask("[[echo]]", workspace="own-mcp")
    offered = json.dumps([answer.events[0]["mcp_servers"], answer.told["tools"]])
    # The old CLI cannot be told to leave out what a workspace has approved for itself.
    assert ("smuggled" in offered) is mcp_server.claude.is_old


def test_the_health_report_names_the_servers(mcp_server: Server) -> None:
    with mcp_server.daemon.client() as client:
        answer = client.get("/health")
    assert answer.json()["checks"]["mcpConfig"]["details"]["servers"] == ["everything", "other"]
    assert SECRET not in answer.text


def test_secrets_of_mcp_servers_stay_secret(mcp_server: Server, messages_api: MessagesApi) -> None:
    name = f"secrets-{time.monotonic_ns()}"
    with mcp_server.asking(
        f"[[tokens 1]] [[wait {name}]] [[text done]]",
        mcp_allowed_tools=["mcp__everything__echo"],
    ) as response:
        lines = response.iter_lines()
        first = next(lines)
        messages_api.wait_for(lambda request: request.status == 200, text=name)
        commands = command_lines()
        files = list((mcp_server.daemon.state / "run").iterdir())
        assert [file.stat().st_mode & 0o777 for file in files] == [0o600]
        assert SECRET in files[0].read_text()
        messages_api.release(name)
        rest = "".join(lines)
    run = mcp_server.daemon.state / "run"
    wait_until(lambda: not list(run.iterdir()), "the file is removed")
    # The old CLI hides its arguments by itself.
    assert mcp_server.claude.is_old or any("--mcp-config" in command for command in commands)
    assert not [command for command in commands if SECRET in command]
    assert "everything" in first
    assert SECRET not in first + rest
    assert SECRET not in mcp_server.daemon.output


def command_lines() -> list[str]:
    """What `ps` shows of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return found

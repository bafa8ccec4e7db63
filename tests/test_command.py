"""What an agent process is started with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_proxy.cli.command import (
    MARKER,
    LaunchKey,
    SessionStart,
    StartKind,
    TurnSettings,
    build_argv,
    build_environment,
    check_rules,
    check_supported,
    clean_stderr,
    initialize_fields,
    launch_prefix,
    resolve_program,
    turn_requests,
)
from claude_proxy.cli.versions import Capabilities, capabilities_of
from claude_proxy.errors import Failure, ProxyError

OLD = capabilities_of("1.0.24")
MIDDLE = capabilities_of("1.0.128")
NEW = capabilities_of("2.1.197")

CLI = ("/opt/claude", "--first")
NO_HOOKS = '--settings={"disableAllHooks":true}'
USUAL = ["-p", "--verbose", "--input-format=stream-json", "--output-format=stream-json"]
SWITCHES = ["--include-partial-messages", "--replay-user-messages", "--strict-mcp-config"]
CAPABLE = [*SWITCHES, NO_HOOKS]
DISTRUST = [
    '--settings={"disableAllHooks":true,"env":{"CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD":"1"}}',
    "--setting-sources=user",
    "--add-dir=/srv/space",
]
NEWEST = [*SWITCHES, *DISTRUST]

KEY = LaunchKey("/srv/space")
PLAIN = TurnSettings()
FRESH = SessionStart(StartKind.NEW, "new-id")
FULL_KEY = LaunchKey(
    "/srv/space",
    model="opus",
    disallowed_tools=("Bash(rm *)", "Write"),
    max_turns=3,
    skip_permissions=True,
    mcp_servers=("a",),
)
FULL = TurnSettings(
    allowed_tools=("Bash(git *)", "mcp__a__x"),
    permission_mode="plan",
    effort="high",
    system_prompt="Be brief.",
    append_system_prompt="And kind.",
    json_schema={"type": "object"},
)


def argv(
    key: LaunchKey = KEY,
    settings: TurnSettings = PLAIN,
    start: SessionStart = FRESH,
    can: Capabilities = NEW,
    mcp_config: str | None = None,
    *,
    hooks: bool = False,
    reusable: bool = False,
) -> list[str]:
    """The argument vector without what it always begins with."""
    built = build_argv(
        CLI, key, settings, start, can, mcp_config=mcp_config, hooks=hooks, reusable=reusable
    )
    begin = [*CLI, *USUAL]
    assert built[: len(begin)] == begin
    return built[len(begin) :]


# Argument vector.


@pytest.mark.parametrize(
    ("can", "start", "options"),
    [
        (OLD, SessionStart(StartKind.NEW, "n"), []),
        (OLD, SessionStart(StartKind.NEW, None), []),
        (OLD, SessionStart(StartKind.RESUME, "r"), ["--resume=r"]),
        (OLD, SessionStart(StartKind.FORK, None, "src"), ["--resume=src"]),
        (OLD, SessionStart(StartKind.FORK, "n", "src"), ["--resume=src"]),
        (MIDDLE, SessionStart(StartKind.NEW, "n"), [*CAPABLE, "--session-id=n"]),
        (MIDDLE, SessionStart(StartKind.NEW, None), CAPABLE),
        (MIDDLE, SessionStart(StartKind.RESUME, "r"), [*CAPABLE, "--resume=r"]),
        (
            MIDDLE,
            SessionStart(StartKind.FORK, "n", "src"),
            [*CAPABLE, "--resume=src", "--fork-session", "--session-id=n"],
        ),
        (
            MIDDLE,
            SessionStart(StartKind.FORK, None, "src"),
            [*CAPABLE, "--resume=src", "--fork-session"],
        ),
        (NEW, SessionStart(StartKind.NEW, "n"), [*NEWEST, "--session-id=n"]),
        (NEW, SessionStart(StartKind.NEW, None), NEWEST),
        (NEW, SessionStart(StartKind.RESUME, "r"), [*NEWEST, "--resume=r"]),
        (
            NEW,
            SessionStart(StartKind.FORK, "n", "src"),
            [*NEWEST, "--resume=src", "--fork-session", "--session-id=n"],
        ),
        (
            NEW,
            SessionStart(StartKind.FORK, None, "src"),
            [*NEWEST, "--resume=src", "--fork-session"],
        ),
    ],
)
def test_each_version_is_started_for_each_kind_of_session(
    can: Capabilities, start: SessionStart, options: list[str]
) -> None:
    assert argv(start=start, can=can) == options


ALL_BUT_PROMPTS = [
    "--dangerously-skip-permissions",
    "--permission-mode=plan",
    "--allowedTools=Bash(git *)",
    "--allowedTools=mcp__a__x",
    "--disallowedTools=Bash(rm *)",
    "--disallowedTools=Write",
    "--mcp-config=/run/mcp.json",
    "--model=opus",
    "--max-turns=3",
    "--effort=high",
]
PROMPTS = ["--system-prompt=Be brief.", "--append-system-prompt=And kind."]


@pytest.mark.parametrize(
    ("can", "options"),
    [
        (OLD, [*ALL_BUT_PROMPTS, *PROMPTS]),
        (MIDDLE, [*CAPABLE, "--session-id=new-id", *ALL_BUT_PROMPTS, *PROMPTS]),
        (NEW, [*NEWEST, "--session-id=new-id", *ALL_BUT_PROMPTS]),
    ],
)
def test_everything_that_can_be_asked_is_in_the_arguments(
    can: Capabilities, options: list[str]
) -> None:
    assert argv(FULL_KEY, FULL, can=can, mcp_config="/run/mcp.json") == options


@pytest.mark.parametrize(
    ("can", "options"), [(OLD, []), (MIDDLE, CAPABLE), (NEW, NEWEST)], ids=["old", "middle", "new"]
)
def test_a_workspace_is_distrusted_as_far_as_the_cli_can(
    can: Capabilities, options: list[str]
) -> None:
    start = SessionStart(StartKind.NEW, None)
    assert argv(start=start, can=can) == options
    trusted = argv(start=start, can=can, hooks=True)
    assert trusted == [option for option in options if option in SWITCHES]


def test_one_turn_is_the_least_and_is_passed_on() -> None:
    assert "--max-turns=1" in argv(LaunchKey("/w", max_turns=1))


def test_empty_prompts_are_passed_on_to_a_cli_that_takes_them_as_arguments() -> None:
    options = argv(settings=TurnSettings(system_prompt="", append_system_prompt=""), can=MIDDLE)
    assert options[-2:] == ["--system-prompt=", "--append-system-prompt="]


@pytest.mark.parametrize(
    ("can", "options"),
    [
        (OLD, [*ALL_BUT_PROMPTS, *PROMPTS]),
        (MIDDLE, [*CAPABLE, "--session-id=new-id", *ALL_BUT_PROMPTS, *PROMPTS]),
        (
            NEW,
            [
                *NEWEST,
                "--session-id=new-id",
                "--dangerously-skip-permissions",
                "--disallowedTools=Bash(rm *)",
                "--disallowedTools=Write",
                "--mcp-config=/run/mcp.json",
                "--model=opus",
                "--max-turns=3",
            ],
        ),
    ],
)
def test_a_process_that_may_be_reused_is_started_without_what_belongs_to_a_turn(
    can: Capabilities, options: list[str]
) -> None:
    assert argv(FULL_KEY, FULL, can=can, mcp_config="/run/mcp.json", reusable=True) == options


HOSTILE = st.text() | st.sampled_from(
    ["-p", "--dangerously-skip-permissions", "--", "a --b", "x\n--y", "=", "--model=z", "$(id)"]
)


@given(
    model=HOSTILE,
    allowed=st.lists(HOSTILE, max_size=3),
    denied=st.lists(HOSTILE, max_size=3),
    text=HOSTILE,
    can=st.sampled_from([OLD, MIDDLE, NEW]),
    kind=st.sampled_from(StartKind),
)
def test_no_value_becomes_an_option(
    *,
    model: str,
    allowed: list[str],
    denied: list[str],
    text: str,
    can: Capabilities,
    kind: StartKind,
) -> None:
    key = LaunchKey("/srv/space", model=model, disallowed_tools=tuple(denied))
    settings = TurnSettings(
        allowed_tools=tuple(allowed),
        permission_mode=text,
        effort=text,
        system_prompt=text,
        append_system_prompt=text,
    )
    options = argv(key, settings, SessionStart(kind, text, text), can, mcp_config=text)
    bare = {*CAPABLE, *NEWEST, "--fork-session"}
    valued = [option for option in options if option not in bare]
    assert all(option.startswith("--") and "=" in option for option in valued)
    names = {option.partition("=")[0] for option in valued}
    assert "--dangerously-skip-permissions" not in options
    assert names <= {
        "--allowedTools",
        "--append-system-prompt",
        "--disallowedTools",
        "--effort",
        "--mcp-config",
        "--model",
        "--permission-mode",
        "--resume",
        "--session-id",
        "--system-prompt",
    }
    assert f"--model={model}" in options
    assert [o for o in options if o.startswith("--allowedTools=")] == [
        f"--allowedTools={rule}" for rule in allowed
    ]
    assert [o for o in options if o.startswith("--disallowedTools=")] == [
        f"--disallowedTools={rule}" for rule in denied
    ]


# What is set late.


@pytest.mark.parametrize("can", [OLD, MIDDLE])
def test_an_older_cli_gets_nothing_late(can: Capabilities) -> None:
    assert initialize_fields(FULL, can) == {}


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (PLAIN, {}),
        (
            FULL,
            {
                "systemPrompt": ["Be brief."],
                "appendSystemPrompt": "And kind.",
                "jsonSchema": {"type": "object"},
            },
        ),
        (TurnSettings(system_prompt=""), {"systemPrompt": [""]}),
        (TurnSettings(append_system_prompt=""), {"appendSystemPrompt": ""}),
        (TurnSettings(json_schema={}), {"jsonSchema": {}}),
    ],
)
def test_a_newer_cli_gets_prompts_and_schema_late(
    settings: TurnSettings, fields: dict[str, Any]
) -> None:
    assert initialize_fields(settings, NEW) == fields


def test_what_people_wrote_is_not_in_the_repr() -> None:
    assert repr(FULL) == "<TurnSettings with 2 allowed tools>"
    assert "brief" not in f"{FULL} {[FULL]}"


# What is set for each turn.


def flags(*rules: str, effort: str | None = None) -> tuple[str, dict[str, Any]]:
    return (
        "apply_flag_settings",
        {"settings": {"permissions": {"allow": list(rules)}, "effortLevel": effort}},
    )


def mode(name: str) -> tuple[str, dict[str, Any]]:
    return "set_permission_mode", {"mode": name}


READS = TurnSettings(allowed_tools=("Read",))
PLANS = TurnSettings(permission_mode="plan")


@pytest.mark.parametrize(
    ("settings", "in_force", "requests"),
    [
        (PLAIN, PLAIN, []),
        (FULL, PLAIN, [mode("plan"), flags("Bash(git *)", "mcp__a__x", effort="high")]),
        (FULL, FULL, []),
        # The whole list, in place of the one before.
        (TurnSettings(allowed_tools=("Read", "Edit")), READS, [flags("Read", "Edit")]),
        (TurnSettings(allowed_tools=("Edit",)), READS, [flags("Edit")]),
        (PLAIN, READS, [flags()]),
        # What stays the same is sent along with what changes.
        (TurnSettings(allowed_tools=("Read",), effort="low"), READS, [flags("Read", effort="low")]),
        (PLAIN, TurnSettings(effort="low"), [flags()]),
        (TurnSettings(permission_mode="default"), PLANS, [mode("default")]),
        (PLANS, READS, [mode("plan"), flags()]),
        (PLAIN, PLANS, []),
        # Prompts are not set for a turn.
        (TurnSettings(system_prompt="x", json_schema={}), PLAIN, []),
    ],
)
def test_a_turn_is_set_by_what_differs(
    settings: TurnSettings, in_force: TurnSettings, requests: list[tuple[str, dict[str, Any]]]
) -> None:
    assert turn_requests(settings, in_force) == requests


def test_no_mode_takes_away_what_a_process_was_started_with() -> None:
    full = turn_requests(FULL, PLAIN, skip_permissions=True)
    assert full == [flags("Bash(git *)", "mcp__a__x", effort="high")]
    assert turn_requests(PLANS, PLAIN, skip_permissions=True) == []


@pytest.mark.parametrize(
    ("value", "rules"),
    [
        ("Read", ["Read"]),
        ("Read,Write", ["Read", "Write"]),
        (" Read , Write  Edit,", ["Read", "Write", "Edit"]),
        ("Bash(git log, git show),Read", ["Bash(git log, git show)", "Read"]),
        ("Bash(git *) Read", ["Bash(git *)", "Read"]),
        ("mcp__a__x", ["mcp__a__x"]),
        ("Write()", ["Write"]),
        ("Write\n", ["Write"]),
        ("Bash(a)b c", ["Bash(a)b", "c"]),
        # Parentheses are not counted: the first closing one closes.
        ("Bash(echo (a) b)", ["Bash(echo (a)", "b)"]),
        ("Bash(never, closed", ["Bash(never, closed"]),
        ("a)b,c", ["a)b", "c"]),
        ("", []),
        (" , ", []),
    ],
)
def test_rules_are_split_as_the_cli_splits_its_arguments(value: str, rules: list[str]) -> None:
    settings = TurnSettings(allowed_tools=(value, "Last"))
    assert turn_requests(settings, PLAIN) == [flags(*rules, "Last")]


def split_by_hand(value: str) -> list[str]:
    """Character by character, as the CLI does it."""
    rules, rule, inside = [], "", False
    for character in value:
        if character in ", " and not inside:
            rules.append(rule)
            rule = ""
            continue
        rule += character
        inside = character == "(" or (inside and character != ")")
    return [text.strip() for text in [*rules, rule] if text.strip()]


@given(st.lists(HOSTILE | st.text("(), ab\n*:"), max_size=3))
def test_hostile_rules_are_split_so_too(values: list[str]) -> None:
    expected = [rule.removesuffix("()") for value in values for rule in split_by_hand(value)]
    requests = turn_requests(TurnSettings(allowed_tools=tuple(values)), PLAIN)
    wanted = [rule for rule in expected if rule]
    assert requests == ([flags(*wanted)] if wanted else [])


# What a version lacks.

ARGUMENT = 128 * 1024 - 1
SYSTEM_PROMPT_LIMIT = ARGUMENT - len("--system-prompt=")
APPENDED_LIMIT = ARGUMENT - len("--append-system-prompt=")


@pytest.mark.parametrize(
    ("can", "settings", "partial", "param", "sentence"),
    [
        (
            OLD,
            TurnSettings(permission_mode="auto"),
            False,
            "permission-mode",
            "knows these permission modes: acceptEdits, bypassPermissions, default, plan",
        ),
        (
            OLD,
            TurnSettings(effort="low"),
            False,
            "effort",
            "cannot set an effort; leave it out or update the CLI",
        ),
        (
            MIDDLE,
            TurnSettings(effort="low"),
            False,
            "effort",
            "cannot set an effort; leave it out or update the CLI",
        ),
        (
            OLD,
            PLAIN,
            True,
            "include-partial-messages",
            "has no partial messages; leave the field out",
        ),
        (
            MIDDLE,
            TurnSettings(json_schema={}),
            False,
            "response_format",
            "cannot hold an answer to a JSON schema; update the CLI",
        ),
        (
            MIDDLE,
            TurnSettings(system_prompt="a\0b"),
            False,
            "system-prompt",
            "takes no NUL character here",
        ),
        (
            OLD,
            TurnSettings(append_system_prompt="\0"),
            False,
            "append-system-prompt",
            "takes no NUL character here",
        ),
        (
            MIDDLE,
            TurnSettings(system_prompt="x" * (SYSTEM_PROMPT_LIMIT + 1)),
            False,
            "system-prompt",
            "takes at most 128 KiB here; shorten it or update the CLI",
        ),
        (
            MIDDLE,
            TurnSettings(append_system_prompt="é" * (APPENDED_LIMIT // 2) + "xx"),
            False,
            "append-system-prompt",
            "takes at most 128 KiB here; shorten it or update the CLI",
        ),
        (
            NEW,
            TurnSettings(permission_mode="bogus"),
            False,
            "permission-mode",
            f"knows these permission modes: {', '.join(NEW.permission_modes)}",
        ),
    ],
)
def test_what_a_version_lacks_is_refused_by_name(
    can: Capabilities, settings: TurnSettings, partial: bool, param: str, sentence: str
) -> None:
    with pytest.raises(ProxyError) as caught:
        check_supported(settings, can, partial_messages=partial)
    error = caught.value
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, param)
    assert error.message == f"The Claude CLI on this server ({can.version}) {sentence}."


@pytest.mark.parametrize(
    ("can", "settings", "partial"),
    [
        (OLD, PLAIN, False),
        (OLD, TurnSettings(permission_mode="plan", system_prompt="x", allowed_tools=("a",)), False),
        (MIDDLE, TurnSettings(append_system_prompt="x"), True),
        (
            MIDDLE,
            TurnSettings(
                system_prompt="x" * SYSTEM_PROMPT_LIMIT, append_system_prompt="x" * APPENDED_LIMIT
            ),
            False,
        ),
        (NEW, FULL, True),
        (NEW, TurnSettings(system_prompt="\0" * 200_000, append_system_prompt="é" * 200_000), True),
        (NEW, TurnSettings(permission_mode="dontAsk"), False),
    ],
)
def test_what_a_version_has_passes(
    can: Capabilities, settings: TurnSettings, partial: bool
) -> None:
    check_supported(settings, can, partial_messages=partial)


@pytest.mark.parametrize(
    ("can", "rules", "refused"),
    [
        (OLD, ("Bash(git log, git show)",), True),
        (OLD, ("Bash", "Read(a,b)"), True),
        (OLD, ("Bash(,)",), True),
        (OLD, (), False),
        (OLD, ("Bash", "Bash(git *)", "mcp__a__x"), False),
        (MIDDLE, ("Bash(git log, git show)",), False),
        (NEW, ("Bash(git log, git show)",), False),
    ],
)
def test_a_rule_that_a_version_would_cut_at_its_comma_is_refused(
    can: Capabilities, rules: tuple[str, ...], refused: bool
) -> None:
    if not refused:
        check_rules("allowed-tools", rules, can)
        return
    with pytest.raises(ProxyError) as caught:
        check_rules("disallowed-tools", rules, can)
    error = caught.value
    assert (error.failure, error.param) == (Failure.INVALID_VALUE, "disallowed-tools")
    assert error.message == (
        "The Claude CLI on this server (1.0.24) ends a tool rule at its first comma; write the "
        "rule without commas or update the CLI."
    )


def test_the_longest_prompt_that_passes_is_the_longest_that_the_system_takes() -> None:
    options = argv(
        settings=TurnSettings(
            system_prompt="x" * SYSTEM_PROMPT_LIMIT, append_system_prompt="x" * APPENDED_LIMIT
        ),
        can=MIDDLE,
    )
    assert [len(option) for option in options[-2:]] == [ARGUMENT, ARGUMENT]
    true = resolve_program("true", os.defpath)
    assert subprocess.run([true, *options[-2:]], check=True).returncode == 0
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run([true, options[-1] + "x"], check=True)


# Environment.


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("/usr/bin:/bin", "/usr/bin:/bin"),
        ("/usr/bin:.:bin:/bin", "/usr/bin:/bin"),
        (":/usr/bin", "/usr/bin"),
        ("/usr/bin::/bin:", "/usr/bin:/bin"),
        ("./node_modules/.bin:../x:~/bin:/opt/a b", "/opt/a b"),
        # An empty PATH means the current directory: the workspace.
        ("", os.defpath),
        (".", os.defpath),
        ("bin:", os.defpath),
        (None, os.defpath),
    ],
)
def test_only_absolute_entries_of_path_reach_the_child(base: str | None, path: str) -> None:
    environment = {"HOME": "/home/me"} | ({} if base is None else {"PATH": base})
    assert build_environment(environment, "m.1") == {
        "HOME": "/home/me",
        "PATH": path,
        "CLAUDE_PROXY_AGENT": "m.1",
    }
    assert all(Path(entry).is_absolute() for entry in path.split(os.pathsep))


def test_the_marker_replaces_one_that_was_inherited_and_the_base_stays_as_it_is() -> None:
    base = {MARKER: "the marker of an outer server", "PATH": "."}
    assert build_environment(base, "m.2")[MARKER] == "m.2"
    assert base == {MARKER: "the marker of an outer server", "PATH": "."}


# The program.


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def not_found(name: str, path: str) -> str:
    with pytest.raises(ProxyError) as caught:
        resolve_program(name, path)
    assert caught.value.failure is Failure.CLI_NOT_FOUND
    assert "npm install -g @anthropic-ai/claude-code" in caught.value.message
    assert "CLAUDE_CLI" in caught.value.message
    return caught.value.message.partition(".")[0]


def test_the_first_executable_file_on_path_is_taken(tmp_path: Path) -> None:
    (tmp_path / "one" / "claude").mkdir(parents=True)
    program(tmp_path / "two" / "claude", 0o644)
    third = program(tmp_path / "three" / "claude")
    program(tmp_path / "four" / "claude")
    path = os.pathsep.join(str(tmp_path / n) for n in ("none", "one", "two", "three", "four"))
    assert resolve_program("claude", path) == str(third)


@pytest.mark.parametrize("path", ["", ".", "bin", "./bin", ":", "..", "bin:.:", "~/bin"])
def test_the_current_directory_never_supplies_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for place in ("claude", "bin/claude", "inner/claude", "~/bin/claude"):
        program(tmp_path / place)
    monkeypatch.chdir(tmp_path / "inner")
    program(Path("bin/claude"))
    assert not_found("claude", path) == "The Claude CLI was not found on the server's PATH"


def test_a_link_to_an_executable_is_taken_under_its_own_name(tmp_path: Path) -> None:
    real = program(tmp_path / "lib" / "cli.js")
    link = tmp_path / "claude"
    link.symlink_to(real)
    assert resolve_program("claude", str(tmp_path)) == str(link)
    real.unlink()
    assert not_found("claude", str(tmp_path)).endswith("on the server's PATH")


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    own = program(tmp_path / "my claude")
    assert resolve_program(str(own), "") == str(own)


def test_an_absolute_path_that_leads_nowhere_is_told_apart(tmp_path: Path) -> None:
    nowhere = not_found(str(tmp_path / "none"), os.defpath)
    assert nowhere == "The Claude CLI was not found where CLAUDE_CLI points"
    for useless in (tmp_path, program(tmp_path / "text", 0o644)):
        assert not_found(str(useless), os.defpath) == "CLAUDE_CLI is not an executable file"


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_directory_is_no_program(tmp_path: Path, name: str) -> None:
    assert not_found(name, str(tmp_path)) == "The Claude CLI was not found on the server's PATH"


# The start.

REPORT = (
    "import json,os,sys;"
    "json.dump([os.getpid(),os.getsid(0),os.getpgid(0),os.getcwd(),sys.argv[1:]],sys.stdout)"
)
CHILD = [sys.executable, "-I", "-S", "-c", REPORT]


@pytest.fixture(name="launcher", params=["setsid", "python"])
def _launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program that stands first in the prefix."""
    if request.param == "python":
        monkeypatch.setattr("claude_proxy.cli.command._SETSID_PLACES", ("/none/setsid",))
        return sys.executable
    found = [place for place in ("/usr/bin/setsid", "/bin/setsid") if Path(place).exists()]
    if not found:
        pytest.skip("there is no setsid on this system")
    return found[0]


DIRECTORIES = ["plain", "-x", "--", "a b", "quo'te\"s", "new\nline\n", "$HOME `id`", "größe", "*"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_child_leads_its_own_session_in_its_directory(
    launcher: str, tmp_path: Path, name: str
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    prefix = launch_prefix(str(directory))
    assert prefix[0] == launcher
    arguments = ["-x", "", "a b", "new\nline", "$HOME", "'"]
    with subprocess.Popen([*prefix, *CHILD, *arguments], stdout=subprocess.PIPE) as child:
        output, _ = child.communicate(timeout=30)
    pid, session, group, where, received = json.loads(output)
    assert child.returncode == 0
    assert pid == session == group == child.pid
    assert where == str(directory)
    assert received == arguments


def test_a_relative_directory_that_looks_like_an_option_is_none(
    launcher: str, tmp_path: Path
) -> None:
    (tmp_path / "-P").mkdir()
    done = subprocess.run(
        [*launch_prefix("-P"), *CHILD], cwd=tmp_path, capture_output=True, check=True, timeout=30
    )
    assert json.loads(done.stdout)[3] == str(tmp_path / "-P")


def test_nothing_runs_if_the_directory_is_gone(launcher: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    done = subprocess.run(
        [*launch_prefix(str(tmp_path / "gone")), "/bin/sh", "-c", f"touch '{witness}'"],
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode not in (0, -signal.SIGKILL)
    assert done.stderr
    assert not witness.exists()


# What a child complained about.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        ("\n \n\t\n", ""),
        ("one\ntwo\n\n", "two"),
        ("  spaced\t\n", "spaced"),
        ("\x1b[31mred\x1b[0m\n", "red"),
        ("said\n\x1b[2K\x1b[?25h\n", "said"),
        ("a\x00b\x07c\x7f", "abc"),
        ("progress\rdone", "done"),
        ("Windows\r\nlines\r\n", "lines"),
        ("tab\tstays", "tab\tstays"),
        ("größe 😀 \ufffd", "größe 😀 \ufffd"),
        ("x" * 600, "x" * 500),
        ("x" * 600 + "\nlast", "last"),
    ],
)
def test_the_last_line_that_says_something_is_kept(text: str, said: str) -> None:
    assert clean_stderr(text) == said


@given(st.text())
def test_no_control_character_is_left_in_what_was_said(text: str) -> None:
    said = clean_stderr(text)
    assert len(said) <= 500
    assert not any(character < " " and character != "\t" for character in said)
    assert "\x7f" not in said

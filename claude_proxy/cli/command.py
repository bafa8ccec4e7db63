"""
What an agent process is started with: argument vector and environment.

Options are always written ``--option=value``, so that no value can become an option; prompts never
are in argv (the kernel limits one argument to 128 KiB, and everyone on the machine can read it).
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

from claude_proxy.cli.versions import Capabilities
from claude_proxy.errors import Failure, ProxyError

__all__ = [
    "MARKER",
    "LaunchKey",
    "SessionStart",
    "StartKind",
    "TurnSettings",
    "build_argv",
    "build_environment",
    "check_rules",
    "check_supported",
    "clean_stderr",
    "initialize_fields",
    "launch_prefix",
    "resolve_program",
    "turn_requests",
]

MARKER = "CLAUDE_PROXY_AGENT"
"""The environment variable that marks every process of ours and all that it starts."""

_COMMA_INSIDE = re.compile(r"\([^)]*,")

# An opening parenthesis protects all up to the first closing one.
_RULE = re.compile(r"(?:\([^)]*(?:\)|$)|[^(, ])+")

_LEAST_THINKING = 1024
"""The fewest tokens that the Messages API takes as a budget for thinking."""

_ARGUMENT_LIMIT = 128 * 1024 - 1
"""The longest single argument that Linux takes (MAX_ARG_STRLEN), less its NUL."""


@dataclass(frozen=True, slots=True)
class LaunchKey:
    """
    All that is fixed when a process starts.

    @ivar workspace: the absolute directory it works in.
    @ivar mcp_servers: names of the MCP servers that it is offered, sorted.
    @ivar max_output_tokens: limit of one answer of the model.
    """

    workspace: str
    model: str | None = None
    disallowed_tools: tuple[str, ...] = ()
    max_turns: int | None = None
    skip_permissions: bool = False
    mcp_servers: tuple[str, ...] = ()
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """What belongs to a turn rather than to the process that runs it."""

    allowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    effort: str | None = None
    system_prompt: str | None = None
    append_system_prompt: str | None = None
    json_schema: dict[str, Any] | None = None

    def __repr__(self) -> str:
        # System prompts are what people wrote: they stay out of logs and tracebacks.
        return f"<TurnSettings with {len(self.allowed_tools)} allowed tools>"


class StartKind(Enum):
    """How a process comes to its session."""

    NEW = auto()
    RESUME = auto()
    FORK = auto()


@dataclass(frozen=True, slots=True)
class SessionStart:
    """
    The session that a process is started for.

    @ivar session_id: for NEW and FORK the id that the new session gets where the CLI takes one
        (else None); for RESUME the session's id.
    @ivar source: for FORK, the session whose conversation is copied.
    """

    kind: StartKind
    session_id: str | None
    source: str | None = None


def check_supported(settings: TurnSettings, can: Capabilities, *, partial_messages: bool) -> None:
    """
    Refuse what this version of the CLI lacks, before anything is started.

    @param partial_messages: whether the client asked for them.
    @raise ProxyError: INVALID_VALUE that names the field and the version.
    """

    def refuse(param: str, what: str) -> ProxyError:
        message = f"The Claude CLI on this server ({can.version}) {what}."
        return ProxyError(Failure.INVALID_VALUE, message, param=param)

    mode = settings.permission_mode
    if mode is not None and mode not in can.permission_modes:
        known = ", ".join(can.permission_modes)
        raise refuse("permission-mode", f"knows these permission modes: {known}")
    if settings.effort is not None and not can.effort:
        raise refuse("effort", "cannot set an effort; leave it out or update the CLI")
    if partial_messages and not can.partial_messages:
        raise refuse("include-partial-messages", "has no partial messages; leave the field out")
    if settings.json_schema is not None and not can.late_prompts:
        raise refuse("response_format", "cannot hold an answer to a JSON schema; update the CLI")
    if not can.late_prompts:
        for param, text in (
            ("system-prompt", settings.system_prompt),
            ("append-system-prompt", settings.append_system_prompt),
        ):
            if text is not None and "\0" in text:
                raise refuse(param, "takes no NUL character here")
            if text is not None and len(text.encode()) > _ARGUMENT_LIMIT - len(param) - 3:
                raise refuse(param, "takes at most 128 KiB here; shorten it or update the CLI")


def check_rules(param: str, rules: Sequence[str], can: Capabilities) -> None:
    """
    Refuse tool rules that this version of the CLI would read as something else.

    @param param: the request's name for them.
    @raise ProxyError: INVALID_VALUE that names the field and the version.
    """
    if not can.rule_commas and any(_COMMA_INSIDE.search(rule) for rule in rules):
        message = (
            f"The Claude CLI on this server ({can.version}) ends a tool rule at its first comma; "
            "write the rule without commas or update the CLI."
        )
        raise ProxyError(Failure.INVALID_VALUE, message, param=param)


def build_argv(
    cli: Sequence[str],
    key: LaunchKey,
    settings: TurnSettings,
    start: SessionStart,
    can: Capabilities,
    *,
    mcp_config: str | None,
    hooks: bool,
    reusable: bool = False,
) -> list[str]:
    """
    Build the CLI's argument vector, the program first.

    @param mcp_config: path of the file that describes `key.mcp_servers`, or None without any.
    @param hooks: whether hooks may run, and the workspace may configure the CLI.
    @param reusable: leave out what `turn_requests` sets, because a process keeps for good what it
        is started with.  A CLI that cannot serve several turns gets it all the same.
    """
    reusable = reusable and can.live
    argv = [*cli, "-p", "--verbose", "--input-format=stream-json", "--output-format=stream-json"]
    switches = {
        "--include-partial-messages": can.partial_messages,
        "--replay-user-messages": can.replay,
        "--strict-mcp-config": can.strict_mcp,
    }
    argv += [option for option, wanted in switches.items() if wanted]
    if not hooks:
        argv += _distrust(key.workspace, can)
    argv += _session_options(start, can)
    argv += _permission_options(key, settings, reusable=reusable)
    values: dict[str, str | int | None] = {
        "--mcp-config": mcp_config,
        "--model": key.model,
        "--max-turns": key.max_turns,
        "--effort": None if reusable else settings.effort,
    }
    if not can.late_prompts:
        values["--system-prompt"] = settings.system_prompt
        values["--append-system-prompt"] = settings.append_system_prompt
    argv += [f"{option}={value}" for option, value in values.items() if value is not None]
    return argv


def _distrust(workspace: str, can: Capabilities) -> list[str]:
    """
    Options that keep what lies in the workspace from running commands and from giving permissions.

    Hooks are not all that could: settings name other commands (``apiKeyHelper``), an environment
    (``ANTHROPIC_BASE_URL``) and rules; the project's own commands, skills and agents bring commands
    and rules along, too.  So none of them is read.  CLAUDE.md would go with them: it comes back by
    declaring the workspace an additional directory of itself.
    """
    if not can.settings:
        return []
    settings: dict[str, Any] = {"disableAllHooks": True}
    sources = []
    if can.setting_sources:
        settings["env"] = {"CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1"}
        sources = ["--setting-sources=user", f"--add-dir={workspace}"]
    return [f"--settings={json.dumps(settings, separators=(',', ':'))}", *sources]


def _session_options(start: SessionStart, can: Capabilities) -> list[str]:
    own_id = [f"--session-id={start.session_id}"] if can.session_id and start.session_id else []
    if start.kind is StartKind.NEW:
        return own_id
    if start.kind is StartKind.RESUME:
        return [f"--resume={start.session_id}"]
    # A CLI without --fork-session makes a new id at every resume: that is a fork already.
    fork = ["--fork-session", *own_id] if can.fork else []
    return [f"--resume={start.source}", *fork]


def _permission_options(key: LaunchKey, settings: TurnSettings, *, reusable: bool) -> list[str]:
    argv = []
    if key.skip_permissions:
        argv.append("--dangerously-skip-permissions")
    if not reusable:
        if settings.permission_mode is not None:
            argv.append(f"--permission-mode={settings.permission_mode}")
        argv += [f"--allowedTools={rule}" for rule in settings.allowed_tools]
    argv += [f"--disallowedTools={rule}" for rule in key.disallowed_tools]
    return argv


def initialize_fields(settings: TurnSettings, can: Capabilities) -> dict[str, Any]:
    """The fields of the first ``initialize`` request: what only it can set."""
    if not can.late_prompts:
        return {}
    fields: dict[str, Any] = {}
    if settings.system_prompt is not None:
        fields["systemPrompt"] = [settings.system_prompt]
    if settings.append_system_prompt is not None:
        fields["appendSystemPrompt"] = settings.append_system_prompt
    if settings.json_schema is not None:
        fields["jsonSchema"] = settings.json_schema
    return fields


def turn_requests(
    settings: TurnSettings, in_force: TurnSettings, *, skip_permissions: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """
    The control requests that set a turn, to be sent right before its message: subtypes and fields.

    They are for a process that was started as reusable.  Only what differs is sent: the CLI takes
    10 ms for a change of rules or effort.  The list of rules is always the whole list, and an
    effort that is not wanted any more is taken back.

    @param in_force: what holds in the process now; ``TurnSettings()`` before its first turn.
    @param skip_permissions: the process was started so.  It stays in the mode
        ``bypassPermissions``, which is possible only then, as a CLI does that gets both in its
        arguments.
    """
    requests: list[tuple[str, dict[str, Any]]] = []
    mode = settings.permission_mode
    # There is no request for "none": what that means is for the caller to know.
    if mode is not None and mode != in_force.permission_mode and not skip_permissions:
        requests.append(("set_permission_mode", {"mode": mode}))
    flags = _flag_settings(settings)
    if flags != _flag_settings(in_force):
        requests.append(("apply_flag_settings", {"settings": flags}))
    return requests


def _flag_settings(settings: TurnSettings) -> dict[str, Any]:
    """The rules and the effort; a null takes an effort back."""
    rules = [rule for value in settings.allowed_tools for rule in _split_rules(value)]
    return {"permissions": {"allow": rules}, "effortLevel": settings.effort}


def _split_rules(value: str) -> list[str]:
    """
    The rules that the CLI finds in one ``--allowedTools``; in its settings it takes them as they
    are, and would find none in ``Read,Write``.

    It splits at commas and blanks that are in no parentheses, and does not count parentheses.
    """
    rules = (part.strip().removesuffix("()") for part in _RULE.findall(value))
    return [rule for rule in rules if rule]


def build_environment(
    base: Mapping[str, str], marker: str, *, max_output_tokens: int | None = None
) -> dict[str, str]:
    """
    The environment of an agent process.

    The child starts in a workspace that an agent can write to, so PATH keeps its absolute entries
    only: neither the CLI's interpreter nor a tool may come from the workspace by a relative one.
    An empty PATH would be one, too, so without any absolute entry it is the system's default.
    """
    environment = dict(base)
    entries = _absolute_entries(base.get("PATH", os.defpath))
    environment["PATH"] = os.pathsep.join(entries) or os.defpath
    environment[MARKER] = marker
    if max_output_tokens is not None:
        # There is no option for it, in no version.
        environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(max_output_tokens)
        if max_output_tokens <= _LEAST_THINKING:
            # The CLI gives all but one token to the thinking, and the API refuses so few of them.
            environment["MAX_THINKING_TOKENS"] = "0"
    return environment


def _absolute_entries(path: str) -> list[str]:
    return [entry for entry in path.split(os.pathsep) if Path(entry).is_absolute()]


def resolve_program(name: str, path: str) -> str:
    """
    Find the absolute path of the program to run.

    @param name: an absolute path, or a name without a slash to be looked for on PATH.
    @param path: the value of PATH; entries that are not absolute do not count.
    @raise ProxyError: CLI_NOT_FOUND, saying what is missing.
    """
    if "/" in name:
        candidates = [name]
    else:
        candidates = [str(Path(entry, name)) for entry in _absolute_entries(path)]
    for candidate in candidates:
        if _is_executable(candidate):
            return candidate
    hint = (
        "Install the Claude CLI on the server with 'npm install -g @anthropic-ai/claude-code', "
        "or set CLAUDE_CLI to its path."
    )
    if "/" in name and Path(name).exists():
        raise ProxyError(Failure.CLI_NOT_FOUND, f"CLAUDE_CLI is not an executable file. {hint}")
    where = "where CLAUDE_CLI points" if "/" in name else "on the server's PATH"
    raise ProxyError(Failure.CLI_NOT_FOUND, f"The Claude CLI was not found {where}. {hint}")


def _is_executable(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - for every turn: a Path costs more
    except OSError:
        return False
    return stat.S_ISREG(mode) and os.access(path, os.X_OK)


_SETSID_PLACES = ("/usr/bin/setsid", "/bin/setsid")
_SHELL = "/bin/sh"
_PYTHON_LAUNCHER = (
    "import os,sys; os.setsid(); os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
)


@cache
def _first_executable(places: tuple[str, ...]) -> str | None:
    return next(filter(_is_executable, places), None)


def launch_prefix(directory: str) -> list[str]:
    """
    What to put before an argument vector so that it runs in `directory` as a session of its own.

    Both are done by the child itself: with them as arguments of its own, `spawnProcess` would
    have to fork, which blocks the reactor for milliseconds.  Where there is no setsid (macOS),
    Python stands in for it.
    """
    setsid = _first_executable(_SETSID_PLACES)
    if setsid is not None:
        script = 'cd -- "$1" && shift && exec "$@"'
        return [setsid, _SHELL, "-c", script, "sh", directory]
    return [sys.executable, "-I", "-S", "-c", _PYTHON_LAUNCHER, directory]


_CONTROL_CHARACTERS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


def clean_stderr(text: str) -> str:
    """The last line of stderr that says something, without escape sequences, 500 characters."""
    lines = [_CONTROL_CHARACTERS.sub("", line).strip() for line in text.splitlines()]
    said = [line for line in lines if line]
    return said[-1][:500] if said else ""

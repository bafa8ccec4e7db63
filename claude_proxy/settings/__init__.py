"""
The settings of the server: flags, then environment, then `.env`, then defaults.

`load_settings` turns the three sources into a frozen `Settings`, or raises one `SettingsError`
that names every mistake.  An empty value is as unset at every level.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from claude_proxy.settings.environment import child_environment, read_dotenv
from claude_proxy.settings.keys import ApiKey, read_keys
from claude_proxy.settings.reader import Paths, Reader, SettingsError, shown
from claude_proxy.settings.table import KEY_VARIABLES, OWN_VARIABLES, SETTINGS, Setting

__all__ = [
    "OWN_VARIABLES",
    "SETTINGS",
    "ApiKey",
    "Setting",
    "Settings",
    "SettingsError",
    "load_settings",
    "read_dotenv",
]

_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,255}")
_ENDPOINT = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*:.+")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    All settings, checked.  Durations are seconds, sizes bytes, paths absolute.

    @ivar listen: the Twisted endpoint description, from LISTEN or from HOST and PORT.
    @ivar mcp_config_named: whether the MCP file was asked for by name and so must exist.
    @ivar model_aliases: what clients may call a model, and which one that means; ``*`` stands for
        every other name, ``claude-code`` for the CLI's default.
    @ivar chat_activity: ``reasoning``, ``content`` or ``none``.
    @ivar chat_text_parameters: ``all``, ``safe`` or ``none``.
    @ivar child_environment: what the CLI inherits: nothing of our own settings.
    """

    host: str
    port: int
    listen: str
    total_timeout: float
    inactivity_timeout: float
    kill_timeout: float
    mcp_config_path: Path
    mcp_config_named: bool
    workspace_base: Path
    keys: tuple[ApiKey, ...]
    allowed_hosts: tuple[str, ...]
    log_level: str
    production: bool
    claude_cli: tuple[str, ...]
    max_body_bytes: int
    max_bodies_bytes: int
    max_connections: int
    max_concurrent_turns: int
    queue_length: int
    queue_timeout: float
    client_stall_timeout: float
    live_sessions: int
    live_idle: float
    spare_processes: int
    drain_timeout: float
    cors_origins: tuple[str, ...]
    allow_skip_permissions: bool
    workspace_hooks: bool
    model_aliases: tuple[tuple[str, str], ...]
    chat_activity: str
    chat_text_parameters: str
    state_path: Path
    child_environment: Mapping[str, str] = field(repr=False, hash=False)


def load_settings(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
    dotenv: Mapping[str, str | None],
    cwd: Path,
) -> Settings:
    """
    Check everything that was set.

    Reads nothing but its arguments and the file that API_KEYS_FILE names.

    @param flags: values by flag name, without dashes in front.
    @param cwd: the absolute directory that relative paths start from.
    @raise SettingsError: names every bad setting, its value unless it is a key, and what is
        accepted.
    """
    reader = Reader(flags, environ, dotenv)
    paths = Paths(cwd, environ)
    keys = read_keys(reader, paths)
    # A key that is mistyped still means that keys are wanted: it must not raise more mistakes.
    keyed = any(reader.text(name) for name in KEY_VARIABLES)
    host = _host(reader, keyed=keyed)
    port = reader.number("PORT", 0, 65535)
    listen = _listen(reader, host, port)
    settings = Settings(
        host=host,
        port=port,
        listen=listen,
        total_timeout=reader.seconds("CLAUDE_TOTAL_TIMEOUT_MS", 1),
        inactivity_timeout=reader.seconds("CLAUDE_INACTIVITY_TIMEOUT_MS", 1),
        kill_timeout=reader.seconds("PROCESS_KILL_TIMEOUT_MS", 0),
        mcp_config_path=paths.absolute(reader.text("MCP_CONFIG_PATH")),
        mcp_config_named=reader.source("MCP_CONFIG_PATH") is not None,
        workspace_base=paths.absolute(reader.text("WORKSPACE_BASE_PATH")),
        keys=keys,
        allowed_hosts=reader.items("ALLOWED_HOSTS", _host_name, "host names without port"),
        log_level=reader.choice("LOG_LEVEL", ("error", "warn", "info", "debug")),
        production=reader.choice("NODE_ENV", ("production", "development", "test")) == "production",
        claude_cli=_claude_cli(reader, paths),
        max_body_bytes=reader.number("MAX_BODY_BYTES", 1024, 1024**3),
        max_bodies_bytes=reader.number("MAX_BODIES_BYTES", 1024, 1024**4),
        max_connections=reader.number("MAX_CONNECTIONS", 1, 1_000_000),
        max_concurrent_turns=reader.number("MAX_CONCURRENT_TURNS", 1, 10_000),
        queue_length=reader.number("QUEUE_LENGTH", 0, 10_000),
        queue_timeout=reader.seconds("QUEUE_TIMEOUT_MS", 0),
        client_stall_timeout=reader.seconds("CLIENT_STALL_TIMEOUT_MS", 1),
        live_sessions=reader.number("LIVE_SESSIONS", 0, 10_000),
        live_idle=reader.seconds("LIVE_IDLE_MS", 1),
        spare_processes=reader.number("SPARE_PROCESSES", 0, 10_000),
        drain_timeout=reader.seconds("DRAIN_TIMEOUT_MS", 0),
        cors_origins=_cors_origins(reader, keyed=keyed),
        allow_skip_permissions=reader.switch("ALLOW_SKIP_PERMISSIONS"),
        workspace_hooks=reader.switch("WORKSPACE_HOOKS"),
        model_aliases=_model_aliases(reader),
        chat_activity=reader.choice("CHAT_ACTIVITY", ("reasoning", "content", "none")),
        chat_text_parameters=reader.choice("CHAT_TEXT_PARAMETERS", ("all", "safe", "none")),
        state_path=_state_path(reader, paths, environ),
        child_environment=child_environment(environ, dotenv),
    )
    if reader.mistakes:
        raise SettingsError(reader.mistakes)
    return settings


def _host(reader: Reader, *, keyed: bool) -> str:
    text = reader.text("HOST") or ("0.0.0.0" if keyed else "127.0.0.1")  # noqa: S104 - with keys
    if text.lower() == "localhost":
        return "127.0.0.1"
    try:
        ip_address(text)
    except ValueError:
        reader.refuse(
            "HOST",
            "an IP address such as 0.0.0.0, 127.0.0.1 or ::1, or localhost; other host names are "
            "not looked up, because that would hold up the server",
        )
    return text


def _listen(reader: Reader, host: str, port: int) -> str:
    text = reader.text("LISTEN")
    if not text:
        interface = host.replace(":", "\\:")
        return f"tcp:port={port}:interface={interface}"
    if not _ENDPOINT.fullmatch(text):
        reader.refuse(
            "LISTEN",
            "a Twisted endpoint description such as tcp:port=3000:interface=127.0.0.1 or "
            "unix:/run/proxy.sock",
        )
    return text


def _host_name(text: str) -> str | None:
    return text if _HOST_NAME.fullmatch(text) else None


def _cors_origins(reader: Reader, *, keyed: bool) -> tuple[str, ...]:
    accepted = "origins as scheme://host or scheme://host:port, without a path"
    accepted += ", or *" if keyed else " (and * only with API keys)"
    return reader.items(
        "CORS_ORIGINS", lambda text: text if text == "*" and keyed else _origin(text), accepted
    )


def _origin(text: str) -> str | None:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return None
    scheme, host, port = match.groups()
    # Browsers leave the default port out.
    if port is None or port == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    return text


def _claude_cli(reader: Reader, paths: Paths) -> tuple[str, ...]:
    accepted = "a program and its arguments, quoted as in a shell"
    try:
        words = shlex.split(reader.text("CLAUDE_CLI"))
    except ValueError as error:
        reader.refuse("CLAUDE_CLI", f"{accepted} ({str(error).lower()})")
        return ()
    if not words or not words[0]:
        reader.refuse("CLAUDE_CLI", accepted)
        return ()
    # A relative path is meant from here: in a workspace it would name somebody else's program.
    program = str(paths.absolute(words[0])) if "/" in words[0] else words[0]
    return (program, *words[1:])


def _model_aliases(reader: Reader) -> tuple[tuple[str, str], ...]:
    """The pairs in their order; each bad one is a mistake of its own."""
    aliases: dict[str, str] = {}
    for number, part in enumerate(reader.text("MODEL_ALIASES").split(","), 1):
        pair = part.strip()
        if not pair:
            continue
        name, _, model = (side.strip() for side in pair.partition("="))
        if why := _bad_alias(name, model, aliases):
            source = reader.source("MODEL_ALIASES")
            reader.mistakes.append(
                f"MODEL_ALIASES, pair {number}, is {shown(pair)} (from {source}): {why}. "
                "Accepted: NAME=MODEL pairs, separated by commas, such as "
                "gpt-4o=claude-code,fast=haiku; the name may be *."
            )
        aliases.setdefault(name, model)
    return tuple(aliases.items())


def _bad_alias(name: str, model: str, others: Collection[str]) -> str | None:
    """Why a pair is not accepted; None if it is."""
    if not (name == "*" or _MODEL.fullmatch(name)) or not _MODEL.fullmatch(model):
        return "it is no name of a model, '=', and the model that it means"
    if name == "claude-code":
        return "claude-code always means the CLI's default model"
    return "the name is there twice" if name in others else None


def _state_path(reader: Reader, paths: Paths, environ: Mapping[str, str]) -> Path:
    if text := reader.text("STATE_PATH"):
        return paths.absolute(text)
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return paths.absolute(given)
    state_home = environ.get("XDG_STATE_HOME", "")
    # The XDG specification wants relative paths ignored.
    if state_home.startswith("/"):
        return Path(state_home, "claude-proxy")
    if paths.home == "~":
        reader.mistakes.append("STATE_PATH is unset and there is no home directory. Set it.")
    return paths.absolute("~/.local/state/claude-proxy")

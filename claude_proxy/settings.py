"""
The settings of the server: flags, then environment, then `.env`, then defaults.

`SETTINGS` is the one table of what can be set; the flags of `twistd claude-proxy` come from it.
`load_settings` turns the three sources into a frozen `Settings`, or raises one `SettingsError`
that names every mistake.  An empty value is as unset at every level.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

# Not dotenv_values: that one logs the lines it does not understand and goes on without them.
from dotenv.parser import parse_stream

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

# The longest delay that JavaScript timers know, so that values move over unchanged.
_MAX_MS = 2_147_483_647
_MAX_KEY_FILE = 1024 * 1024
_SHOWN = 80

_SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
_NUMBER = re.compile(r"[0-9]{1,15}")
_SECRET = re.compile(r"[!-~]+")
_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_ENDPOINT = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*:.+")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Setting(NamedTuple):
    """
    One row of the table of what can be set.

    @ivar flag: without dashes in front; None for keys, because flags show in `ps`.
    @ivar default: as a person would write it; empty where it depends on other things.
    @ivar unit: `ms`, `bytes` or empty.
    @ivar help: one sentence.
    """

    variable: str
    flag: str | None
    default: str
    unit: str
    help: str


_KEY_VARIABLES = ("API_KEY", "API_KEYS", "API_KEYS_FILE")


def _row(variable: str, default: str, text: str) -> Setting:
    flag = None
    if variable not in _KEY_VARIABLES:
        # Every flag speaks of Claude; only for the program itself would "cli" say too little.
        words = variable if variable == "CLAUDE_CLI" else variable.removeprefix("CLAUDE_")
        flag = words.lower().replace("_", "-")
    units = {"MS": "ms", "BYTES": "bytes"}
    return Setting(variable, flag, default, units.get(variable.rpartition("_")[2], ""), text)


SETTINGS: tuple[Setting, ...] = (
    _row("PORT", "3000", "TCP port; 0 takes any free one."),
    _row("HOST", "", "IP address to listen on; if unset 0.0.0.0 with API keys, else 127.0.0.1."),
    _row("LISTEN", "", "Twisted endpoint description to use instead of host and port."),
    _row("CLAUDE_TOTAL_TIMEOUT_MS", "3600000", "Limit of one turn."),
    _row("CLAUDE_INACTIVITY_TIMEOUT_MS", "300000", "Longest silence of the CLI within a turn."),
    _row("PROCESS_KILL_TIMEOUT_MS", "5000", "Time between telling the CLI to end and killing it."),
    _row("MCP_CONFIG_PATH", "./mcp-config.json", "File that lists the MCP servers."),
    _row("WORKSPACE_BASE_PATH", ".", "Directory of shared_workspace/ and workspace/NAME/."),
    _row("API_KEY", "", "One key that clients may send."),
    _row("API_KEYS", "", "Several keys, separated by commas."),
    _row("API_KEYS_FILE", "", "File with one key a line, as KEY or as NAME:KEY."),
    _row("ALLOWED_HOSTS", "", "Host names, by commas, accepted besides localhost without a key."),
    _row("LOG_LEVEL", "debug", "Least important log level: error, warn, info or debug."),
    _row("NODE_ENV", "development", "production (JSON log lines), development or test."),
    _row("CLAUDE_CLI", "claude", "Claude program and arguments, split as a shell would."),
    _row("MAX_BODY_BYTES", "33554432", "Largest request body."),
    _row("QUEUE_LENGTH", "64", "How many requests may wait for one busy session."),
    _row("QUEUE_TIMEOUT_MS", "30000", "How long a request may wait for a busy session."),
    _row("CLIENT_STALL_TIMEOUT_MS", "60000", "How long a client of a turn may read nothing."),
    _row("DRAIN_TIMEOUT_MS", "5000", "How long a stopping server lets running turns finish."),
    _row("CORS_ORIGINS", "", "Web origins, by commas, that may call; * only with API keys."),
    _row("ALLOW_SKIP_PERMISSIONS", "true", "Whether a request may skip permission prompts."),
    _row("WORKSPACE_HOOKS", "false", "Whether the CLI runs hooks."),
    _row("STATE_PATH", "", "State directory; if unset the service manager's or the user's."),
)
_BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}

# No release passes any of these on to the CLI, so names that are only reserved count as well.
OWN_VARIABLES: frozenset[str] = frozenset(_BY_VARIABLE) | {
    "CHAT_ACTIVITY",
    "CHAT_TEXT_PARAMETERS",
    "LIVE_IDLE_MS",
    "LIVE_SESSIONS",
    "MAX_CONCURRENT_TURNS",
    "MODEL_ALIASES",
    "SPARE_PROCESSES",
}

# What a service manager hands to this process alone.
_SERVICE_VARIABLES = frozenset(
    {
        "CREDENTIALS_DIRECTORY",
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "NOTIFY_SOCKET",
        "STATE_DIRECTORY",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)


class SettingsError(Exception):
    """
    The settings cannot be used.

    @ivar mistakes: one sentence for each bad setting; none shows a key.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        lines = "".join(f"\n  {mistake}" for mistake in self.mistakes)
        super().__init__(f"The settings cannot be used:{lines}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that clients may send, and the name of the tenant that it stands for."""

    name: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    All settings, checked.  Durations are seconds, sizes bytes, paths absolute.

    @ivar listen: the Twisted endpoint description, from LISTEN or from HOST and PORT.
    @ivar mcp_config_named: whether the MCP file was asked for by name and so must exist.
    @ivar child_environment: what the CLI inherits: nothing of our own settings.
    @ivar public_without_keys: anybody who reaches this address may use the server; warn.
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
    queue_length: int
    queue_timeout: float
    client_stall_timeout: float
    drain_timeout: float
    cors_origins: tuple[str, ...]
    allow_skip_permissions: bool
    workspace_hooks: bool
    state_path: Path
    child_environment: Mapping[str, str] = field(repr=False, hash=False)
    public_without_keys: bool


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
    reader = _Reader(flags, environ, dotenv)
    paths = _Paths(cwd, environ)
    keys = _api_keys(reader, paths)
    # A key that is mistyped still means that keys are wanted: it must not raise more mistakes.
    keyed = any(reader.text(name) for name in _KEY_VARIABLES)
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
        queue_length=reader.number("QUEUE_LENGTH", 0, 10_000),
        queue_timeout=reader.seconds("QUEUE_TIMEOUT_MS", 0),
        client_stall_timeout=reader.seconds("CLIENT_STALL_TIMEOUT_MS", 1),
        drain_timeout=reader.seconds("DRAIN_TIMEOUT_MS", 0),
        cors_origins=_cors_origins(reader, keyed=keyed),
        allow_skip_permissions=reader.switch("ALLOW_SKIP_PERMISSIONS"),
        workspace_hooks=reader.switch("WORKSPACE_HOOKS"),
        state_path=_state_path(reader, paths, environ),
        child_environment=_child_environment(environ, dotenv),
        public_without_keys=not keyed and _is_public(listen),
    )
    if reader.mistakes:
        raise SettingsError(reader.mistakes)
    return settings


def read_dotenv(path: Path) -> dict[str, str | None]:
    """
    The variables of a `.env` file, as written; none if there is no such file.

    @raise SettingsError: it cannot be read, or a line is not KEY=VALUE.  A line that is passed
        over could be the one with the API key, and the server would be open.
    """
    try:
        # Editors on Windows put a byte order mark before the first name.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}."]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{path} cannot be read: it is not UTF-8 text."]) from error
    values: dict[str, str | None] = {}
    mistakes: list[str] = []
    for binding in parse_stream(StringIO(text)):
        if binding.error or "=" in (binding.key or "") or "\0" in binding.original.string:
            written = binding.original.string
            blank_lines = written[: len(written) - len(written.lstrip())].count("\n")
            mistakes.append(
                f"{path} line {binding.original.line + blank_lines} is not understood. "
                "Accepted: KEY=VALUE, with quotes that are closed."
            )
        elif binding.key is not None:
            values[binding.key] = binding.value
    if mistakes:
        raise SettingsError(mistakes)
    return values


class _Reader:
    """Finds the value that counts, and collects what is wrong with it."""

    def __init__(
        self,
        flags: Mapping[str, str | None],
        environ: Mapping[str, str],
        dotenv: Mapping[str, str | None],
    ) -> None:
        self._flags = flags
        self._environ = environ
        self._dotenv = dotenv
        self.mistakes: list[str] = []

    def _find(self, variable: str) -> tuple[str, str | None]:
        setting = _BY_VARIABLE[variable]
        levels = (
            (f"--{setting.flag}", self._flags.get(setting.flag) if setting.flag else None),
            ("the environment", self._environ.get(variable)),
            (".env", self._dotenv.get(variable)),
        )
        for source, value in levels:
            if value and value.strip():
                return value.strip(), source
        return setting.default, None

    def text(self, variable: str) -> str:
        return self._find(variable)[0]

    def source(self, variable: str) -> str | None:
        """Where the value comes from, None for the default."""
        return self._find(variable)[1]

    def refuse(self, variable: str, accepted: str) -> None:
        value = self.text(variable)
        shown = repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
        self.mistakes.append(
            f"{variable} is {shown} (from {self.source(variable)}). Accepted: {accepted}."
        )

    def number(self, variable: str, low: int, high: int) -> int:
        text = self.text(variable)
        if _NUMBER.fullmatch(text) and low <= int(text) <= high:
            return int(text)
        unit = _BY_VARIABLE[variable].unit
        self.refuse(variable, f"a whole number from {low} to {high} {unit}".rstrip())
        return low

    def seconds(self, variable: str, low: int) -> float:
        return self.number(variable, low, _MAX_MS) / 1000

    def choice(self, variable: str, accepted: tuple[str, ...]) -> str:
        text = self.text(variable).lower()
        if text not in accepted:
            self.refuse(variable, ", ".join(accepted))
        return text

    def switch(self, variable: str) -> bool:
        text = self.text(variable).lower()
        if text not in _SWITCH:
            self.refuse(variable, ", ".join(_SWITCH))
        return _SWITCH.get(text, False)

    def items(
        self, variable: str, check: Callable[[str], str | None], accepted: str
    ) -> tuple[str, ...]:
        """The parts between commas, each as `check` returns it; None from it is a mistake."""
        parts = [part.strip() for part in self.text(variable).lower().split(",")]
        checked = [check(part) for part in parts if part]
        if None in checked:
            self.refuse(variable, f"{accepted}, separated by commas")
        return tuple(dict.fromkeys(part for part in checked if part is not None))


class _Paths:
    """Makes paths absolute; `~` is expanded because nothing expands it in a `.env` file."""

    def __init__(self, cwd: Path, environ: Mapping[str, str]) -> None:
        self._cwd = cwd
        # Some service managers set no HOME: then the user database knows it.
        self.home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - never raises

    def absolute(self, text: str) -> Path:
        if text == "~" or text.startswith("~/"):
            text = self.home + text[1:]
        return self._cwd / text


def _api_keys(reader: _Reader, paths: _Paths) -> tuple[ApiKey, ...]:
    names: dict[str, str | None] = {}
    for variable in _KEY_VARIABLES:
        if not reader.text(variable):
            continue
        before = len(reader.mistakes)
        found = _keys_of(reader, paths, variable)
        if not found and len(reader.mistakes) == before:
            reader.mistakes.append(f"{variable} is set but holds no key. Give one, or unset it.")
        for secret, name in found:
            # The same key in two places is one key, and a name that was given to it stays.
            names[secret] = names.get(secret) or name
    return tuple(
        ApiKey(name or f"key-{hashlib.sha256(secret.encode()).hexdigest()[:12]}", secret)
        for secret, name in names.items()
    )


def _keys_of(reader: _Reader, paths: _Paths, variable: str) -> list[tuple[str, str | None]]:
    """The keys of one variable, each with its name if it has one."""
    text = reader.text(variable)
    if variable == "API_KEY":
        return _checked_keys(reader, [(variable, text)], named=False)
    if variable == "API_KEYS":
        parts = [(f"{variable}, key {n}", part) for n, part in enumerate(text.split(","), 1)]
        return _checked_keys(reader, parts, named=False)
    try:
        lines = _key_lines(paths.absolute(text))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        reader.refuse(variable, f"the path of a key file (this one cannot be read: {cause})")
        return []
    return _checked_keys(reader, [(f"{variable}, line {n}", s) for n, s in lines], named=True)


def _checked_keys(
    reader: _Reader, entries: Sequence[tuple[str, str]], *, named: bool
) -> list[tuple[str, str | None]]:
    """Check entries, each given with its place: a mistake shows the place, never the key."""
    found: list[tuple[str, str | None]] = []
    for place, entry in entries:
        has_name = named and ":" in entry
        name, secret = entry.split(":", 1) if has_name else ("", entry)
        name, secret = name.strip(), secret.strip()
        if has_name and not _KEY_NAME.fullmatch(name):
            reader.mistakes.append(
                f"{place}: the name before the colon is not accepted. Accepted: 1 to 64 of "
                "letters, digits, '_', '.', '-'."
            )
        elif _SECRET.fullmatch(secret):
            found.append((secret, name or None))
        elif entry.strip():
            reader.mistakes.append(
                f"{place}: the key is not accepted. Accepted: printable ASCII without spaces."
            )
    return found


def _key_lines(path: Path) -> list[tuple[int, str]]:
    with path.open("rb") as file:
        content = file.read(_MAX_KEY_FILE + 1)
    if len(content) > _MAX_KEY_FILE:
        raise ValueError("it is larger than 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Raised anew, without the bytes that the original would show.
        raise ValueError("it is not UTF-8 text") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _host(reader: _Reader, *, keyed: bool) -> str:
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


def _listen(reader: _Reader, host: str, port: int) -> str:
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


def _is_public(listen: str) -> bool:
    """Whether others may reach this endpoint.  What is not known to be local counts as public."""
    kind, *parts = re.split(r"(?<!\\):", listen)
    if kind == "unix":
        return False
    return not any(_is_loopback(part.removeprefix("interface=")) for part in parts)


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ip_address(address.replace("\\", "")).is_loopback
    except ValueError:
        return False


def _host_name(text: str) -> str | None:
    return text if _HOST_NAME.fullmatch(text) else None


def _cors_origins(reader: _Reader, *, keyed: bool) -> tuple[str, ...]:
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


def _claude_cli(reader: _Reader, paths: _Paths) -> tuple[str, ...]:
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


def _state_path(reader: _Reader, paths: _Paths, environ: Mapping[str, str]) -> Path:
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


def _child_environment(
    environ: Mapping[str, str], dotenv: Mapping[str, str | None]
) -> Mapping[str, str]:
    merged = {name: value for name, value in dotenv.items() if value is not None}
    # Empty is as unset here too: it does not hide what `.env` says.
    merged.update({n: value for n, value in environ.items() if value or n not in merged})
    withheld = OWN_VARIABLES | _SERVICE_VARIABLES
    return MappingProxyType({n: value for n, value in merged.items() if n not in withheld})

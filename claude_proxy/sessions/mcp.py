"""
The MCP configuration: which servers the CLI may be offered, and which a request asks for.

The file is in the CLI's own format.  It is checked here in full, because the CLI drops a faulty
entry without a word.  Environments and headers of the servers are secrets: they appear in no
repr, no error and no health report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from claude_proxy.errors import Failure, ProxyError

__all__ = [
    "MAX_TOOL",
    "PREFIX",
    "McpConfig",
    "McpConfigError",
    "McpServers",
    "load_mcp_config",
    "parse_mcp_config",
]

MAX_TOOL = 256
"""Characters that the name of a tool may have."""

PREFIX = "mcp__"
"""What it begins with."""

_MAX_FILE = 1024 * 1024
_SHOWN = 60

_SERVER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN_STEP = re.compile(r"[A-Za-z0-9_-]{1,64}")
# The CLI fills in ${NAME} from its environment, so such an address shows its scheme only there.
_URL = re.compile(r"(?:https?://[^\s/]|\$\{)\S*", re.IGNORECASE)


class McpConfigError(Exception):
    """
    The MCP configuration cannot be used.

    @ivar path: the file.
    @ivar mistakes: one sentence for each, with its place in the JSON; none shows a value.
    """

    def __init__(self, path: str, mistakes: Sequence[str]) -> None:
        self.path = path
        self.mistakes = tuple(mistakes)
        lines = "".join(f"\n  {mistake}" for mistake in self.mistakes)
        super().__init__(f"The MCP configuration {path} cannot be used:{lines}")


@dataclass(frozen=True, slots=True)
class McpConfig:
    """
    The configured MCP servers.  Its repr shows their names only.

    @ivar enabled: False when there is no configuration file.
    @ivar path: where the file is, or would be.
    @ivar servers: each server's entry by name, as it stands in the file.
    """

    enabled: bool
    path: str
    servers: Mapping[str, Mapping[str, Any]] = field(repr=False, hash=False)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        # The way in which a frozen dataclass computes a field.
        object.__setattr__(self, "servers", MappingProxyType(dict(self.servers)))
        object.__setattr__(self, "names", tuple(sorted(self.servers)))

    def servers_for(self, tools: Iterable[str]) -> tuple[str, ...]:
        """
        The servers that own these tools, sorted by name.

        @param tools: `mcp__SERVER__TOOL`, or `mcp__SERVER` or `mcp__SERVER__*` for all of one.
        @raise ProxyError: INVALID_VALUE for what is no such name or of no configured server.
        """
        return tuple(sorted({self._owner(tool) for tool in tools}))

    def subset_json(self, names: Iterable[str]) -> bytes:
        """
        A configuration of just these servers, for the CLI.  The same servers give the same bytes.

        @raise KeyError: a name is not configured.
        """
        servers = {name: self.servers[name] for name in sorted(set(names))}
        return msgspec.json.encode({"mcpServers": servers})

    def describe(self) -> dict[str, Any]:
        """What the health check shows: names and the path, no more."""
        details: dict[str, Any] = {"enabled": self.enabled, "configPath": self.path}
        if self.enabled:
            details["servers"] = list(self.names)
        return details

    def _owner(self, tool: str) -> str:
        if len(tool) > MAX_TOOL:
            raise _refusal(f"A tool name is longer than {MAX_TOOL} characters.")
        # These would end one rule and begin another on their way through the CLI.
        if any(not c.isprintable() or c.isspace() or c in ",()" for c in tool):
            raise _refusal(
                f"The tool name {_shown(tool)} has blanks, commas, parentheses or characters that "
                "cannot be printed. Name tools as mcp__SERVER__TOOL."
            )
        if not self.enabled:
            raise _refusal(
                f"MCP tools are not available: MCP is off, because the server has no configuration "
                f"file at {self.path}."
            )
        if not tool.startswith(PREFIX):
            raise _refusal(
                f"{_shown(tool)} is no MCP tool. Name tools as mcp__SERVER__TOOL. {self._offer()}"
            )
        wanted = tool.removeprefix(PREFIX)
        # A server may have "__" in its name: the longest name that fits is meant.
        for name in sorted(self.names, key=len, reverse=True):
            if wanted == name or (wanted.startswith(f"{name}__") and wanted != f"{name}__"):
                return name
        raise _refusal(f"{_shown(tool)} is a tool of no configured MCP server. {self._offer()}")

    def _offer(self) -> str:
        return f"Configured servers: {', '.join(self.names) or 'none'}."


def parse_mcp_config(text: bytes, path: str) -> McpConfig:
    """
    Check a configuration.

    @param path: where the text comes from; only shown.
    @raise McpConfigError: names every mistake with its place, `mcpServers.github.args[1]`.
    """
    try:
        content = msgspec.json.decode(text.removeprefix(b"\xef\xbb\xbf"))
    except msgspec.DecodeError as error:
        raise McpConfigError(path, [f"It is not JSON: {error}."]) from error
    except (UnicodeDecodeError, RecursionError):
        # Not chained: the first of them carries the whole text.
        raise McpConfigError(path, ["It is not JSON in UTF-8, or nested too deeply."]) from None
    mistakes = list(_mistakes_of_file(content))
    if mistakes:
        raise McpConfigError(path, mistakes)
    return McpConfig(enabled=True, path=path, servers=content["mcpServers"])


def load_mcp_config(path: Path, named: bool) -> McpConfig:
    """
    Read and check the configuration file.  Blocks.

    @param named: somebody asked for this file; else a missing one means that MCP is off.
    @raise McpConfigError: it cannot be read, is larger than 1 MiB, or has mistakes.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE + 1)
    except FileNotFoundError as error:
        if not named:
            return McpConfig(enabled=False, path=str(path), servers={})
        reason = "There is no such file. Create it, or unset MCP_CONFIG_PATH to go without MCP."
        raise McpConfigError(str(path), [reason]) from error
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise McpConfigError(str(path), [f"It cannot be read: {cause}."]) from error
    if len(text) > _MAX_FILE:
        raise McpConfigError(str(path), ["It is larger than 1 MiB."])
    return parse_mcp_config(text, str(path))


def _mistakes_of_file(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield "It must be a JSON object."
    elif "mcpServers" not in content:
        yield 'It must have "mcpServers", an object with one entry for each server.'
    elif not isinstance(content["mcpServers"], dict):
        yield "mcpServers must be an object with one entry for each server."
    else:
        for name, entry in content["mcpServers"].items():
            yield from _mistakes_of_server(name, entry)


def _mistakes_of_server(name: str, entry: Any) -> Iterator[str]:
    place = _step("mcpServers", name)
    if not _SERVER_NAME.fullmatch(name):
        yield f"{place}: a server name is made of letters, digits, '_' and '-'"
    if not isinstance(entry, dict):
        yield f"{place} must be an object"
        return
    kind = entry.get("type", "stdio")
    if kind == "stdio" and "command" not in entry and "url" in entry:
        yield f'{place}.type must be "http" or "sse" for a server with a url'
    elif kind == "stdio":
        yield from _mistakes_of_program(place, entry)
    elif kind in ("http", "sse"):
        yield from _mistakes_of_address(place, entry)
    elif kind == "sdk":
        yield f'{place}.type "sdk" is a server inside another program and cannot be used here'
    else:
        yield f'{place}.type must be "stdio", "http" or "sse"'


def _mistakes_of_program(place: str, entry: Mapping[str, Any]) -> Iterator[str]:
    command = entry.get("command")
    if not isinstance(command, str) or not command.strip():
        yield f"{place}.command must be a string that is not empty"
    args = entry.get("args", [])
    if isinstance(args, list):
        for index, argument in enumerate(args):
            if not isinstance(argument, str):
                yield f"{place}.args[{index}] must be a string"
    else:
        yield f"{place}.args must be an array of strings"
    yield from _mistakes_of_texts(f"{place}.env", entry.get("env", {}))


def _mistakes_of_address(place: str, entry: Mapping[str, Any]) -> Iterator[str]:
    url = entry.get("url")
    if not isinstance(url, str) or not _URL.fullmatch(url):
        yield f"{place}.url must be an http:// or https:// address"
    yield from _mistakes_of_texts(f"{place}.headers", entry.get("headers", {}))


def _mistakes_of_texts(place: str, texts: Any) -> Iterator[str]:
    if not isinstance(texts, dict):
        yield f"{place} must be an object of strings"
        return
    for name, value in texts.items():
        if not isinstance(value, str):
            yield f"{_step(place, name)} must be a string"


def _step(place: str, name: str) -> str:
    """One step further down, in quotes where the name would not read as one."""
    return f"{place}.{name}" if _PLAIN_STEP.fullmatch(name) else f"{place}[{_shown(name)}]"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _refusal(message: str) -> ProxyError:
    return ProxyError(Failure.INVALID_VALUE, message, param="mcp-allowed-tools")


class McpServers:
    """
    The configuration in force.

    @ivar config: read it anew for each request: a reload replaces it.
    @ivar generation: counts the reloads, so that it is known what an older process was given.
    """

    def __init__(self, path: Path, *, named: bool) -> None:
        """
        Blocks.

        @raise McpConfigError: the file cannot be used.
        """
        self._path = path
        self._named = named
        self.generation = 1
        self.config = load_mcp_config(path, named)

    def reload(self) -> None:
        """
        Read the file again.  Blocks.

        @raise McpConfigError: it cannot be used; the configuration in force stays.
        """
        self.config = load_mcp_config(self._path, self._named)
        self.generation += 1

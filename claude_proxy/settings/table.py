"""
The one table of what can be set.

The flags of ``twistd claude-proxy``, the checks and the documentation come from it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BY_VARIABLE", "KEY_VARIABLES", "OWN_VARIABLES", "SETTINGS", "Setting"]


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


KEY_VARIABLES = ("API_KEY", "API_KEYS", "API_KEYS_FILE")


def _row(variable: str, default: str, text: str) -> Setting:
    flag = None
    if variable not in KEY_VARIABLES:
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
    _row("MAX_BODIES_BYTES", "268435456", "All larger bodies together whose answers are not sent."),
    _row("MAX_CONNECTIONS", "512", "Connections at once; those that ask nothing make room first."),
    _row("MAX_CONCURRENT_TURNS", "16", "How many turns may run at once; more wait."),
    _row("QUEUE_LENGTH", "64", "How many requests may wait, for a session or for capacity."),
    _row("QUEUE_TIMEOUT_MS", "30000", "How long a request may wait, for both together."),
    _row("CLIENT_STALL_TIMEOUT_MS", "60000", "How long a client of a turn may read nothing."),
    _row("LIVE_SESSIONS", "4", "Idle agent processes that are kept for their session; 0 for none."),
    _row("LIVE_IDLE_MS", "300000", "How long each of them is kept."),
    _row("SPARE_PROCESSES", "1", "Agent processes started ahead of need; 0 for none."),
    _row("DRAIN_TIMEOUT_MS", "5000", "How long a stopping server lets running turns finish."),
    _row("CORS_ORIGINS", "", "Web origins, by commas, that may call; * only with API keys."),
    _row("ALLOW_SKIP_PERMISSIONS", "true", "Whether a request may skip permission prompts."),
    _row("WORKSPACE_HOOKS", "false", "Whether hooks run, and .claude of a workspace counts."),
    _row("MODEL_ALIASES", "", "NAME=MODEL pairs, by commas; *=MODEL takes every other name."),
    _row("CHAT_ACTIVITY", "reasoning", "Where a chat shows activity: reasoning, content or none."),
    _row("CHAT_TEXT_PARAMETERS", "all", "What a chat's text may set: all, safe or none."),
    _row("STATE_PATH", "", "State directory; if unset the service manager's or the user's."),
)
BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}
OWN_VARIABLES: frozenset[str] = frozenset(BY_VARIABLE)

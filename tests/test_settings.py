"""Settings: precedence, checks, and what the CLI inherits."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.endpoints import serverFromString

from claude_proxy import settings as settings_module
from claude_proxy.settings import (
    OWN_VARIABLES,
    SETTINGS,
    ApiKey,
    Settings,
    SettingsError,
    load_settings,
    read_dotenv,
)

CWD = Path("/srv/proxy")
EXAMPLE = Path(__file__).parent.parent / ".env.example"
NO_KEY_FLAGS = {"API_KEY", "API_KEYS", "API_KEYS_FILE"}


def load(
    environ: Mapping[str, str] | None = None,
    *,
    flags: Mapping[str, str | None] | None = None,
    dotenv: Mapping[str, str | None] | None = None,
    cwd: Path = CWD,
) -> Settings:
    return load_settings(flags or {}, {"HOME": "/home/me", **(environ or {})}, dotenv or {}, cwd)


def mistakes(
    environ: Mapping[str, str] | None = None,
    *,
    flags: Mapping[str, str | None] | None = None,
    dotenv: Mapping[str, str | None] | None = None,
    cwd: Path = CWD,
) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(environ, flags=flags, dotenv=dotenv, cwd=cwd)
    return caught.value.mistakes


def key_name(secret: str) -> str:
    return "key-" + hashlib.sha256(secret.encode()).hexdigest()[:12]


def test_nothing_set_gives_the_defaults() -> None:
    assert load() == Settings(
        host="127.0.0.1",
        port=3000,
        listen="tcp:port=3000:interface=127.0.0.1",
        total_timeout=3600.0,
        inactivity_timeout=300.0,
        kill_timeout=5.0,
        mcp_config_path=CWD / "mcp-config.json",
        mcp_config_named=False,
        workspace_base=CWD,
        keys=(),
        allowed_hosts=(),
        log_level="debug",
        production=False,
        claude_cli=("claude",),
        max_body_bytes=33554432,
        max_bodies_bytes=268435456,
        max_connections=512,
        max_concurrent_turns=16,
        queue_length=64,
        queue_timeout=30.0,
        client_stall_timeout=60.0,
        live_sessions=4,
        live_idle=300.0,
        spare_processes=1,
        drain_timeout=5.0,
        cors_origins=(),
        allow_skip_permissions=True,
        workspace_hooks=False,
        model_aliases=(),
        chat_activity="reasoning",
        chat_text_parameters="all",
        state_path=Path("/home/me/.local/state/claude-proxy"),
        child_environment={"HOME": "/home/me"},
    )


def test_a_flag_wins_over_the_environment_and_that_over_dotenv() -> None:
    flags, environ, dotenv = {"port": "1"}, {"PORT": "2"}, {"PORT": "3"}
    assert load(environ, flags=flags, dotenv=dotenv).port == 1
    assert load(environ, dotenv=dotenv).port == 2
    assert load(dotenv=dotenv).port == 3
    assert load().port == 3000


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_value_is_as_unset_at_every_level(empty: str) -> None:
    assert load({"PORT": "2"}, flags={"port": empty}).port == 2
    assert load({"PORT": empty}, dotenv={"PORT": "3"}).port == 3
    assert load(dotenv={"PORT": empty}).port == 3000


def test_a_value_that_is_none_is_as_unset() -> None:
    assert load(flags={"port": None}, dotenv={"PORT": None}).port == 3000


def test_blanks_around_a_value_do_not_count() -> None:
    assert load({"PORT": " 8080 "}).port == 8080


def test_the_table_names_each_setting_and_flag_once() -> None:
    assert len({row.variable for row in SETTINGS}) == len(SETTINGS) == 33
    flags = [row.flag for row in SETTINGS if row.flag]
    assert len(set(flags)) == len(flags) == 30
    assert {row.variable for row in SETTINGS if row.flag is None} == NO_KEY_FLAGS


@pytest.mark.parametrize(
    ("variable", "flag", "unit"),
    [
        ("CLAUDE_TOTAL_TIMEOUT_MS", "total-timeout-ms", "ms"),
        ("CLAUDE_CLI", "claude-cli", ""),
        ("PROCESS_KILL_TIMEOUT_MS", "process-kill-timeout-ms", "ms"),
        ("MAX_BODY_BYTES", "max-body-bytes", "bytes"),
        ("NODE_ENV", "node-env", ""),
    ],
)
def test_flags_follow_from_the_variables(variable: str, flag: str, unit: str) -> None:
    (row,) = (row for row in SETTINGS if row.variable == variable)
    assert (row.flag, row.unit) == (flag, unit)
    assert row.help.endswith(".")


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.default], ids=lambda r: r.variable)
def test_every_default_in_the_table_is_accepted_when_given(row: settings_module.Setting) -> None:
    given_, unset = load({row.variable: row.default}), load()
    names = set(Settings.__slots__) - {"mcp_config_named"}
    assert {n: getattr(given_, n) for n in names} == {n: getattr(unset, n) for n in names}


@pytest.mark.parametrize("row", SETTINGS, ids=lambda r: r.variable)
def test_every_row_of_the_table_has_an_effect(row: settings_module.Setting, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("sk-file\n")
    other = {
        "HOST": "127.0.0.2",
        "LISTEN": "unix:/run/x.sock",
        "MCP_CONFIG_PATH": "other.json",
        "WORKSPACE_BASE_PATH": "elsewhere",
        "API_KEY": "sk-one",
        "API_KEYS": "sk-one,sk-two",
        "API_KEYS_FILE": str(key_file),
        "ALLOWED_HOSTS": "proxy.example",
        "LOG_LEVEL": "error",
        "NODE_ENV": "production",
        "CLAUDE_CLI": "other",
        "CORS_ORIGINS": "https://a.example",
        "ALLOW_SKIP_PERMISSIONS": "no",
        "WORKSPACE_HOOKS": "yes",
        "STATE_PATH": "state",
        "MODEL_ALIASES": "fast=haiku",
        "CHAT_ACTIVITY": "content",
        "CHAT_TEXT_PARAMETERS": "safe",
    }.get(row.variable, "2048")
    changed = load({row.variable: other})
    assert changed != load()
    assert load(dotenv={row.variable: other}) == changed
    if row.flag:
        assert load(flags={row.flag: other}) == changed


def test_timeouts_become_seconds() -> None:
    settings = load({"CLAUDE_TOTAL_TIMEOUT_MS": "1500", "DRAIN_TIMEOUT_MS": "0"})
    assert settings.total_timeout == 1.5
    assert settings.drain_timeout == 0.0


NUMBERS = [
    ("PORT", 0, 65535),
    ("CLAUDE_TOTAL_TIMEOUT_MS", 1, 2_147_483_647),
    ("CLAUDE_INACTIVITY_TIMEOUT_MS", 1, 2_147_483_647),
    ("CLIENT_STALL_TIMEOUT_MS", 1, 2_147_483_647),
    ("PROCESS_KILL_TIMEOUT_MS", 0, 2_147_483_647),
    ("LIVE_IDLE_MS", 1, 2_147_483_647),
    ("QUEUE_TIMEOUT_MS", 0, 2_147_483_647),
    ("DRAIN_TIMEOUT_MS", 0, 2_147_483_647),
    ("MAX_BODY_BYTES", 1024, 1024**3),
    ("MAX_BODIES_BYTES", 1024, 1024**4),
    ("MAX_CONNECTIONS", 1, 1_000_000),
    ("MAX_CONCURRENT_TURNS", 1, 10_000),
    ("QUEUE_LENGTH", 0, 10_000),
    ("LIVE_SESSIONS", 0, 10_000),
    ("SPARE_PROCESSES", 0, 10_000),
]


@pytest.mark.parametrize(("variable", "low", "high"), NUMBERS)
def test_numbers_are_accepted_up_to_their_bounds(variable: str, low: int, high: int) -> None:
    assert load({variable: str(low)}) != load({variable: str(high)})
    for beyond in (low - 1, high + 1):
        (mistake,) = mistakes({variable: str(beyond)})
        assert mistake.startswith(f"{variable} is '{beyond}' (from the environment).")
        assert f"from {low} to {high}" in mistake


@pytest.mark.parametrize("text", ["abc", "1.5", "-1", "+5", "1_000", "0x10", "٣٠٠٠", "9" * 5000])
def test_what_is_no_whole_number_is_a_mistake(text: str) -> None:
    (mistake,) = mistakes({"PORT": text})
    assert mistake.endswith("Accepted: a whole number from 0 to 65535.")
    assert len(mistake) < 200


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        ({"flags": {"port": "x"}}, "--port"),
        ({"environ": {"PORT": "x"}}, "the environment"),
        ({"dotenv": {"PORT": "x"}}, ".env"),
    ],
)
def test_a_mistake_says_where_the_value_comes_from(
    sources: dict[str, dict[str, str]], where: str
) -> None:
    (mistake,) = mistakes(
        sources.get("environ"), flags=sources.get("flags"), dotenv=sources.get("dotenv")
    )
    assert f"PORT is 'x' (from {where})." in mistake


def test_all_mistakes_are_reported_in_one_message() -> None:
    bad = {
        "PORT": "99999",
        "HOST": "example.com",
        "LISTEN": "3000",
        "CLAUDE_TOTAL_TIMEOUT_MS": "0",
        "API_KEY": "has space",
        "API_KEYS_FILE": "/nonexistent/keys",
        "ALLOWED_HOSTS": "https://x",
        "LOG_LEVEL": "loud",
        "NODE_ENV": "staging",
        "CLAUDE_CLI": "claude 'open",
        "MAX_BODY_BYTES": "1",
        "MAX_CONCURRENT_TURNS": "0",
        "QUEUE_LENGTH": "many",
        "LIVE_SESSIONS": "some",
        "LIVE_IDLE_MS": "5 minutes",
        "SPARE_PROCESSES": "-1",
        "CORS_ORIGINS": "nonsense",
        "ALLOW_SKIP_PERMISSIONS": "maybe",
        "WORKSPACE_HOOKS": "2",
        "MODEL_ALIASES": "gpt-4o",
        "CHAT_ACTIVITY": "somewhere",
        "CHAT_TEXT_PARAMETERS": "some",
    }
    with pytest.raises(SettingsError) as caught:
        load(bad)
    message = str(caught.value)
    assert len(caught.value.mistakes) == len(bad)
    for variable, value in bad.items():
        assert variable in message
        assert variable == "API_KEY" or repr(value) in message or f'"{value}"' in message
    assert "has space" not in message


@pytest.mark.parametrize(
    ("environ", "host", "listen"),
    [
        ({"HOST": "localhost"}, "127.0.0.1", "tcp:port=3000:interface=127.0.0.1"),
        ({"HOST": "LOCALHOST"}, "127.0.0.1", "tcp:port=3000:interface=127.0.0.1"),
        ({"HOST": "::1", "PORT": "0"}, "::1", r"tcp:port=0:interface=\:\:1"),
        ({"API_KEY": "k"}, "0.0.0.0", "tcp:port=3000:interface=0.0.0.0"),
        (
            {"API_KEY": "k", "HOST": "10.0.0.1"},
            "10.0.0.1",
            "tcp:port=3000:interface=10.0.0.1",
        ),
        ({"LISTEN": "unix:/run/x.sock"}, "127.0.0.1", "unix:/run/x.sock"),
    ],
)
def test_host_and_port_make_the_endpoint(environ: dict[str, str], host: str, listen: str) -> None:
    settings = load(environ)
    assert (settings.host, settings.listen) == (host, listen)


@pytest.mark.parametrize("host", ["127.0.0.1", "::", "fe80::1%eth0", "::1"])
def test_twisted_understands_the_endpoint(host: str) -> None:
    listen = load({"HOST": host, "PORT": "8123"}).listen
    endpoint = serverFromString(object(), listen)
    assert vars(endpoint)["_interface"] == host
    assert vars(endpoint)["_port"] == 8123


def test_a_host_name_is_a_mistake_that_says_why() -> None:
    (mistake,) = mistakes({"HOST": "proxy.example.com"})
    assert "HOST is 'proxy.example.com'" in mistake
    assert "not looked up" in mistake


@pytest.mark.parametrize("text", ["3000", "127.0.0.1:3000", "tcp", "tcp:", ":3000"])
def test_what_is_no_endpoint_description_is_a_mistake(text: str) -> None:
    (mistake,) = mistakes({"LISTEN": text})
    assert mistake.startswith(f"LISTEN is '{text}'")


def test_paths_are_absolute_and_tilde_is_the_home() -> None:
    settings = load(
        {"MCP_CONFIG_PATH": "conf/mcp.json", "WORKSPACE_BASE_PATH": "~/projects", "STATE_PATH": "~"}
    )
    assert settings.mcp_config_path == CWD / "conf/mcp.json"
    assert settings.mcp_config_named
    assert settings.workspace_base == Path("/home/me/projects")
    assert settings.state_path == Path("/home/me")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_PATH": "state"}, "/srv/proxy/state"),
        ({"STATE_PATH": "/s", "STATE_DIRECTORY": "/d", "XDG_STATE_HOME": "/x"}, "/s"),
        ({"STATE_DIRECTORY": "/d", "XDG_STATE_HOME": "/x"}, "/d"),
        ({"STATE_DIRECTORY": "/d:/e"}, "/d"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/x"}, "/x/claude-proxy"),
        ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/claude-proxy"),
    ],
)
def test_the_state_directory_is_found(environ: dict[str, str], expected: str) -> None:
    assert load(environ).state_path == Path(expected)


def test_without_home_the_user_database_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    home = pwd.getpwuid(os.getuid()).pw_dir
    state = load_settings({}, {}, {}, CWD).state_path
    assert state == Path(home, ".local/state/claude-proxy")


def test_no_home_at_all_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(SettingsError, match="STATE_PATH"):
        load_settings({}, {}, {}, CWD)
    assert load_settings({}, {}, {"STATE_PATH": "/s"}, CWD).state_path == Path("/s")


def test_keys_of_all_three_settings_count(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# ours\r\n\r\n  alice : sk-alice \nalice:sk-alice-2\nsk-bare\n")
    settings = load(
        {"API_KEY": "sk,one", "API_KEYS": " sk-two , sk-three,,", "API_KEYS_FILE": "keys"},
        cwd=tmp_path,
    )
    assert settings.keys == (
        ApiKey(key_name("sk,one"), "sk,one"),
        ApiKey(key_name("sk-two"), "sk-two"),
        ApiKey(key_name("sk-three"), "sk-three"),
        ApiKey("alice", "sk-alice"),
        ApiKey("alice", "sk-alice-2"),
        ApiKey(key_name("sk-bare"), "sk-bare"),
    )


def test_a_key_twice_is_one_key_and_keeps_its_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("bob:sk-1\nsk-1\ncarol:sk-1\n")
    settings = load({"API_KEY": "sk-1", "API_KEYS": "sk-1", "API_KEYS_FILE": str(file)})
    assert settings.keys == (ApiKey("bob", "sk-1"),)


def test_a_colon_outside_the_file_belongs_to_the_key() -> None:
    assert [key.secret for key in load({"API_KEYS": "a:b"}).keys] == ["a:b"]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("sk-geheim with space", "API_KEYS_FILE, line 2"),
        ("sk-geheim\N{EN DASH}", "API_KEYS_FILE, line 2"),
        ("sk-geheim\x07", "API_KEYS_FILE, line 2"),
        ("bad name:sk-geheim", "API_KEYS_FILE, line 2"),
        (f"{'n' * 65}:sk-geheim", "API_KEYS_FILE, line 2"),
        (":sk-geheim", "API_KEYS_FILE, line 2"),
        ("sk-geheim:", "API_KEYS_FILE, line 2"),
    ],
)
def test_a_bad_line_of_the_key_file_is_named_but_not_shown(
    line: str, place: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"sk-good\n{line}\n", encoding="utf-8")
    (mistake,) = mistakes({"API_KEYS_FILE": str(file)})
    assert mistake.startswith(place)
    assert "geheim" not in mistake


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"API_KEY": "sk geheim"}, "API_KEY:"),
        ({"API_KEYS": "sk-good,sk geheim"}, "API_KEYS, key 2:"),
    ],
)
def test_a_bad_key_is_named_but_not_shown(environ: dict[str, str], place: str) -> None:
    (mistake,) = mistakes(environ)
    assert mistake.startswith(place)
    assert "geheim" not in mistake


def test_key_settings_without_a_key_do_not_open_the_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    found = mistakes({"API_KEYS": " , ", "API_KEYS_FILE": str(file)})
    assert [mistake.split()[0] for mistake in found] == ["API_KEYS", "API_KEYS_FILE"]
    assert all("holds no key" in mistake for mistake in found)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"\xff\xfe", "UTF-8"), (b"k" * (1024 * 1024 + 1), "1 MiB"), (None, "No such file")],
)
def test_a_key_file_that_cannot_be_read_is_a_mistake(
    content: bytes | None, cause: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    (mistake,) = mistakes({"API_KEYS_FILE": str(file)})
    assert mistake.startswith(f"API_KEYS_FILE is '{file}'")
    assert cause in mistake


def test_no_secret_is_in_a_repr() -> None:
    settings = load({"API_KEY": "sk-geheim", "ANTHROPIC_API_KEY": "sk-ant-geheim"})
    assert "geheim" not in repr(settings)
    assert "geheim" not in repr(settings.keys[0])
    assert key_name("sk-geheim") in repr(settings)


def test_allowed_hosts_are_lowercase_and_distinct() -> None:
    assert load({"ALLOWED_HOSTS": "A.example, b_c,a.example,"}).allowed_hosts == (
        "a.example",
        "b_c",
    )


@pytest.mark.parametrize("text", ["https://a", "a:80", "*", "a b", "a,b/c"])
def test_what_is_no_host_name_is_a_mistake(text: str) -> None:
    (mistake,) = mistakes({"ALLOWED_HOSTS": text})
    assert mistake.startswith(f"ALLOWED_HOSTS is '{text}'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTPS://Chat.Example", ("https://chat.example",)),
        ("http://localhost:8080, http://[::1]:3", ("http://localhost:8080", "http://[::1]:3")),
        ("https://a:443,http://a:80,http://a:443", ("https://a", "http://a", "http://a:443")),
        ("chrome-extension://abc", ("chrome-extension://abc",)),
    ],
)
def test_origins_are_normalised(text: str, expected: tuple[str, ...]) -> None:
    assert load({"CORS_ORIGINS": text}).cors_origins == expected


@pytest.mark.parametrize("text", ["a.example", "https://a/", "https://a/b", "https://", "null"])
def test_what_is_no_origin_is_a_mistake(text: str) -> None:
    (mistake,) = mistakes({"CORS_ORIGINS": text})
    assert mistake.startswith(f"CORS_ORIGINS is '{text}'")


def test_every_origin_is_accepted_only_with_keys() -> None:
    assert load({"CORS_ORIGINS": "*", "API_KEY": "k"}).cors_origins == ("*",)
    (mistake,) = mistakes({"CORS_ORIGINS": "*"})
    assert "only with API keys" in mistake


def test_a_bad_key_brings_no_mistake_about_origins_with_it() -> None:
    assert len(mistakes({"CORS_ORIGINS": "*", "API_KEY": "a b"})) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", True),
        ("1", True),
        ("Yes", True),
        ("ON", True),
        ("False", False),
        ("0", False),
        ("no", False),
        ("off", False),
    ],
)
def test_switches_take_the_usual_words(text: str, expected: bool) -> None:
    settings = load({"WORKSPACE_HOOKS": text, "ALLOW_SKIP_PERMISSIONS": text})
    assert settings.workspace_hooks is expected
    assert settings.allow_skip_permissions is expected


def test_choices_ignore_case() -> None:
    settings = load({"LOG_LEVEL": "WARN", "NODE_ENV": "Production"})
    assert settings.log_level == "warn"
    assert settings.production


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("claude", ("claude",)),
        ("/opt/my\\ claude -x 'a b'", ("/opt/my claude", "-x", "a b")),
        ("~/.claude/local/claude", ("/home/me/.claude/local/claude",)),
        ("bin/claude bin/x", ("/srv/proxy/bin/claude", "bin/x")),
    ],
)
def test_the_program_is_split_as_a_shell_would(text: str, expected: tuple[str, ...]) -> None:
    assert load({"CLAUDE_CLI": text}).claude_cli == expected


@pytest.mark.parametrize("text", ["claude 'open", "''", '"" x', "claude \\"])
def test_what_is_no_program_is_a_mistake(text: str) -> None:
    (mistake,) = mistakes({"CLAUDE_CLI": text})
    assert mistake.startswith("CLAUDE_CLI is ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "gpt-4o=claude-code,fast=haiku",
            (("gpt-4o", "claude-code"), ("fast", "haiku")),
        ),
        (" Fast = sonnet[1m] ,, *=claude-code,", (("Fast", "sonnet[1m]"), ("*", "claude-code"))),
        ("fast=haiku,Fast=opus", (("fast", "haiku"), ("Fast", "opus"))),
        (
            "anthropic/claude-sonnet-5=claude-sonnet-5,claude-old=us.anthropic.x-v1:0@2025",
            (
                ("anthropic/claude-sonnet-5", "claude-sonnet-5"),
                ("claude-old", "us.anthropic.x-v1:0@2025"),
            ),
        ),
        (",", ()),
    ],
)
def test_model_aliases_keep_their_order_and_capitals(
    text: str, expected: tuple[tuple[str, str], ...]
) -> None:
    assert load({"MODEL_ALIASES": text}).model_aliases == expected


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        ("gpt-4o", "no name of a model"),
        ("=haiku", "no name of a model"),
        ("fast=", "no name of a model"),
        ("fast=*", "no name of a model"),
        ("fast=haiku=opus", "no name of a model"),
        ("my model=haiku", "no name of a model"),
        ("--x=haiku", "no name of a model"),
        ("fast=--x", "no name of a model"),
        ("gpt-*=haiku", "no name of a model"),
        ("x" * 257 + "=haiku", "no name of a model"),
        ("claude-code=opus", "always means the CLI's default"),
        ("ok=opus", "twice"),
        ("ok=haiku", "twice"),
    ],
)
def test_a_bad_alias_is_named_with_its_place(pair: str, why: str) -> None:
    (mistake,) = mistakes({"MODEL_ALIASES": f"ok=haiku,{pair},good=opus"})
    shown = repr(pair if len(pair) <= 80 else pair[:80] + "...")
    assert mistake.startswith(f"MODEL_ALIASES, pair 2, is {shown} (from the environment): ")
    assert why in mistake
    assert "gpt-4o=claude-code,fast=haiku" in mistake


def test_every_bad_alias_is_named() -> None:
    found = mistakes(dotenv={"MODEL_ALIASES": "a,b=opus,c=,*=x,*=y"})
    assert [mistake.split(",")[1] for mistake in found] == [" pair 1", " pair 3", " pair 5"]
    assert all("(from .env)" in mistake for mistake in found)


def test_what_chats_may_do_is_a_choice() -> None:
    settings = load({"CHAT_ACTIVITY": "NONE", "CHAT_TEXT_PARAMETERS": "Safe"})
    assert (settings.chat_activity, settings.chat_text_parameters) == ("none", "safe")
    found = mistakes({"CHAT_ACTIVITY": "all", "CHAT_TEXT_PARAMETERS": "reasoning"})
    assert [mistake.partition("Accepted: ")[2] for mistake in found] == [
        "reasoning, content, none.",
        "all, safe, none.",
    ]


def test_the_child_inherits_everything_but_our_own() -> None:
    own = {row.variable: row.default for row in SETTINGS if row.default}
    service = dict.fromkeys(
        [
            "NOTIFY_SOCKET",
            "LISTEN_FDS",
            "LISTEN_PID",
            "LISTEN_FDNAMES",
            "CREDENTIALS_DIRECTORY",
            "STATE_DIRECTORY",
        ],
        "/x",
    )
    settings = load(
        own
        | {"PATH": "/bin", "ANTHROPIC_MODEL": "", "BOTH": "environment", "PORT": "1"}
        | service
        | {"API_KEY": "k"},
        dotenv={
            "ANTHROPIC_API_KEY": "a",
            "ANTHROPIC_MODEL": "m",
            "BOTH": ".env",
            "EMPTY": "",
            "NONE": None,
            "API_KEYS": "k2",
            "LISTEN_FDS": "1",
        },
    )
    assert settings.child_environment == {
        "HOME": "/home/me",
        "PATH": "/bin",
        "ANTHROPIC_API_KEY": "a",
        "ANTHROPIC_MODEL": "m",
        "BOTH": "environment",
        "EMPTY": "",
    }


def test_the_names_of_all_settings_are_our_own_and_no_others() -> None:
    assert {row.variable for row in SETTINGS} == OWN_VARIABLES


def test_what_is_kept_between_turns_can_be_switched_off() -> None:
    settings = load({"LIVE_SESSIONS": "0", "SPARE_PROCESSES": "0", "LIVE_IDLE_MS": "1500"})
    assert (settings.live_sessions, settings.spare_processes, settings.live_idle) == (0, 0, 1.5)


def test_settings_cannot_be_changed() -> None:
    settings = load()
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]  # that it is refused is the point
    with pytest.raises(TypeError):
        settings.child_environment["X"] = "y"  # type: ignore[index]  # the same
    assert hash(settings) == hash(load())


def test_a_dotenv_file_is_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(
        b"\xef\xbb\xbf# a comment\r\nPORT=1\r\nexport A=\"x y\"\nB='${A}' # why\nC\nD=\n"
    )
    assert read_dotenv(file) == {"PORT": "1", "A": "x y", "B": "${A}", "C": None, "D": ""}


def test_a_missing_dotenv_file_is_empty(tmp_path: Path) -> None:
    assert read_dotenv(tmp_path / ".env") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"A=1\nAPI_KEY: sk-geheim\n", "line 2"),
        (b'A=1\n\n\nB="geheim\n', "line 4"),
        (b"'A=B'=geheim\n", "line 1"),
        (b"A=1\nB=geheim\0\n", "line 2"),
        (b"A=geheim\xff\n", "UTF-8"),
    ],
)
def test_a_dotenv_line_that_would_be_lost_is_a_mistake(
    content: bytes, said: str, tmp_path: Path
) -> None:
    file = tmp_path / ".env"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_dotenv(file)
    assert f"{file} " in str(caught.value)
    assert said in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_dotenv_directory_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=os.strerror(errno.EISDIR)):
        read_dotenv(tmp_path)


def test_the_example_file_is_all_comments_and_shows_every_setting() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert all(not line or line.startswith("#") for line in text.splitlines())
    shown = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert set(shown) == {row.variable for row in SETTINGS} | {"ANTHROPIC_API_KEY"}
    for row in SETTINGS:
        assert shown[row.variable] == row.default or not row.default


def test_the_examples_in_the_example_file_are_accepted(tmp_path: Path) -> None:
    text = re.sub(r"^# ([A-Z_]+=)", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    file = tmp_path / ".env"
    file.write_text(text.replace("/etc/claude-proxy/keys", str(tmp_path / "keys")))
    (tmp_path / "keys").write_text("alice:sk-file\n")
    values = read_dotenv(file)
    settings = load(dotenv=values)
    assert len(settings.keys) == 4
    assert settings.child_environment == {
        "HOME": "/home/me",
        "ANTHROPIC_API_KEY": "sk-ant-change-me",
    }
    assert values == dotenv_values(stream=StringIO(file.read_text()), interpolate=False)


@given(
    values=st.dictionaries(
        st.sampled_from([row.variable for row in SETTINGS if row.variable != "API_KEYS_FILE"]),
        st.text() | st.text("0123456789:/.,*[]tcp=\\'\"~ "),
    )
)
def test_any_text_is_accepted_or_a_named_mistake(values: dict[str, str]) -> None:
    try:
        settings = load(dotenv=values)
    except SettingsError as error:
        for mistake in error.mistakes:
            assert mistake.split()[0].rstrip(":,") in values
    else:
        assert settings.workspace_base.is_absolute()
        assert not settings.child_environment.keys() & values.keys()

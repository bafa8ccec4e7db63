"""
What an agent with a shell can reach: all that the user can who runs the server.

No test here shows what anybody wants.  They show what docs/security.md says that the server does
not prevent, so that nobody believes it does.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.claude_cli import Claude
from tests.e2e.daemon import API_KEY, Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Server, StartServer
from tests.e2e.test_tools import bash, texts_of

KEYS = {"one": "sk-proxy-one-0123456789", "two": "sk-proxy-two-0123456789"}


@pytest.fixture(scope="module")
def shared(
    claude: Claude, messages_api: MessagesApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with two tenants; the first has a session of its own in a workspace of its own."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "cwd").mkdir()
    (folder / "cwd" / ".env").write_text("THEIR_PASSWORD=in-dotenv-file\n")
    (folder / "keys").write_text(f"two:{KEYS['two']}\n")
    keys = {"API_KEY": KEYS["one"], "API_KEYS_FILE": str(folder / "keys")}
    # The switch is for skipping permissions; the tenants allow themselves a shell.
    env = {**keys, "ALLOW_SKIP_PERMISSIONS": "false"}
    with Daemon(folder, claude, messages_api.url, env=env) as daemon:
        server = Server(daemon, claude)
        server.key = KEYS["one"]
        server.ask("[[text What the first tenant was told.]]", workspace="first")
        (daemon.base / "workspace" / "first" / "notes").write_text("What the first tenant wrote.")
        server.key = KEYS["two"]
        yield server


def environ_of_server(server: Server) -> str:
    return f"cat /proc/{server.daemon.pid}/environ"


REACHED: dict[str, tuple[Callable[[Server], str], str]] = {
    "the environment of its CLI": (lambda _: "cat /proc/$PPID/environ", API_KEY),
    "the environment of the server": (environ_of_server, KEYS["one"]),
    "the file of keys": (lambda server: f"cat {server.daemon.folder}/keys", KEYS["two"]),
    ".env": (lambda server: f"cat {server.daemon.cwd}/.env", "in-dotenv-file"),
    "another tenant's workspace": (
        lambda server: f"cat {server.daemon.base}/workspace/first/notes",
        "What the first tenant wrote.",
    ),
    "another tenant's transcripts": (
        lambda server: f"cat {server.daemon.folder}/config/projects/*first/*.jsonl",
        "What the first tenant was told.",
    ),
    "the state directory": (
        lambda server: f"head -c 15 {server.daemon.state}/state.sqlite3",
        "SQLite format 3",
    ),
}


@pytest.fixture(scope="module")
def told(shared: Server) -> str:
    """What the second tenant learns in one turn with a shell."""
    commands = [reach(shared) for reach, _ in REACHED.values()]
    joined = "; ".join(f"{{ {command}; }} 2>/dev/null | tr '\\0' '\\n'" for command in commands)
    [seen] = texts_of(shared.ask(bash(joined), allowed_tools=["Bash"], workspace="second"))
    return seen


@pytest.mark.parametrize("what", REACHED)
def test_a_shell_reaches_what_the_user_of_the_server_can(told: str, what: str) -> None:
    assert REACHED[what][1] in told


def test_a_path_in_a_prompt_is_read_without_a_permission(
    shared: Server, messages_api: MessagesApi
) -> None:
    notes = shared.daemon.base / "workspace" / "first" / "notes"
    shared.ask(f"See @{notes} [[text over]]", workspace="third")
    bodies = [json.dumps(request.body) for request in messages_api.requests]
    [*_, last] = [body for body in bodies if "workspace/third" in body]
    assert "What the first tenant wrote." in last


@pytest.mark.parametrize("keyed", [False, True])
def test_an_agent_can_ask_a_server_without_keys_for_another_turn(
    claude_new: Claude, start_server: StartServer, *, keyed: bool
) -> None:
    server = start_server(claude_new, {"API_KEY": KEYS["one"]} if keyed else {})
    server.key = KEYS["one"]
    made = Path(server.daemon.folder) / "made"
    # The body lies in a file: this tests what the server lets through, not quoting.
    more = server.daemon.folder / "more.json"
    more.write_text(
        json.dumps({"prompt": bash(f"touch {made}"), "allowed-tools": ["Bash"], "stream": False})
    )
    url = shlex.quote(f"{server.daemon.url}/api/claude")
    command = f"curl -s -H Content-Type:application/json -d @{more} {url}"
    answer = server.ask(bash(command), allowed_tools=["Bash(curl:*)"])
    assert answer.status == 200
    assert made.exists() is not keyed

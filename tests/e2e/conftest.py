"""What the end-to-end tests share.  Nothing here is ever skipped: what is missing fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.claude_cli import NEW, OLD, Claude, install_claude, install_everything_server
from tests.e2e.daemon import Daemon
from tests.e2e.messages_api import MessagesApi
from tests.e2e.server import Server, StartServer

_HERE = Path(__file__).parent


_CLIENTS = {
    "test_ai_sdk",
    "test_chat_frames",
    "test_conversations",
    "test_langchain",
    "test_openai_node",
    "test_openai_python",
    "test_outcomes",
    "test_python_conversations",
    "test_reach",
    "test_untrusted_workspaces",
}
"""Modules about clients and whom to trust: half of all, which CI runs beside the other half."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.path.stem in _CLIENTS:
                item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def messages_api() -> Iterator[MessagesApi]:
    """The scripted Messages API, one for all tests."""
    with MessagesApi() as api:
        yield api


@pytest.fixture(scope="session")
def claude_new() -> Claude:
    """The newer CLI."""
    return install_claude(NEW)


@pytest.fixture(scope="session")
def claude_old() -> Claude:
    """The oldest CLI."""
    return install_claude(OLD)


@pytest.fixture(scope="session", params=[NEW, OLD])
def claude(request: pytest.FixtureRequest) -> Claude:
    """Both CLIs, one after the other."""
    return install_claude(str(request.param))


@pytest.fixture(scope="session")
def everything_server() -> list[str]:
    """The argument vector of a real MCP server on stdio."""
    return install_everything_server()


@pytest.fixture
def start_server(messages_api: MessagesApi, tmp_path: Path) -> Iterator[StartServer]:
    """
    Start a daemon for one test: the CLI, the environment added, and the name of its folder.

    A second daemon with the same name has the state and the workspaces of the first.
    """
    with ExitStack() as stack:

        def start(
            claude: Claude, env: Mapping[str, str | None] | None = None, name: str = "daemon"
        ) -> Server:
            daemon = Daemon(tmp_path / name, claude, messages_api.url, env=env)
            return Server(stack.enter_context(daemon), claude)

        yield start


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest,
    messages_api: MessagesApi,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Claude], Server]]:
    """
    One daemon for each CLI, started when it is first wanted.

    It has no settings but those in the module's `ENVIRONMENT`, if there is one.
    """
    environment = getattr(request.module, "ENVIRONMENT", None)
    with ExitStack() as stack:
        started: dict[str, Server] = {}

        def get(claude: Claude) -> Server:
            if claude.version not in started:
                folder = tmp_path_factory.mktemp("daemon")
                daemon = stack.enter_context(
                    Daemon(folder, claude, messages_api.url, env=environment)
                )
                started[claude.version] = Server(daemon, claude)
            return started[claude.version]

        yield get


@pytest.fixture
def server(servers: Callable[[Claude], Server], claude: Claude) -> Server:
    """The module's daemon, with each CLI in turn."""
    return servers(claude)


@pytest.fixture
def new_server(servers: Callable[[Claude], Server], claude_new: Claude) -> Server:
    """The module's daemon with the newer CLI."""
    return servers(claude_new)


@pytest.fixture
def old_server(servers: Callable[[Claude], Server], claude_old: Claude) -> Server:
    """The module's daemon with the oldest CLI."""
    return servers(claude_old)

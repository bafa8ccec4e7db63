"""What the end-to-end tests share.  Nothing here is ever skipped: what is missing fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.claude_cli import NEW, OLD, Claude, install_claude, install_everything_server
from tests.e2e.messages_api import MessagesApi

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


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

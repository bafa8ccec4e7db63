"""What the tests with a browser share.  Nothing here is ever skipped: what is missing fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium
from tests.browser.pages import Pages

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """Pages that a real browser opens, one browser for all tests."""
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser, Pages(browser) as opened:
        yield opened

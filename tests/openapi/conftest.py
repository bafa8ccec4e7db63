"""How much Schemathesis is to try."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cases=5000` tries so many requests; without it the time is what is limited."""
    parser.addoption("--cases", type=int, default=0, help="how many requests to try at least")

"""The document is one of OpenAPI 3.1, by the judgement of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from claude_proxy.web import openapi


def _judge(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openapi_spec_validator", "--schema", "3.1", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.openapi
@pytest.mark.parametrize("keys", [True, False])
def test_the_document_is_valid(tmp_path: Path, *, keys: bool) -> None:
    file = tmp_path / "openapi.json"
    file.write_bytes(openapi.encoded(keys=keys))
    done = _judge(file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.openapi
def test_a_document_that_is_not_is_found_out(tmp_path: Path) -> None:
    file = tmp_path / "openapi.json"
    file.write_bytes(openapi.encoded(keys=True).replace(b'"responses":', b'"answers":', 1))
    assert _judge(file).returncode != 0

"""Reading what the server tells Prometheus."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families

from claude_proxy.sessions.context import RunContext
from claude_proxy.web.api import Api
from claude_proxy.web.metrics import Metrics, RouteNames

__all__ = ["figures_in", "make_metrics", "promtool"]


def make_metrics(**changed: Any) -> Metrics:
    """
    The figures of a server on which nothing happens.

    @param changed: parts of its context, by their names, that shall be other than that.
    """
    parts = {
        "waiting_room": SimpleNamespace(length=100),
        "capacity": SimpleNamespace(running=0, turns=16, waiting=0),
        "leases": SimpleNamespace(waiting=0),
        "pace": SimpleNamespace(waiting=0),
        "pool": SimpleNamespace(waiting=0),
        "spares": SimpleNamespace(waiting=0),
        **changed,
    }
    return Metrics(RouteNames(Api.app.url_map), cast(RunContext, SimpleNamespace(**parts)))


def figures_in(text: bytes) -> dict[str, float]:
    """Each sample by its name and its labels, as ``name{a="b",c="d"}`` in alphabetical order."""
    figures = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{sample.labels[key]}"' for key in sorted(sample.labels))
            figures[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return figures


def promtool(*arguments: str, given: bytes = b"") -> str:
    """
    What Prometheus's own tool has to say.

    @raise AssertionError: it finds fault, or is not there.
    """
    program = shutil.which("promtool")
    assert program, "promtool is missing: install Debian's package prometheus."
    done = subprocess.run(
        [program, *arguments], input=given, capture_output=True, timeout=30, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said

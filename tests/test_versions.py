"""Which version of the CLI can do what."""

from __future__ import annotations

import pytest

from claude_proxy.cli.versions import Capabilities, capabilities_of, parse_version

FLAGS = (
    "control",
    "partial_messages",
    "replay",
    "session_id",
    "fork",
    "strict_mcp",
    "settings",
    "effort",
    "live",
    "late_prompts",
    "rule_commas",
    "transcripts",
    "blocks",
    "drops_blank_text",
)
OLDER: set[str] = set()
OLD = {"transcripts"}
MIDDLE = set(FLAGS) - {"effort", "live", "late_prompts", "drops_blank_text"}
NEW = set(FLAGS)


def flags_of(can: Capabilities) -> set[str]:
    return {flag for flag in FLAGS if getattr(can, flag)}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.1.197 (Claude Code)\n", (2, 1, 197)),
        ("1.0.24", (1, 0, 24)),
        ("  \n2.1.330-beta.1", (2, 1, 330)),
        ("0.0.0", (0, 0, 0)),
        ("999999.999999.999999", (999999, 999999, 999999)),
        ("", None),
        ("2.1", None),
        ("v2.1.197", None),
        ("-1.0.0", None),
        ("1.0.x", None),
        ("1234567.0.0", None),
        ("Claude Code 2.1.197", None),
        ("9" * 10_000, None),
    ],
)
def test_a_version_is_read_from_the_start_of_the_text(
    text: str, version: tuple[int, int, int] | None
) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("text", "version", "flags"),
    [
        ("0.9.99", "0.9.99", OLDER),
        ("1.0.23 (Claude Code)", "1.0.23", OLDER),
        ("1.0.24 (Claude Code)", "1.0.24", OLD),
        ("1.0.127 (Claude Code)", "1.0.127", OLD),
        ("1.0.128 (Claude Code)", "1.0.128", MIDDLE),
        ("1.1.0", "1.1.0", MIDDLE),
        ("2.0.999", "2.0.999", MIDDLE),
        ("2.1.9", "2.1.9", MIDDLE),
        ("2.1.196", "2.1.196", MIDDLE),
        ("2.1.197 (Claude Code)", "2.1.197", NEW),
        ("2.1.1000", "2.1.1000", NEW),
        ("2.2.0", "2.2.0", NEW),
        ("10.0.0", "10.0.0", NEW),
        ("", "unknown", NEW),
        ("who knows", "unknown", NEW),
    ],
)
def test_a_version_has_what_the_tried_version_below_it_has(
    text: str, version: str, flags: set[str]
) -> None:
    can = capabilities_of(text)
    assert can.version == version
    assert flags_of(can) == flags


@pytest.mark.parametrize(
    ("text", "added"), [("1.0.24", set()), ("1.0.128", set()), ("2.1.197", {"auto", "dontAsk"})]
)
def test_permission_modes_are_those_of_the_version(text: str, added: set[str]) -> None:
    modes = capabilities_of(text).permission_modes
    assert set(modes) == {"acceptEdits", "bypassPermissions", "default", "plan"} | added
    assert list(modes) == sorted(modes)


@pytest.mark.parametrize(
    ("text", "limit"), [("1.0.18", 255), ("1.0.24", 255), ("1.0.128", 255), ("2.1.197", 200)]
)
def test_only_newer_versions_shorten_the_names_of_their_folders(text: str, limit: int) -> None:
    assert capabilities_of(text).folder_limit == limit

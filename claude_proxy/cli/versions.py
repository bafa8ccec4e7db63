"""
What each version of the CLI can do.

One table, by the versions that were tried.  A version between two rows is treated as the row below
it; a version that cannot be read is treated as the newest row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["PERMISSION_MODES", "Capabilities", "capabilities_of", "parse_version"]

_MODES = ("acceptEdits", "bypassPermissions", "default", "plan")

PERMISSION_MODES = ("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "plan")
"""All that any version knows."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """
    What may be sent to a CLI.

    @ivar version: as printed, for example ``2.1.197``; ``unknown`` if it could not be read.
    @ivar control: it takes control requests on stdin; without, a control line ends it.
    @ivar partial_messages: ``--include-partial-messages``.
    @ivar replay: ``--replay-user-messages``.
    @ivar session_id: ``--session-id``, and ``--resume`` keeps the id.  Without, every process
        makes an id of its own, also when it resumes.
    @ivar fork: ``--fork-session``.
    @ivar strict_mcp: ``--strict-mcp-config``.
    @ivar settings: ``--settings`` (there are hooks that it can switch off).
    @ivar setting_sources: ``--setting-sources``, and directories of ``--add-dir`` may have a
        CLAUDE.md: so the settings of a workspace can be left out, and its CLAUDE.md kept.
    @ivar effort: ``--effort``.
    @ivar live: a process can serve several turns: what belongs to a turn can be set, and taken
        back, by control requests (``apply_flag_settings``).
    @ivar late_prompts: system prompts and the JSON schema in ``initialize`` instead of argv.
    @ivar rule_commas: a comma inside the parentheses of a tool rule does not end the rule.
    @ivar transcripts: it resumes a transcript that was written for it.
    @ivar blocks: a message on stdin may have several content blocks, and images.  Without, a
        message is one text.
    @ivar drops_blank_text: text blocks of nothing but whitespace do not reach the model.
    @ivar folder_limit: longest name of a folder of transcripts that it does not shorten.
    @ivar output_limit: most output tokens that it may be limited to; the oldest pass on whatever
        they are told, also what no model can do.
    @ivar permission_modes: the names that ``--permission-mode`` takes.
    """

    version: str
    control: bool = False
    partial_messages: bool = False
    replay: bool = False
    session_id: bool = False
    fork: bool = False
    strict_mcp: bool = False
    settings: bool = False
    setting_sources: bool = False
    effort: bool = False
    live: bool = False
    late_prompts: bool = False
    rule_commas: bool = False
    transcripts: bool = False
    blocks: bool = False
    drops_blank_text: bool = False
    folder_limit: int = 255
    output_limit: int = 32_000
    permission_modes: tuple[str, ...] = _MODES


# Older than any that was tried: its transcripts may look different.
_OLDER = Capabilities(version="older")
_V1_0_24 = replace(_OLDER, version="1.0.24", transcripts=True)
_V1_0_128 = replace(
    _V1_0_24,
    version="1.0.128",
    control=True,
    partial_messages=True,
    replay=True,
    session_id=True,
    fork=True,
    strict_mcp=True,
    settings=True,
    rule_commas=True,
    blocks=True,
)
_V2_1_197 = replace(
    _V1_0_128,
    version="2.1.197",
    setting_sources=True,
    effort=True,
    live=True,
    late_prompts=True,
    drops_blank_text=True,
    folder_limit=200,
    output_limit=128_000,
    permission_modes=PERMISSION_MODES,
)
_ROWS = (
    ((2, 1, 197), _V2_1_197),
    ((1, 0, 128), _V1_0_128),
    ((1, 0, 24), _V1_0_24),
    ((0, 0, 0), _OLDER),
)

_VERSION = re.compile(r"\s*(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


def parse_version(text: str) -> tuple[int, int, int] | None:
    """Read the number from the output of ``claude --version``, or return None."""
    match = _VERSION.match(text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def capabilities_of(version_text: str) -> Capabilities:
    """Look up what the CLI that printed this text for ``--version`` can do."""
    version = parse_version(version_text)
    if version is None:
        return replace(_V2_1_197, version="unknown")
    row = next(row for least, row in _ROWS if version >= least)
    return replace(row, version=".".join(map(str, version)))

"""What the CLI reads at its start: where it lies, and when it counts as changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from claude_proxy.sessions.freshness import ENTRY_LIMIT, Sources, paths_read, stamp

TODAY = date(2026, 1, 2)


class Place:
    """A home with a configuration directory, and a workspace."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.config = self.home / ".claude"
        self.base = folder / "base"
        self.workspace = self.base / "workspace" / "project"
        self.workspace.mkdir(parents=True)
        self.config.mkdir(parents=True)

    def write(self, name: str, text: str = "x") -> Path:
        path = self.base.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def stamp(self, today: date = TODAY) -> bytes | None:
        return stamp(paths_read(self.workspace, self.config, self.home), today)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


READ = [
    "base/workspace/project/CLAUDE.md",
    "base/workspace/project/CLAUDE.local.md",
    "base/workspace/project/.mcp.json",
    "base/workspace/project/.claude/settings.json",
    "base/workspace/project/.claude/skills/deep/SKILL.md",
    "base/workspace/project/.claude/what/comes/later.md",
    "base/workspace/CLAUDE.md",
    "base/CLAUDE.local.md",
    "base/.claude/CLAUDE.md",
    "base/.claude/commands/do.md",
    "home/.claude/CLAUDE.md",
    "home/.claude/settings.json",
    "home/.claude/agents/helper.md",
    "home/.claude/skills/one/SKILL.md",
]
NOT_READ = [
    "base/workspace/project/src/main.py",
    "base/workspace/project/src/CLAUDE.md",
    "base/workspace/other/CLAUDE.md",
    "base/workspace/project/.claude/worktrees/x/CLAUDE.md",
    "base/workspace/project/.claude/skills/one/node_modules/x/index.js",
    "home/.claude/projects/-base/session.jsonl",
    "home/.claude/history.jsonl",
    "home/.claude.json",
]


def grow(path: Path) -> None:
    path.write_text("longer")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def swap(path: Path) -> None:
    """Put another of the same size and time in its place."""
    before = path.stat()
    other = path.with_name("other")
    other.write_text("y" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("change", [grow, touch, swap, Path.unlink])
def test_what_is_read_counts_when_it_comes_changes_and_goes(
    place: Place, name: str, change: Callable[[Path], None]
) -> None:
    without = place.stamp()
    path = place.write(name)
    written = place.stamp()
    assert None not in (without, written)
    assert written != without
    assert place.stamp() == written
    change(path)
    assert place.stamp() != written


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_does_not_count(place: Place, name: str) -> None:
    # Folders are names, and names count: they are there before.
    place.write("base/workspace/project/.claude/skills/one/SKILL.md")
    place.write("base/workspace/project/.claude/skills/one/node_modules/y.js")
    place.write("base/workspace/project/.claude/worktrees/y/README.md")
    before = place.stamp()
    path = place.write(name)
    assert place.stamp() == before
    grow(path)
    assert place.stamp() == before


def test_another_day_is_another_state(place: Place) -> None:
    assert place.stamp() != place.stamp(date(2026, 1, 3))


def test_a_workspace_that_is_the_home_does_not_change_with_every_turn(place: Place) -> None:
    place.workspace = place.home
    before = place.stamp()
    place.write("home/.claude/projects/-home/session.jsonl")
    assert place.stamp() == before
    place.write("home/.claude/settings.json")
    assert place.stamp() != before


def test_a_relative_configuration_directory_counts_from_the_workspace() -> None:
    sources = paths_read(Path("/w/project"), Path("conf"), Path("/root"))
    assert Path("/w/project/conf/settings.json") in sources.files
    assert Path("/w/project/conf/skills") in sources.folders


def test_nothing_is_looked_at_twice(place: Place) -> None:
    sources = paths_read(place.home / "a" / "b", place.config, place.home)
    for paths in (sources.files, sources.folders):
        assert len(set(paths)) == len(paths)


def test_too_much_to_look_at_is_no_state_at_all(place: Place) -> None:
    folder = place.workspace / ".claude" / "rules"
    folder.mkdir(parents=True)
    for number in range(ENTRY_LIMIT - 1):
        (folder / f"{number}.md").touch()
    own = Sources((), (place.workspace / ".claude",), place.workspace)
    assert stamp(own, TODAY) is not None
    (folder / "one_more.md").touch()
    assert stamp(own, TODAY) is None


def test_links_that_lead_in_a_circle_end(place: Place) -> None:
    folder = place.workspace / ".claude" / "skills"
    folder.mkdir(parents=True)
    (folder / "again").symlink_to(folder)
    (folder / "nowhere").symlink_to("missing")
    (folder / "itself").symlink_to("itself")
    before = place.stamp()
    assert before is not None
    (folder / "SKILL.md").touch()
    assert place.stamp() not in (None, before)


def test_what_a_link_leads_to_counts(place: Place) -> None:
    target = place.write("elsewhere/CLAUDE.md")
    (place.workspace / "CLAUDE.md").symlink_to(target)
    before = place.stamp()
    grow(target)
    assert place.stamp() != before


def test_a_file_in_the_place_of_a_folder_is_no_error(place: Place) -> None:
    before = place.stamp()
    place.write("base/workspace/project/.claude")
    assert place.stamp() not in (None, before)


def test_no_file_is_opened(place: Place) -> None:
    os.mkfifo(place.workspace / "CLAUDE.md")  # to open it would block for ever
    assert place.stamp() is not None


# Repositories.

REPOSITORY = [".git/HEAD", ".git/index", ".git/logs/HEAD", ".git/refs/heads/main", "src/main.py"]


@pytest.mark.parametrize("name", REPOSITORY)
@pytest.mark.parametrize("root", ["base/workspace/project", "base"])
def test_in_a_repository_what_git_tells_counts(place: Place, root: str, name: str) -> None:
    place.write(f"{root}/.git/HEAD")
    before = place.stamp()
    path = place.write(f"{root}/{name}", "other")
    written = place.stamp()
    assert written not in (None, before)
    grow(path)
    assert place.stamp() != written


def test_what_git_keeps_for_itself_does_not_count(place: Place) -> None:
    place.write("base/.git/HEAD")
    before = place.stamp()
    place.write("base/.git/objects/ab/cdef")
    assert before is not None
    assert place.stamp() == before


def test_a_large_repository_is_too_much(place: Place) -> None:
    place.write("base/.git/HEAD")
    for number in range(ENTRY_LIMIT):
        (place.base / str(number)).touch()
    assert place.stamp() is None


def test_what_is_installed_in_a_repository_is_no_part_of_it(place: Place) -> None:
    place.write("base/.git/HEAD")
    place.write("base/.venv/pyvenv.cfg")
    for folder in (".venv", "node_modules", "__pycache__"):
        for number in range(ENTRY_LIMIT):
            place.write(f"base/{folder}/{number}")
    before = place.stamp()
    assert before is not None
    place.write("base/.venv/one_more")
    assert place.stamp() == before


def test_links_in_a_repository_are_not_followed(place: Place) -> None:
    place.write("base/.git/HEAD")
    target = place.write("elsewhere/file")
    (place.workspace / "link").symlink_to(target.parent)
    before = place.stamp()
    grow(target)
    assert before is not None
    assert place.stamp() == before


def test_a_repository_that_lies_elsewhere_is_not_known(place: Place) -> None:
    place.write("base/workspace/project/.git", "gitdir: /elsewhere")
    assert place.stamp() is None

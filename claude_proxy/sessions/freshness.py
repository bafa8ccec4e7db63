"""
What the CLI reads once, at its start, and whether it has changed since.

A process that was started ahead of need knows the instructions and settings of that moment, and
nothing that came later reaches it.  Names, sizes and times of the files tell whether a new process
would know the same; no file is opened.  What they refer to in turn, such as a file that a CLAUDE.md
imports from elsewhere, is not looked at.

In a git repository the CLI also tells its model the branch, the last commits, and what `git status`
says: there every file of the repository counts.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path

__all__ = ["ENTRY_LIMIT", "Sources", "paths_read", "stamp"]

ENTRY_LIMIT = 2000
"""How many files and folders are looked at; where there are more, nothing is known."""

_DEPTH_LIMIT = 5
"""How deep in a folder: the CLI's own files lie higher, and links may lead in a circle."""

_INSTRUCTIONS = ("CLAUDE.md", "CLAUDE.local.md", ".mcp.json", ".claude/CLAUDE.md")
_SETTINGS = ("settings.json", "settings.local.json", "CLAUDE.md")
_EXTENSIONS = ("agents", "commands", "output-styles", "rules", "skills")
_LEFT_OUT = frozenset({".git", "__pycache__", "node_modules", "worktrees"})
_VIRTUALENV = "pyvenv.cfg"
"""What marks a folder that nobody keeps in a repository, and that has thousands of files."""

_GIT_FILES = ("HEAD", "config", "index", "info/exclude", "logs/HEAD", "packed-refs")
_MANAGED = (Path("/etc/claude-code"), Path("/Library/Application Support/ClaudeCode"))


@dataclass(frozen=True, slots=True)
class Sources:
    """
    Where the CLI looks when it starts.

    @ivar files: each of them may be missing.
    @ivar folders: looked at with all that is in them; they may be missing, too.
    @ivar workspace: may be in a git repository.
    """

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    workspace: Path


def paths_read(workspace: Path, config_directory: Path, home: Path) -> Sources:
    """
    Say what the CLI reads when it starts in a workspace.

    The folder where it keeps its sessions changes with every turn, so only parts of that one count,
    even where it is the `.claude` of the workspace itself.

    @param workspace: absolute.
    @param config_directory: the user's own; a relative one counts from the workspace, as it does
        for the CLI.
    @param home: its `.claude` is taken for such a folder, too.
    """
    config = workspace / config_directory
    files = [place / name for place in (workspace, *workspace.parents) for name in _INSTRUCTIONS]
    files += [config / name for name in _SETTINGS]
    folders = [config / name for name in _EXTENSIONS]
    for parent in workspace.parents:
        folders += [parent / ".claude" / name for name in _EXTENSIONS]
    own = workspace / ".claude"
    if own in (config, home / ".claude"):
        files += [own / name for name in _SETTINGS]
        folders += [own / name for name in _EXTENSIONS]
    else:
        folders.append(own)
    folders += _MANAGED
    return Sources(tuple(dict.fromkeys(files)), tuple(dict.fromkeys(folders)), workspace)


def stamp(sources: Sources, today: date) -> bytes | None:
    """
    What tells the present state of these files from any other.  Blocks.

    @param today: part of it, because the CLI tells its model the date of its start.
    @return: None if there is too much to look at, or if the repository lies elsewhere.  What cannot
        be read for other reasons is taken for what it is now: the CLI cannot read it either.
    """
    root = _repository(sources.workspace)
    if root is not None and not (root / ".git").is_dir():
        return None
    digest = hashlib.blake2b(today.isoformat().encode(), digest_size=16)
    for number, path in enumerate(_places(sources, root)):
        if number >= ENTRY_LIMIT:
            return None
        digest.update(_described(path))
    return digest.digest()


def _repository(workspace: Path) -> Path | None:
    places = (workspace, *workspace.parents)
    return next((place for place in places if os.path.lexists(place / ".git")), None)


def _places(sources: Sources, root: Path | None) -> Iterator[str]:
    yield from map(os.fspath, sources.files)
    for folder in sources.folders:
        yield from _walk(os.fspath(folder), _DEPTH_LIMIT, follow=True)
    if root is not None:
        yield from (os.fspath(root / ".git" / name) for name in _GIT_FILES)
        yield from _walk(os.fspath(root / ".git" / "refs"), ENTRY_LIMIT, follow=False)
        yield from _walk(os.fspath(root), ENTRY_LIMIT, follow=False)


def _walk(folder: str, depth: int, *, follow: bool) -> Iterator[str]:
    """
    All that is in a folder, in an order that stays.

    @param follow: links to folders, too.
    """
    waiting = [(folder, depth)]
    while waiting:
        place, left = waiting.pop()
        try:
            with os.scandir(place) as scan:
                # One more than may be looked at is enough to know that it is too much.
                entries = sorted(islice(scan, ENTRY_LIMIT + 1), key=lambda entry: entry.name)
        except OSError:
            if os.path.lexists(place):
                yield place  # it cannot be read, or is no folder
            continue
        if any(entry.name == _VIRTUALENV for entry in entries):
            continue
        for entry in entries:
            yield entry.path
            if left > 1 and entry.name not in _LEFT_OUT and _is_folder(entry, follow=follow):
                waiting.append((entry.path, left - 1))


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False


def _described(path: str) -> bytes:
    """One file's line in the stamp; a folder has only its name there, as its files speak for it."""
    name = os.fsencode(path)
    try:
        found = Path(path).stat()
    except OSError as error:
        return b"%s\0%d\n" % (name, -(error.errno or 0))
    if stat.S_ISDIR(found.st_mode):
        return b"%s\0/\n" % name
    facts = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    return b"%s\0%s\n" % (name, repr(facts).encode())

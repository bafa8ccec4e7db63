"""
Programs and libraries from npm, inside this checkout.

Each lot gets a folder of its own under `.cache`, never a global install.  A folder appears under
its final name only when what is in it has been found to work, so that an interrupted install is
never used; a file lock makes test runs that start together wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["installed", "program", "run"]

_CACHE = Path(__file__).resolve().parents[2] / ".cache"
_INSTALL_SECONDS = 600
_ANSWER_SECONDS = 60


def installed(place: str, packages: list[str], finish: Callable[[Path], None]) -> Path:
    """
    The folder that holds the `node_modules` with these packages, installed if they are not there.

    @param place: the folder's name below `.cache`, such as C{claude-cli/2.1.197}; another version
        needs another name.
    @param packages: as for `npm install`, each with its version.
    @param finish: does what is left to do in the fresh folder, and raises if it does not work.
    @raise RuntimeError: npm or node is missing, or the install failed.
    """
    program("node")  # which runs what is installed, even when nothing is to be installed any more
    folder = _CACHE / place
    with _lock(folder.parent):
        if not folder.is_dir():
            for leftover in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(leftover)
            fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            # Its own package.json keeps npm from looking for one further up.
            (fresh / "package.json").write_text('{"private": true}\n', encoding="utf-8")
            npm = [program("npm"), "install", "--ignore-scripts", "--save-exact"]
            quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
            run([*npm, *quiet, *packages], fresh, _INSTALL_SECONDS)
            finish(fresh)
            fresh.chmod(0o755)
            fresh.rename(folder)
    return folder


def program(name: str) -> str:
    """
    The path of a program that must be there.

    @raise RuntimeError: it is not on PATH.
    """
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"The end-to-end tests need {name!r} on PATH. Install Node.js with npm.")
    return found


def run(argv: list[str], folder: Path, seconds: int = _ANSWER_SECONDS) -> str:
    """
    Run a program in this folder to its end and return what it wrote to stdout.

    @param seconds: how long it may take.
    @raise RuntimeError: it failed; says what it wrote to stderr.
    """
    # The home folder is a fresh one, because the CLI writes its configuration at every start,
    # but npm must find the user's registry and cache.
    home = {} if Path(argv[0]).name == "npm" else {"HOME": str(folder), "DISABLE_AUTOUPDATER": "1"}
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, **home},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
    return done.stdout


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

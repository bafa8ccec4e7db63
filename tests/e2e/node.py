"""The programs in `clients`: real Node.js libraries, driven from here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from tests.e2e import npm

__all__ = ["AI_SDK", "OPENAI_NODE", "NodeProgram"]

OPENAI_NODE = ("openai@6.49.0", "zod@4.6.7")
AI_SDK = ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.91", "zod@4.6.7")

_PROGRAMS = Path(__file__).parent / "clients"
_ANSWER_SECONDS = 60
_END_SECONDS = 10

Answer = dict[str, Any]


class NodeProgram:
    """
    One running program.

    A context manager: inside, it takes commands.

    @param folder: a fresh folder for it.
    @param name: the program's file in `clients`.
    @param packages: what it imports; the first one's version names the installed lot.
    @raise RuntimeError: npm or node is missing, or the install failed.
    """

    def __init__(self, folder: Path, name: str, packages: tuple[str, ...]) -> None:
        home = npm.installed(
            f"node-clients/{packages[0]}",
            list(packages),
            lambda fresh: _imports_work(fresh, packages),
        )
        # Node looks for packages beside the program and further up, nowhere else.
        (folder / "node_modules").symlink_to(home / "node_modules")
        for program in _PROGRAMS.glob("*.mjs"):
            shutil.copy(program, folder)
        self._folder = folder
        self._argv = [npm.program("node"), name]
        self._asked: list[Future[Answer]] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv,
            cwd=self._folder,
            env={"PATH": os.environ["PATH"], "HOME": str(self._folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # a request of a test that failed is still open
            self._process.wait()
        self._reader.join()

    def start(self, do: str, **command: Any) -> Future[Answer]:
        """Give a command and wait for nothing; the future is what comes of it."""
        assert self._process.stdin is not None
        answer: Future[Answer] = Future()
        line = json.dumps({"id": len(self._asked), "do": do, **command})
        self._asked.append(answer)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return answer

    def ask(self, do: str, **command: Any) -> Answer:
        """
        Give a command and wait for what comes of it, be it an C{error}.

        @raise TimeoutError: nothing came within a minute.
        @raise RuntimeError: the program ended.
        """
        return self.start(do, **command).result(_ANSWER_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                answer: Answer = json.loads(line)
                self._asked[answer.pop("id")].set_result(answer)
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(RuntimeError("The program ended; see its stderr."))


def _imports_work(folder: Path, packages: tuple[str, ...]) -> None:
    names = [package.rpartition("@")[0] for package in packages]
    code = "".join(f"await import({json.dumps(name)});" for name in names)
    npm.run([npm.program("node"), "--input-type=module", "--eval", code], folder)

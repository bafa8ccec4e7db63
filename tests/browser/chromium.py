"""
A headless Chromium that opens pages, and nothing else: its pages act by themselves and report.

Every name but those that the tests make up leads nowhere, so that nothing leaves this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote

import httpx

__all__ = ["NAMES", "Chromium"]

NAMES = ("evil.test", "chat.test")
"""Host names that lead to this machine in the browser."""

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_START_SECONDS = 60.0
_TICK_SECONDS = 0.02


class Chromium:
    """
    A browser with a profile of its own; a context manager.

    @param folder: for its profile and all else that it writes.
    @raise AssertionError: there is none, or it does not start within a minute.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._profile = folder / "profile"
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(trust_env=False, timeout=30)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv(),
            env={"PATH": os.environ["PATH"], "HOME": str(self._folder), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "stderr").open("wb"),
        )
        try:
            self._client.base_url = httpx.URL(f"http://127.0.0.1:{self._port()}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def open(self, url: str) -> str:
        """Open a page in a tab of its own and return the tab's id."""
        answer = self._client.put(f"/json/new?{quote(url, safe=':/')}")
        return str(answer.raise_for_status().json()["id"])

    def close(self, tab: str) -> None:
        """Close a tab."""
        self._client.get(f"/json/close/{tab}").raise_for_status()

    def _argv(self) -> list[str]:
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        assert program, "Chromium is missing; on Debian: apt-get install chromium"
        here = ", ".join(f"MAP {name} 127.0.0.1" for name in NAMES)
        return [
            program,
            "--headless=new",
            # Its sandbox does not work for root, and in many containers not at all.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            "--no-proxy-server",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            # Its own protection of this machine must not be what lets a test pass.
            "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
            f"--host-resolver-rules={here}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
            f"--user-data-dir={self._profile}",
            "--remote-debugging-port=0",
            "about:blank",
        ]

    def _port(self) -> int:
        assert self._process is not None
        file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            if lines:
                return int(lines[0])
            time.sleep(_TICK_SECONDS)
        said = (self._folder / "stderr").read_text(errors="replace")
        raise AssertionError(f"Chromium did not start: {said[-2000:]}")

    def _end(self) -> None:
        self._client.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

"""
Nothing that the tests keep secret may stand in a log, whichever test it is.

`SECRETS` learns by itself what is secret: the keys and credentials with which servers are started,
those that clients send, what MCP servers are told, and what people say in prompts.  `OUTPUT` sees
all log records of the tests' own process, a `Transcript` all that a daemon prints; each is searched
at the end of a test, or of the daemon.  tests/conftest.py puts `OUTPUT` to work.

Of what is written on purpose, `PUBLIC` says why.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from twisted.logger import globalLogPublisher

from claude_proxy.settings.table import KEY_VARIABLES
from claude_proxy.web.logs import make_observer

__all__ = ["OUTPUT", "PUBLIC", "SECRETS", "Output", "Secrets", "Transcript"]

PUBLIC: Mapping[str, str] = {}
"""Texts that look like secrets and may be shown, each with the reason."""

_SHORTEST_KEY = 8  # as in the log itself: shorter ones would be found everywhere
_SHORTEST_PROMPT = 12  # in characters, and of two words: others are found everywhere, too
_BEGINNING = 40  # of a longer text: what is cut off is no less secret
_KEPT = 1000

_SENSITIVE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_SPOKEN = ("prompt", "system-prompt", "append-system-prompt", "content", "text")


class Secrets:
    """What is secret, and what it is."""

    def __init__(self, public: Mapping[str, str] = PUBLIC) -> None:
        self._public = public
        self._known: dict[str, str] = {}
        self._lock = Lock()

    def learn_key(self, key: str, what: str) -> None:
        """Keep a key or a credential."""
        if len(key) >= _SHORTEST_KEY:
            self._learn(key, what)

    def learn_prompt(self, text: str) -> None:
        """Keep what somebody has said."""
        words = text.strip()
        if len(words) >= _SHORTEST_PROMPT and " " in words and re.search("[a-z]{3}", words):
            self._learn(words[:_BEGINNING], "a prompt")

    def learn_environment(self, environment: Mapping[str, str], folder: Path) -> None:
        """
        Keep all that is secret in the environment of a server, and in the files that it names.

        @param folder: its working directory.
        """
        for name, value in environment.items():
            if name in KEY_VARIABLES or _SENSITIVE.search(name):
                for part in _values_of(name, value, folder):
                    self.learn_key(part, name)
        self.learn_mcp(folder / environment.get("MCP_CONFIG_PATH", "mcp-config.json"))

    def learn_mcp(self, path: Path) -> None:
        """Keep what a configuration file tells MCP servers."""
        try:
            servers = json.loads(path.read_bytes())["mcpServers"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return  # there are tests of each of these
        for server in servers:
            for field in ("env", "headers"):
                told = server.get(field) if isinstance(server, dict) else None
                for name, value in told.items() if isinstance(told, dict) else ():
                    self.learn_key(str(value), f"{name} of an MCP server")

    def learn_request(self, headers: Mapping[str, str], body: bytes) -> None:
        """
        Keep what a client sends: its key, and what it says.

        @param headers: by their names in lower case.
        """
        self.learn_key(headers.get("x-api-key", ""), "a client's key")
        self.learn_key(headers.get("authorization", "").rpartition(" ")[2], "a client's key")
        if b'"prompt"' in body or b'"messages"' in body:
            try:
                request = json.loads(body)
            except (ValueError, RecursionError):
                return
            for text in _spoken(request):
                self.learn_prompt(text)

    def found_in(self, output: str) -> list[str]:
        """What of it stands in a text, each with its place."""
        with self._lock:
            known = list(self._known.items())
        return [
            f"{what} ({secret!r}) in: {output[max(place - 200, 0) : place + 100]!r}"
            for secret, what in known
            if (place := _place_of(secret, output)) >= 0
        ]

    def check(self, output: str, where: str) -> None:
        """
        @raise AssertionError: something secret stands in it.
        """
        found = self.found_in(output)
        assert not found, f"{where} shows what is secret:\n" + "\n".join(found)

    def _learn(self, text: str, what: str) -> None:
        if text in self._public:
            return
        with self._lock:
            what = self._known.pop(text, what)  # what is used again is forgotten last
            self._known[text] = what
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]


def _values_of(name: str, value: str, folder: Path) -> list[str]:
    if name == "API_KEYS_FILE":
        try:
            lines = (folder / value).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return []
        return [line.rpartition(":")[2].strip() for line in lines]
    return value.split(",")


def _spoken(value: Any, *, heard: bool = False) -> Iterator[str]:
    """The texts in a request that people have written."""
    if isinstance(value, str):
        if heard:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _spoken(item, heard=heard)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _spoken(item, heard=name in _SPOKEN)


def _place_of(secret: str, output: str) -> int:
    """Where it stands, as it is or as JSON or Python write it; -1 if it does not."""
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    forms |= {json.dumps(form)[1:-1] for form in forms}
    return max(output.find(form) for form in forms)


class Transcript:
    """All that a program prints, kept in a file without a name."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as it is written
        self._lock = Lock()

    def add(self, line: bytes) -> None:
        """Take a line; from any thread."""
        with self._lock:
            if not self._file.closed:
                self._file.write(line)

    def check(self, where: str, logs: Iterable[Path] = ()) -> None:
        """
        Search it, once.

        @param logs: files that the program has written beside.
        @raise AssertionError: something secret stands in it.
        """
        with self._lock:
            if self._file.closed:
                return
            self._file.seek(0)
            said = self._file.read()
            self._file.close()
        for output in (said, *(path.read_bytes() for path in logs if path.is_file())):
            self._secrets.check(output.decode("utf-8", "replace"), where)


class _Lines(io.StringIO):
    """A file that is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def write(self, text: str) -> int:
        self.said.append(text)
        return len(text)


class Output:
    """All log records of this process, as the log would have them, but for its own blotting."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._lines = _Lines()
        self._write = make_observer(self._lines, production=True, level="debug")

    def start(self) -> None:
        globalLogPublisher.addObserver(self._write)

    def stop(self) -> None:
        globalLogPublisher.removeObserver(self._write)

    def check(self, where: str) -> None:
        """
        Search what has come since the last time.

        @raise AssertionError: something secret stands in it.
        """
        said, self._lines.said = self._lines.said, []
        if said:
            self._secrets.check("".join(said), where)


SECRETS = Secrets()
OUTPUT = Output(SECRETS)

"""
The daemon, and the CLI by itself, started as a stranger would start them.

Nothing of the environment of the tests reaches them but PATH; every path they may write to lies in
the folder of the test.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

import httpx
from httpx_sse import EventSource

from tests.e2e.processes import children_of, processes_with_env, wait_until
from tests.secrecy import SECRETS, Transcript

__all__ = [
    "API_KEY",
    "Daemon",
    "children_of",
    "cli_environment",
    "processes_with_env",
    "run_cli",
    "sse_data",
    "sse_events",
    "user_line",
    "wait_until",
]

API_KEY = "sk-ant-test-0123456789abcdef"

_START_SECONDS = 20.0
_STOP_SECONDS = 15.0
_KEPT_LINES = 50_000
_TICK_SECONDS = 0.02
_CHECKOUT = Path(__file__).resolve().parents[2]


def cli_environment(
    folder: Path, api_url: str, extra: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """
    The whole environment for a CLI, or for a daemon that starts one.

    @param folder: receives home, configuration and temporary files.
    @param api_url: the Messages API.
    @param extra: added last; None takes a variable away.
    """
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    environment: dict[str, str | None] = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "CLAUDE_CONFIG_DIR": str(folder / "config"),
        "ANTHROPIC_API_KEY": API_KEY,
        "ANTHROPIC_BASE_URL": api_url,
        "CLAUDE_CODE_MAX_RETRIES": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        **(extra or {}),
    }
    return {name: value for name, value in environment.items() if value is not None}


class Daemon:
    """
    `twistd -n claude-proxy` in a process of its own, on a free port, logging JSON.

    A context manager: inside, the server listens; on leaving, it is stopped.  What it has printed
    is searched for secrets when it has ended, see `tests.secrecy`.

    @param folder: the test's own folder; it also marks the daemon's processes, see
        L{processes_with_env}.
    @param claude: the CLI that it drives.
    @param api_url: the Messages API that the CLI talks to.
    @param env: added to the environment last; None takes a variable away.
    @param args: added to the command line after `--port=0`.
    @raise AssertionError: on entering, if it does not listen within 20 s; on leaving, if it does
        not end within 15 s after SIGTERM.
    """

    def __init__(
        self,
        folder: Path,
        claude: os.PathLike[str] | str,
        api_url: str,
        *,
        env: Mapping[str, str | None] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.state = folder / "state"
        self.cwd = folder / "cwd"
        self.port = 0
        own = {
            **_where_the_package_is(),
            "NODE_ENV": "production",
            "CLAUDE_CLI": shlex.quote(os.fspath(claude)),
            "WORKSPACE_BASE_PATH": str(self.base),
            "STATE_PATH": str(self.state),
            # A process that no test has asked for would be in the way of those that count.
            "SPARE_PROCESSES": "0",
        }
        self.environment = cli_environment(folder, api_url, {**own, **(env or {})})
        twistd = Path(sys.executable).with_name("twistd")
        self.argv = [str(twistd), "-n", "--pidfile=", "claude-proxy", "--port=0", *args]
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.stderr_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._transcript = Transcript(SECRETS)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.port = int(self.wait_for_record("server_listening", _START_SECONDS)["port"])
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process without waiting for anything, for tests of starts that fail."""
        self.base.mkdir(parents=True, exist_ok=True)
        self.cwd.mkdir(parents=True, exist_ok=True)
        SECRETS.learn_environment(self.environment, self.cwd)
        self._process = subprocess.Popen(
            self.argv,
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for pipe, lines in (
            (self._process.stdout, self.lines),
            (self._process.stderr, self.stderr_lines),
        ):
            reader = threading.Thread(
                target=_collect, args=(pipe, lines, self._transcript), daemon=True
            )
            reader.start()
            self._readers.append(reader)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The started process."""
        assert self._process is not None, "The daemon was not started."
        return self._process

    @property
    def pid(self) -> int:
        """The process id of twistd."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, None while it runs."""
        return self.process.poll()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """Everything it wrote to stdout and then to stderr."""
        return "\n".join([*self.lines, *self.stderr_lines])

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client for this server; the options are those of httpx.Client."""
        defaults = {"base_url": self.url, "timeout": 60, "trust_env": False}
        client = httpx.Client(**{**defaults, **options})
        client.event_hooks["request"].append(_learn_from)
        return client

    def records(self, type: str | None = None, **fields: Any) -> list[dict[str, Any]]:  # noqa: A002  (the field's name in the log)
        """The log records so far of this type and with these fields, oldest first."""
        wanted = fields if type is None else {"type": type, **fields}
        records = [record for line in list(self.lines) if (record := _record(line)) is not None]
        return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]

    def wait_for_record(self, type: str, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:  # noqa: A002  (the field's name in the log)
        """
        The first such log record, waited for.

        @param timeout: in seconds.
        @raise AssertionError: it did not come in time, or the daemon ended without it.
        """
        deadline = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            late = time.monotonic() > deadline
            if ended:
                self._join()
            found = self.records(type, **fields)
            if found:
                return found[0]
            if ended or late:
                why = f"ended with {self.returncode}" if ended else f"was silent for {timeout} s"
                raise AssertionError(
                    f"No record {type!r} {fields}: the daemon {why}.\n{self.output[-4000:]}"
                )
            time.sleep(_TICK_SECONDS)

    def wait(self, timeout: float = _STOP_SECONDS) -> int:
        """
        The exit code, waited for.

        @raise AssertionError: it still runs after that many seconds, or has printed a secret.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"The daemon still runs after {timeout} s.") from None
        self._join()
        SECRETS.learn_environment(self.environment, self.cwd)  # files may have changed
        logs = [*self.cwd.glob("*.log*"), *self.folder.glob("*.log*")]
        self._transcript.check(f"The daemon in {self.folder}", logs)
        return code

    def stop(self) -> int:
        """
        End it with SIGTERM and return the exit code; nothing happens if it has ended.

        @raise AssertionError: it had to be killed, or has printed a secret.
        """
        if self.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait()
        except AssertionError:
            if self.returncode is not None:
                raise  # it ended, but not well
            self.kill()
            raise AssertionError(
                f"SIGTERM did not end the daemon within {_STOP_SECONDS} s.\n{self.output[-4000:]}"
            ) from None

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.process.kill()
        self.wait()

    def _join(self) -> None:
        # Children that outlive the daemon may hold its pipes, so this does not wait for ever.
        for reader in self._readers:
            reader.join(1.0)


@cache
def _where_the_package_is() -> dict[str, str]:
    """Nothing where the package is installed; else what lets twistd find this checkout."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('claude_proxy') is None)"
    # Isolated, because the tests themselves find the checkout in their working directory.
    installed = subprocess.run([sys.executable, "-I", "-c", look], check=False).returncode == 0
    return {} if installed else {"PYTHONPATH": str(_CHECKOUT)}


def _learn_from(request: httpx.Request) -> None:
    """Keep in mind what no log may show."""
    with suppress(httpx.RequestNotRead):  # its body is made on the way
        SECRETS.learn_request(request.headers, request.content)


def _collect(pipe: IO[bytes], lines: deque[str], transcript: Transcript | None = None) -> None:
    with pipe:
        for line in pipe:
            if transcript is not None:
                transcript.add(line)
            lines.append(line.decode("utf-8", "replace").rstrip("\n"))


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def sse_data(response: httpx.Response) -> Iterator[str]:
    """
    The data of each server-sent event, as text, `[DONE]` included.

    @raise AssertionError: the response is no event stream; says what it is instead.
    """
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        text = response.read().decode("utf-8", "replace")
        raise AssertionError(f"No event stream but {response.status_code}: {text[:2000]}")
    for event in EventSource(response).iter_sse():
        yield event.data


def sse_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event, parsed; ends at `[DONE]` or with the response."""
    for data in sse_data(response):
        if data == "[DONE]":
            return
        yield json.loads(data)


def user_line(content: str | list[dict[str, Any]]) -> dict[str, Any]:
    """A user message for the CLI's stdin."""
    return {"type": "user", "message": {"role": "user", "content": content}}


def run_cli(
    cli: os.PathLike[str] | str,
    args: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
    env: Mapping[str, str],
    cwd: Path,
    *,
    timeout: float = 60.0,
) -> list[dict[str, Any]]:
    """
    Run the CLI by hand in stream-json mode and return everything it printed.

    The lines are sent in order; after each user message its `result` is awaited.  Stdin stays open
    until the last one, because the CLI loses output otherwise.

    @param args: added to the flags for stream-json.
    @param env: the whole environment, see L{cli_environment}.
    @param timeout: for the whole run, in seconds.
    @raise AssertionError: a user message got no `result`, or not in time; says what was on stderr.
    """
    flags = ["-p", "--verbose", "--input-format", "stream-json", "--output-format", "stream-json"]
    cwd.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [os.fspath(cli), *flags, *args],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=_KEPT_LINES)
    reader = threading.Thread(target=_collect, args=(process.stderr, said), daemon=True)
    reader.start()
    limit = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    events: list[dict[str, Any]] = []
    try:
        with process.stdin, process.stdout:
            missing = _converse(process.stdin, process.stdout, lines, events)
            process.stdin.close()
            events += [json.loads(line) for line in process.stdout]
        code = process.wait()
    finally:
        limit.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(1.0)
    if missing:
        raise AssertionError(f"The CLI gave no result, exit {code}, stderr: {' '.join(said)}")
    return events


def _converse(
    stdin: IO[bytes],
    stdout: IO[bytes],
    lines: Sequence[Mapping[str, Any]],
    events: list[dict[str, Any]],
) -> bool:
    """Send the lines and collect the events; True if a user message stays without a result."""
    for line in lines:
        try:
            stdin.write(json.dumps(line).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return True
        if line.get("type") != "user":
            continue
        for raw in stdout:
            events.append(json.loads(raw))
            if events[-1].get("type") == "result":
                break
        else:
            return True
    return False

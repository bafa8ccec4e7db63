"""That no test shows a secret is itself looked after by something that can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger

from claude_proxy.web.site import ProxySite
from tests.e2e.daemon import Daemon
from tests.integration.server import in_thread, serving
from tests.secrecy import PUBLIC, SECRETS, Output, Secrets, Transcript
from tests.support import Connection, KeptRequests, in_reactor, open_site

KEY = 'sk-with-a-"quote"-0123456789'
PROMPT = "Tell nobody\nthat the café is closed, not today and not tomorrow either."
_ROOT = Path(__file__).resolve().parent.parent


def knowing() -> Secrets:
    secrets = Secrets()
    secrets.learn_key(KEY, "a key")
    secrets.learn_prompt(PROMPT)
    return secrets


@pytest.mark.parametrize("secret", [KEY, PROMPT, PROMPT[:40]])
@pytest.mark.parametrize(
    "write",
    [str, repr, json.dumps, lambda text: json.dumps(json.dumps(text)), lambda t: json.dumps([t])],
)
def test_a_secret_is_found_however_it_is_written(secret: str, write: object) -> None:
    assert callable(write)
    assert len(knowing().found_in(f"before {write(secret)} after")) == 1


def test_what_is_no_secret_is_not_found() -> None:
    secrets = knowing()
    for harmless in ("no", "go", "{}", "singleword-without-blanks"):
        secrets.learn_prompt(harmless)
    secrets.learn_key("short", "a short key")
    secrets.learn_key("", "none")
    log = json.dumps({"message": "go on, no {} short singleword-without-blanks", "key": KEY[:8]})
    secrets.check(log, "a log")


def test_what_is_public_is_not_found() -> None:
    secrets = Secrets({"sk-in-the-manual": "it is in the manual"})
    secrets.learn_key("sk-in-the-manual", "a key")
    secrets.check("sk-in-the-manual", "a log")


def test_every_exception_has_its_reason() -> None:
    assert all(" " in reason for reason in PUBLIC.values())


def test_the_secrets_of_a_server_are_learnt(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# the keys\nalice: sk-of-alice-1\nsk-of-nobody\n")
    servers = {"a": {"env": {"TOKEN": "mcp-token-1"}}, "b": {"headers": {"X": "mcp-header"}}}
    (tmp_path / "mcp-config.json").write_text(json.dumps({"mcpServers": servers}))
    environment = {
        "API_KEYS": "sk-first-one,sk-second-one",
        "API_KEYS_FILE": "keys",
        "ANTHROPIC_API_KEY": "sk-ant-of-the-service",
        "HOME": "/home/somebody",
    }
    secrets = Secrets()
    secrets.learn_environment(environment, tmp_path)
    told = [
        *("sk-first-one", "sk-second-one", "sk-of-alice-1", "sk-of-nobody"),
        *("sk-ant-of-the-service", "mcp-token-1", "mcp-header"),
    ]
    assert [text for text in told if len(secrets.found_in(text)) != 1] == []
    assert secrets.found_in("/home/somebody alice TOKEN the keys") == []


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": PROMPT},
        {"prompt": "x", "system-prompt": PROMPT},
        {"messages": [{"role": "user", "content": PROMPT}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]},
        {"messages": [], "claude": {"append-system-prompt": PROMPT}},
    ],
)
def test_the_secrets_of_a_request_are_learnt(request_: object) -> None:
    secrets = Secrets()
    headers = {"authorization": "Bearer sk-one-way", "x-api-key": "sk-other-way"}
    secrets.learn_request(headers, json.dumps(request_).encode())
    assert len(secrets.found_in(f"{PROMPT} sk-one-way sk-other-way")) == 3


@pytest.mark.parametrize("body", [b"", b'{"prompt"', b'"prompt"', b'{"prompt": 7}', b"[" * 9999])
def test_a_request_that_is_broken_teaches_nothing(body: bytes) -> None:
    secrets = Secrets()
    secrets.learn_request({}, body)
    assert secrets.found_in(body.decode()) == []


def test_records_of_this_process_are_searched() -> None:
    output, log = Output(knowing()), Logger(namespace="claude_proxy.web")
    output.start()
    try:
        log.debug("hello", type="request", prompt_characters=len(PROMPT))
        output.check("this test")
        log.debug("hello {what}", what=[KEY])
        with pytest.raises(AssertionError, match="this test shows what is secret:\na key"):
            output.check("this test")
        output.check("this test")
    finally:
        output.stop()
    log.info(KEY.replace("{", "{{"))
    output.check("this test")


def test_a_transcript_is_searched_with_the_log_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "twistd.log").write_text(f"key {KEY}")
    clean, dirty, beside = (Transcript(knowing()) for _ in range(3))
    for transcript in (clean, dirty, beside):
        transcript.add(b"a line\n")
    dirty.add(json.dumps({"text": PROMPT}).encode())
    clean.check("It", [tmp_path / "no.log"])
    with pytest.raises(AssertionError, match="It shows what is secret:\na prompt"):
        dirty.check("It")
    with pytest.raises(AssertionError, match="It shows what is secret:\na key"):
        beside.check("It", [tmp_path / "twistd.log"])


LEAK = """
from twisted.logger import Logger
from tests.secrecy import SECRETS

SECRETS.learn_key("sk-that-leaks-0123", "a key")


def test_that_leaks():
    Logger(namespace="claude_proxy.web").info("key {key}", key="sk-that-leaks-0123")


def test_that_does_not():
    Logger(namespace="claude_proxy.web").info("nothing")
"""


def test_of_two_tests_the_one_that_leaks_fails(tmp_path: Path) -> None:
    test = tmp_path / "test_leak.py"
    test.write_text(LEAK)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*argv, "--rootdir", str(tmp_path), str(test)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_leak.py::test_that_leaks shows what is secret:" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("2 passed, 1 error in")


def test_a_daemon_that_leaks_fails_when_it_ends(tmp_path: Path) -> None:
    # It blots out what it knows to be secret.  This is in a variable that means nothing to it, and
    # in a path that it shows at its start.
    env = {"SOME_TOKEN": "hidden-folder", "WORKSPACE_BASE_PATH": str(tmp_path / "hidden-folder")}
    daemon = Daemon(tmp_path, "claude", "http://127.0.0.1:9", env=env, args=["--demo"])
    with pytest.raises(AssertionError, match=r"shows what is secret:\nSOME_TOKEN"), daemon:
        assert daemon.port
    assert daemon.returncode == -signal.SIGTERM


# Whatever starts a server, or asks one, tells what is secret.


def known(*texts: str) -> list[bool]:
    """Whether no log may show them."""
    return [bool(SECRETS.found_in(text)) for text in texts]


def test_a_daemon_and_its_clients_tell_what_is_secret(tmp_path: Path) -> None:
    told = ["what is said to a daemon", "what is said with a wrong key"]
    key, wrong = "sk-of-a-daemon-only", "sk-of-nobody-at-all"
    assert known(*told, key, wrong) == [False] * 4
    daemon = Daemon(tmp_path, "claude", "http://127.0.0.1:9", env={"API_KEY": key}, args=["--demo"])
    with daemon, daemon.client() as client:
        for text, sent in zip(told, (key, wrong), strict=True):
            body = {"prompt": text, "stream": False}
            client.post("/api/claude", json=body, headers={"x-api-key": sent})
    assert known(*told, key, wrong) == [True] * 4


def test_connections_in_memory_tell_what_is_secret() -> None:
    told, key = "what is said in memory only", "sk-in-memory-only"
    site: ProxySite = open_site(KeptRequests(), Clock())
    body = json.dumps({"prompt": told}).encode()
    Connection(site).send(b"POST /json HTTP/1.1\r\nX-Api-Key: " + key.encode() + b"\r\n\r\n" + body)
    assert known(told, key) == [True, True]


@in_reactor
async def test_a_server_in_the_tests_reactor_tells_what_is_secret(tmp_path: Path) -> None:
    told, key = "what is said in this process only", "sk-in-this-process-only"

    def ask(port: int) -> httpx.Response:
        url = f"http://127.0.0.1:{port}/api/claude"
        return httpx.post(url, json={"prompt": told}, headers={"x-api-key": key}, trust_env=False)

    async with serving(tmp_path, "message()\nwrite(INIT + RESULT)\nleave()", API_KEY=key) as server:
        assert known(told, key) == [False, True]
        assert (await in_thread(ask, server.port)).status_code == 200
    assert known(told, key) == [True, True]

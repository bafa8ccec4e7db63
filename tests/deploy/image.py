"""
The Docker image without Docker: the steps of the Dockerfile in a folder, and what it starts.

Every step that is ours is carried out as it stands, with the image's paths moved into the folder.
The Debian packages are taken from this machine, and the user is only a number.  As root, the
server runs with the image's user, as process 1 of a namespace of its own, and with everything
read-only but the volume and /tmp; else as whoever runs the tests.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.deploy.tools import DEPLOY, free_port, program, replaced
from tests.e2e.daemon import Daemon

__all__ = ["CHECKOUT", "DOCKERFILE", "UID", "Container", "Image", "context", "instructions"]

CHECKOUT = DEPLOY.parent
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
UID = 10001

_PLACES = {
    "/opt/claude-code": "opt/claude-code",
    "/opt/claude-proxy": "opt/claude-proxy",
    "/usr/local/lib/claude-proxy": "lib",
    "/var/lib/claude-proxy": "volume",
    "/etc/claude-proxy": "etc",
    "/run/secrets": "secrets",
    "/src": "src",
}

# Debian's Python and no other: the image's user could not run one that is in somebody's home.
_PATH = os.pathsep.join(["/usr/bin", "/bin", os.environ["PATH"]])

# What a container engine does before the image's own program takes over.
_ENGINE = """
mount --bind "$VOLUME" "$VOLUME"
mount -t tmpfs -o mode=1777,size=1g tmpfs /tmp
mount -o remount,bind,ro /
unset VOLUME
exec "$@"
"""


def instructions(name: str) -> list[str]:
    """The values of all instructions with this name, in order; continued lines are joined."""
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    steps = [line.partition(" ") for line in text.replace("\\\n", " ").splitlines()]
    return [value.strip() for instruction, _, value in steps if instruction == name]


def context(checkout: Path) -> set[Path]:
    """The files that Docker would be sent, by the ignore file, which begins with `*`."""
    lines = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [checkout / rule[1:] for rule in rules if rule.startswith("!")]
    dropped = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    files = {file for path in kept for file in [path, *path.rglob("*")] if file.is_file()}
    return {
        file
        for file in files
        if not any(part.match(rule) for rule in dropped for part in [file, *file.parents])
    }


class Image:
    """
    The image, made in a folder that everybody can enter.

    @ivar skipped: the steps that were not carried out.
    """

    def __init__(self) -> None:
        # Not in /tmp, which the server gets anew.
        self.folder = Path(tempfile.mkdtemp(prefix="claude-proxy-image-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.skipped: list[str] = []
        for place in _PLACES.values():
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        self._version = next(v for v in instructions("ARG") if v.startswith("CLAUDE_CODE_VERSION="))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def place(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return Path(self.moved(path))

    def moved(self, text: str) -> str:
        """A text with the image's paths moved."""
        for path, place in _PLACES.items():
            text = text.replace(path, str(self.folder / place))
        return text

    def build(self) -> None:
        """Carry out the steps."""
        source = self.place("/src")
        for file in context(CHECKOUT):
            copy = source / file.relative_to(CHECKOUT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        for step in instructions("RUN"):
            if step.startswith("apt-get"):
                self.skipped.append(step)
            else:
                self._run(step)
        for step in instructions("COPY"):
            origin, _, target = step.rpartition(" ")
            if target.startswith("/usr/local/lib"):
                shutil.copyfile(CHECKOUT / origin, self.place(target))
        # The last step of the packages' RUN, which needs root.
        for folder in ("state", "home", "workspaces"):
            self.give(self.place("/var/lib/claude-proxy") / folder)
        self.give(self.place("/var/lib/claude-proxy"))

    def give(self, path: Path) -> Path:
        """Make a folder if it is not there, and give it to the image's user."""
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(path, UID, UID)
        return path

    def _run(self, step: str) -> None:
        name, _, value = self._version.partition("=")
        environment = {n: text for n, text in os.environ.items() if n != "PYTHONPATH"}
        done = subprocess.run(
            ["sh", "-ec", self.moved(step)],
            cwd=self.place("/src"),
            env={**environment, name: value, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{step} failed:\n{done.stdout}{done.stderr}"

    def environment(self) -> dict[str, str]:
        """What ENV sets in the image."""
        (pairs,) = instructions("ENV")
        found = dict(pair.split("=", 1) for pair in shlex.split(pairs))
        return {name: self.moved(value) for name, value in found.items()}

    def command(self) -> list[str]:
        """The argument vector that a container starts."""
        entry, words = instructions("ENTRYPOINT")[-1], instructions("CMD")[-1]
        found = [*json.loads(entry), *json.loads(words)]
        found[0] = replaced(found[0], {"/usr/bin/tini": program("tini")})
        return [self.moved(word) for word in found]

    def healthcheck(self, port: int) -> subprocess.CompletedProcess[str]:
        """What HEALTHCHECK finds."""
        (check,) = instructions("HEALTHCHECK")
        argv = json.loads(check[check.index("[") :])
        return subprocess.run(
            [self.moved(word) for word in argv],
            env={"PATH": _PATH, "PORT": str(port), "http_proxy": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )


class Container(Daemon):
    """
    The server as a container of the image would run it.

    @param env: what `docker run --env` would add.
    """

    def __init__(self, folder: Path, image: Image, env: Mapping[str, str | None]) -> None:
        super().__init__(folder, "claude", "http://127.0.0.1:9")
        self.cwd = image.place(instructions("WORKDIR")[-1])
        given = {
            **image.environment(),
            "PATH": _PATH,
            "PORT": str(free_port()),
            "TINI_SUBREAPER": "1",  # where it is not process 1
            **env,
        }
        self.environment = {name: value for name, value in given.items() if value is not None}
        self.argv = image.command()
        if os.geteuid() == 0:
            self.environment["VOLUME"] = str(image.place("/var/lib/claude-proxy"))
            own = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
            user = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
            no_rights = ["--inh-caps=-all", "--bounding-set=-all"]
            self.argv = [
                *[program("unshare"), *own, "--propagation=private"],
                *["sh", "-ec", _ENGINE, "sh"],
                *[program("setpriv"), *user, *no_rights],
                *self.argv,
            ]

    @property
    def init(self) -> int:
        """The pid, on this machine, of the container's first process."""
        if os.geteuid() != 0:
            return self.pid
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0])

    def stop(self) -> int:
        """As `docker stop`: SIGTERM to the first process."""
        if self.returncode is None:
            os.kill(self.init, signal.SIGTERM)
        return self.wait()

    def wait_for(self, type: str, **fields: Any) -> dict[str, Any]:  # noqa: A002 - as in Daemon
        """As `wait_for_record`, with time for a first start without compiled files."""
        return self.wait_for_record(type, 30.0, **fields)

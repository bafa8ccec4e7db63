"""A real nginx with the shipped configuration, on ports and with a certificate of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from tests.certificates import make_certificate
from tests.deploy.tools import DEPLOY, accepts, free_port, program, replaced
from tests.e2e.daemon import Daemon, wait_until
from tests.secrecy import SECRETS

__all__ = ["SITE", "Nginx"]

SITE = DEPLOY / "nginx" / "claude-proxy.conf"

# What /etc/nginx/nginx.conf says elsewhere, with every path in the test's folder.
_MAIN = """
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Nginx:
    """
    nginx in front of a server; a context manager.

    @param daemon: the server, which listens.
    @param changes: further replacements in the shipped file.
    """

    def __init__(
        self, folder: Path, daemon: Daemon, changes: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port, self.plain_port = free_port(), free_port()
        self.certificate = make_certificate(folder)
        own = {
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "proxy.example.com": "localhost",
            "/etc/ssl/claude-proxy/fullchain.pem": str(self.certificate.chain),
            "/etc/ssl/claude-proxy/privkey.pem": str(self.certificate.key),
            "server 127.0.0.1:3000;": f"server 127.0.0.1:{daemon.port};",
        }
        text = SITE.read_text(encoding="utf-8")
        (folder / "site.conf").write_text(replaced(text, {**own, **(changes or {})}))
        # Its workers would be somebody else, who may not enter the test's folder.
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_MAIN.format(user=user, folder=folder))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        argv = [program("nginx"), "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        quiet = ["-e", str(self.folder / "error.log"), "-g", "daemon off;"]
        self._process = subprocess.Popen([*argv, *quiet], stdin=subprocess.DEVNULL)
        try:
            wait_until(self._listens, "nginx listens")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "error.log").read_text()
        return accepts(("127.0.0.1", self.port)) and accepts(("127.0.0.1", self.plain_port))

    def _end(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)
        for log in self.folder.glob("*.log"):
            SECRETS.check(log.read_text(encoding="utf-8", errors="replace"), f"nginx's {log.name}")

    def client(self, **options: Any) -> httpx.Client:
        """An HTTPS client of it."""
        return httpx.Client(
            base_url=f"https://localhost:{self.port}",
            verify=self.certificate.trusted(),
            timeout=60,
            trust_env=False,
            **options,
        )

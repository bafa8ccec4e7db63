"""
Web pages that run a script and report what came of it, and a host whose name is rebound.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any, Self

from tests.browser.chromium import Chromium

__all__ = ["Pages", "Rebound"]

_REPORT_SECONDS = 30.0

_PAGE = """<!doctype html><title>page</title><body><script>
(async () => {{
  let outcome;
  try {{
    outcome = await (async () => {{ {script} }})();
  }} catch (error) {{
    outcome = {{failed: error.name}};
  }}
  await fetch("{report}", {{method: "POST", mode: "no-cors", body: JSON.stringify(outcome)}});
}})();
</script>"""


class Pages:
    """
    The web server of the tests' pages, on a free port of 127.0.0.1; a context manager.

    A page is a script, the body of an async function; what it returns, as JSON, is its report, and
    if it throws, C{{"failed": NAME}} is.
    """

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._scripts: list[str] = []
        self._reports: dict[int, Queue[Any]] = defaultdict(Queue)
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where the pages are."""
        return int(self._server.server_address[1])

    def origin(self, host: str) -> str:
        """The origin of pages of that host."""
        return f"http://{host}:{self.port}"

    def run(
        self,
        script: str,
        host: str = "evil.test",
        port: int | None = None,
        after: Callable[[], object] = lambda: None,
    ) -> Any:
        """
        Open a page of that host in a browser and return its report.

        @param port: of another server that fetches its pages here.
        @param after: called when the report has come, and before the page is closed.
        @raise AssertionError: it reported nothing within 30 s.
        """
        self._scripts.append(script)
        number = len(self._scripts) - 1
        tab = self._browser.open(f"http://{host}:{port or self.port}/page/{number}")
        try:
            report = self._reports[number].get(timeout=_REPORT_SECONDS)
            after()
        except Empty:
            raise AssertionError(f"The page reported nothing: {script}") from None
        finally:
            self._browser.close(tab)
        return report

    # What follows is for the handler threads.

    def page(self, number: int) -> str:
        report = f"http://127.0.0.1:{self.port}/report/{number}"
        return _PAGE.format(script=self._scripts[number], report=report)

    def reported(self, number: int, outcome: Any) -> None:
        self._reports[number].put(outcome)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        kind, _, number = self.path.strip("/").partition("/")
        if kind == "page":
            self._answer(200, self.server.pages.page(int(number)))
        else:
            self._answer(404, "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number = int(self.path.rpartition("/")[2])
        self._answer(204, "")
        self.server.pages.reported(number, json.loads(body))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name)
        """Keep the output of the tests clean."""

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Rebound:
    """
    A port behind which there is first the web server of a page, and another one as soon as the page
    has asked for `/flip`: what a browser sees of a host whose name server has changed its mind (DNS
    rebinding).

    A context manager.  Each connection goes to whoever is there when it is made.

    @param first: the port of the page's server.
    @param then: the port of the other.
    """

    def __init__(self, first: int, then: int = 0) -> None:
        self._target = first
        self._then = then
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake up the thread that waits for connections.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    def then(self, port: int) -> None:
        """Say who will be there."""
        self._then = port

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client:
            head = client.recv(65536)
            if not head:
                return  # the browser keeps some ready that it never uses
            if head.startswith(b"GET /flip "):
                self._target = self._then
                client.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                server.sendall(head)
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass

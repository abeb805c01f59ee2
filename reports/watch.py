"""A run's report on loopback, made anew while the run goes on: for whoever sits at this machine, and nobody else.

It reads the run's folder and writes nothing. Pages are those of ``write_reports``; while the run goes on a browser asks
for them again every few seconds, and the first lines say what goes on. Only a request that names this very address is
answered, so that no page from elsewhere can read a report through the browser of the person at this machine. Every user
of the machine reaches the port, so the address has a secret in it.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import escape

from fedveil.common.errors import DataError, FedVeilError
from fedveil.common.run_lines import ProgressFile, read_if_there
from fedveil.common.words import visible
from fedveil.reports.claim import server_is_trusted
from fedveil.reports.data import ReportData, report_of
from fedveil.reports.files import REPORT_JSON, to_json
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html

LOOPBACK = "127.0.0.1"
REFRESH_SECONDS = 5
UNFINISHED = "unfinished"
TITLE = "<h1>Privacy report</h1>"
TO_NOBODY = (
    "Right now: the run goes on. This page is for the trusted server's own people alone: when a round ends may tell "
    "who was drawn for it"
)
FORMS: Mapping[str, tuple[str, Callable[[ReportData], bytes]]] = {
    "/": ("text/html; charset=utf-8", lambda data: to_html(data).encode()),
    "/report.md": ("text/plain; charset=utf-8", lambda data: to_markdown(data).encode()),
    f"/{REPORT_JSON}": ("application/json", to_json),
}
"""What is served, by path."""


class Watched(ThreadingHTTPServer):
    """Serves the report of one run's folder on loopback.

    Args:
        folder: of the run.
        port: 0 takes a free one; ``server_port`` says which.

    Raises:
        DataError: ``folder`` is not the folder of a run, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self._secret = folder, f"/{secrets.token_urlsafe(24)}"
        self._lock, self._data = threading.Lock(), report_of(folder)
        self._seen: tuple[tuple[str, int, int], ...] = ()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"port {port} cannot be served ({why}): give another with --port, or 0 for a free one"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away in the middle."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def names(self) -> frozenset[str]:
        """Addresses by which a request may name this server."""
        return frozenset(f"{host}:{self.server_port}" for host in (LOOPBACK, "localhost"))

    @property
    def address(self) -> str:
        """The page's address, which is for nobody else."""
        return f"http://{LOOPBACK}:{self.server_port}{self._secret}/"

    def told(self, path: str) -> str | None:
        """Return a path below the secret that it begins with; None: it begins otherwise."""
        length = len(self._secret)
        same = secrets.compare_digest(path[:length].encode(), self._secret.encode())
        return path[length:] if same else None

    def report(self) -> ReportData:
        """Return the report as the folder's files have it now; made once for each state of them."""
        with self._lock:
            seen = tuple(
                (path.name, status.st_mtime_ns, status.st_size)
                for path in sorted(self.folder.glob("*.json*"))
                if path.name not in (ProgressFile.NAME, REPORT_JSON) and path.name[0] != "." and (status := path.stat())
            )
            if seen != self._seen:
                self._data = report_of(self.folder)
                self._seen = seen
            return self._data

    def page(self, path: str) -> tuple[str, bytes, bool]:
        """Return type and content of a page, and whether the run goes on.

        Args:
            path: a key of ``FORMS``.

        Raises:
            FedVeilError, OSError: the folder cannot be read any more.
        """
        kind, made = FORMS[path]
        data = self.report()
        content, goes_on = made(data), data.status == UNFINISHED
        if path == "/" and goes_on and (words := self._progress(data)):
            said = f'{TITLE}\n<p class="care" role="status">{escape(visible(words))}</p>'
            content = content.replace(TITLE.encode(), said.encode(), 1)
        return kind, content, goes_on

    def _progress(self, data: ReportData) -> str:
        if server_is_trusted(data.claim.privacy_mode):
            return TO_NOBODY
        try:
            state = read_if_there(ProgressFile, self.folder)
        except DataError:
            return ""
        if state is None:
            return ""
        if state.round_number is None:
            waited = f": {state.online} of {state.wanted} are online" if state.wanted else ""
            return f"Right now: {state.phase}{waited}"
        answered = f"{len(state.answered)} of {state.asked} sites have answered"
        return f"Right now: round {state.round_number} of {state.rounds}, {answered}"


class _Handler(BaseHTTPRequestHandler):
    server: Watched
    server_version, sys_version = "FedVeil", ""

    def do_GET(self) -> None:
        path = self.server.told(self.path)
        if self.headers.get("Host") not in self.server.names or path is None:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"ask for the address that fedveil watch printed\n")
            return
        if path not in FORMS:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", f"nothing is here; there is {', '.join(FORMS)}\n".encode())
            return
        try:
            kind, content, goes_on = self.server.page(path)
        except (FedVeilError, OSError) as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", f"{visible(str(error))}\n".encode())
        else:
            self._send(HTTPStatus.OK, kind, content, {"Refresh": str(REFRESH_SECONDS)} if goes_on else {})

    do_HEAD = do_GET  # noqa: N815 - the names are http.server's

    def _send(self, status: HTTPStatus, kind: str, content: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Say nothing: a browser asks every few seconds."""

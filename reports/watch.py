"""A run's report on loopback, updated while the run goes on, for the person at this machine.

It reads the run's folder and writes nothing. A browser reloads the pages every few seconds while the run goes on. Only
requests to this very address are answered, so that no page from elsewhere can read a report through that person's
browser. Every user of the machine reaches the port, so the address contains a secret.
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

from fedveil.common.errors import DataError, FedVeilError
from fedveil.common.run_lines import ProgressFile, read_if_there
from fedveil.common.words import visible
from fedveil.reports.data import ReportData, report_of
from fedveil.reports.files import REPORT_JSON, to_json
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html

LOOPBACK = "127.0.0.1"
REFRESH_SECONDS = 5
UNFINISHED = "unfinished"
TO_NOBODY = (
    "Right now: the run goes on. This page is for the trusted server's own people alone: when a round ends may tell "
    "who was drawn for it"
)
FORMS: Mapping[str, tuple[str, Callable[[ReportData, str], bytes]]] = {
    "/": ("text/html; charset=utf-8", lambda data, progress: to_html(data, progress).encode()),
    "/report.md": ("text/plain; charset=utf-8", lambda data, _: to_markdown(data).encode()),
    f"/{REPORT_JSON}": ("application/json", lambda data, _: to_json(data)),
}
"""Media type and writer of each path; a writer gets the report and a line on the round under way."""


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
        """The page's secret address."""
        return f"http://{LOOPBACK}:{self.server_port}{self._secret}/"

    def below_secret(self, path: str) -> str | None:
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
        """Return media type and content of one of ``FORMS``, and whether the run goes on.

        Raises:
            FedVeilError, OSError: the folder cannot be read any more.
        """
        kind, write = FORMS[path]
        data = self.report()
        goes_on = data.status == UNFINISHED
        return kind, write(data, self._progress(data) if goes_on else ""), goes_on

    def _progress(self, data: ReportData) -> str:
        if data.claim.trusts_server:
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
        path = self.server.below_secret(self.path)
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

"""The sites' port where Flower speaks HTTP: it passes the Fleet API's routes on to the SuperLink, and nothing else.

From 1.40 on a SuperLink has one port for sites, coordinator and its own processes. That one stays on the loopback; this
program ends TLS at the port that sites dial. A request is one of ``ROUTES`` to the letter, with a body and the few
headers that Flower reads, or it is answered here. Run as ``python -P -m fedveil.deploy.front_door FOLDER``.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedveil.common.parent import die_with_parent
from fedveil.deploy.server_folder import ServerFolder, open_server
from fedveil.deploy.superlink import App, Receive, Scope, Send

ROUTES = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        *("register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat"),
        *("pull-messages", "push-messages", "push-object", "pull-object", "confirm-message-received"),
        *("get-run", "get-fab"),
    )
)
HEALTH = b"/health"
ASKED = frozenset(
    (
        *(b"content-type", b"accept", b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"),
        *(b"flwr-package-name", b"flwr-package-version", b"flwr-component-name"),
    )
)
"""Headers that are passed on."""
ANSWERED = frozenset(("content-type", "flwr-version-incompatibility-message"))
"""Headers that come back."""
LARGEST = 64 * 2**20
"""Bytes of a request's body; Flower parts its messages at 5 MiB."""
HEAD_SECONDS, BODY_SECONDS = 10.0, 120.0
"""Until a connection's first request has its head, and a request its body."""
TIMES = {"timeout": httpx.Timeout(120.0, connect=10.0).as_dict()}
"""That the SuperLink has, in seconds."""
CONNECTIONS, KEPT_ALIVE = 4096, 64


class Refused(Exception):
    """A request is answered here, with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


def front_door(upstream: httpx.AsyncBaseTransport, address: str) -> App:
    """Return the ASGI application that passes the Fleet API's requests on to a SuperLink.

    Args:
        upstream: how it is dialled: a transport, since a client would keep one site's cookies for the next.
        address: its ``https://HOST:PORT``.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _answer(upstream, partial(_request, address, scope, receive), send)
        else:
            await send({"type": "websocket.close"})

    return app


async def _answer(upstream: httpx.AsyncBaseTransport, asked: Callable[[], httpx.Request], send: Send) -> None:
    begun = False
    try:
        answer = await upstream.handle_async_request(asked())
        try:
            headers = [(k.encode(), v.encode()) for k, v in answer.headers.multi_items() if k in ANSWERED]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            begun = True
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            await answer.aclose()
    except (Refused, httpx.HTTPError) as error:
        if begun:
            raise  # half an answer must not look like a whole one
        status = error.status if isinstance(error, Refused) else 503
        await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body"})


def _request(address: str, scope: Scope, receive: Receive) -> httpx.Request:
    """Return what is asked of the SuperLink in place of a request; Refused if that is not one of the routes."""
    path, method = scope["raw_path"], scope["method"]
    if scope["query_string"] or (path not in ROUTES and path != HEALTH):
        raise Refused(404)
    if method != ("POST" if path in ROUTES else "GET"):
        raise Refused(405)
    if path == HEALTH:
        return httpx.Request("GET", address + HEALTH.decode(), extensions=TIMES)
    headers = [(name, value) for name, value in scope["headers"] if name in ASKED]
    if any(name == b"content-length" and int(value) > LARGEST for name, value in scope["headers"]):
        raise Refused(413)
    return httpx.Request("POST", address + path.decode(), headers=headers, content=_body(receive), extensions=TIMES)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    ends, size, more = time.monotonic() + BODY_SECONDS, 0, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), ends - time.monotonic())
        except TimeoutError:
            raise Refused(408) from None
        if message["type"] == "http.disconnect":
            raise Refused(400)
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > LARGEST:
            raise Refused(413)
        if part:
            yield part


class Patient(H11Protocol):
    """A connection that is closed when the head of a request takes too long."""

    _ends: asyncio.TimerHandle | None = None
    _after: object = None
    """The exchange that went before the head whose time runs."""

    def connection_made(self, transport: Any) -> None:
        """Begin the time of the first head."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Begin the time of a head that has begun."""
        super().data_received(data)
        if self._is_waiting() and self._after is not self.cycle:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        if self._ends:
            self._ends.cancel()
        super().connection_lost(exc)

    def _begin(self) -> None:
        if self._ends:
            self._ends.cancel()
        self._after, self._ends = self.cycle, self.loop.call_later(HEAD_SECONDS, self._end)

    def _end(self) -> None:
        if self.cycle is self._after and self._is_waiting():
            self.transport.close()

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


def serve(folder: ServerFolder) -> None:
    """Listen where sites dial until a signal comes."""
    context = ssl.create_default_context(cafile=str(folder.path / "ca.crt"))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_ALIVE)
    upstream = httpx.AsyncHTTPTransport(verify=context, limits=limits)
    host, _, port = folder.fleet.rpartition(":")
    keys = {"ssl_keyfile": str(folder.path / "server.key"), "ssl_certfile": str(folder.path / "server.pem")}
    app = front_door(upstream, f"https://{folder.control}")
    uvicorn.Server(listening(app, host=host.strip("[]"), port=int(port), **keys)).run()


def listening(app: App, **place: Any) -> uvicorn.Config:
    """Return how the door listens; ``place`` has host, port, and the files of TLS."""
    return uvicorn.Config(
        app,
        **place,
        http=Patient,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
    )


def main() -> None:
    """Run from the supervisor."""
    die_with_parent()
    serve(open_server(Path(sys.argv[1])))


if __name__ == "__main__":
    main()

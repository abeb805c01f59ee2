"""Requests that must not pass the front door: the coordinator's and the runtime's routes, and tricks to get there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import httpx
import uvicorn
from fastapi.routing import iter_route_contexts
from flwr.superlink.main import create_app

from audits.faults import SOUND, Fault
from audits.finding import judged
from fedveil.common.findings import Finding
from fedveil.deploy import front_door
from fedveil.deploy.superlink import Receive, Scope, Send

PULL = "/v1/fleet/pull-messages"
TRICKS = (
    "POST /v1/fleet/../control/start-run",
    "POST /v1/fleet/%2e%2e/control/start-run",
    "POST /v1/fleet/..%2fcontrol/start-run",
    "POST //v1/control/start-run",
    "POST /v1/fleet//pull-messages",
    "POST /v1/fleet/pull-messages/",
    "POST /v1/fleet/pull-messages/../../control/start-run",
    "POST /v1/fleet/pull-messages;/../control",
    "POST /v1/fleet/pull-messages?x=/v1/control/start-run",
    "POST /v1/fleet/pull-messages%00",
    "POST /V1/FLEET/PULL-MESSAGES",
    "POST /v1/fleet/unknown",
    "POST /v1\\fleet\\pull-messages",
    "POST http://control/v1/control/start-run",
    "POST http://control/v1/fleet/pull-messages",
    "POST control:8000",
    "CONNECT control:8000",
    "GET /v1/fleet/pull-messages",
    "HEAD /v1/fleet/pull-messages",
    "PUT /v1/fleet/pull-messages",
    "TRACE /v1/fleet/pull-messages",
    "post /v1/fleet/pull-messages",
    "POST /health",
    "GET /health/../v1/control/start-run",
    "GET /health?x",
    "PRI *",
)
HEADERS = (
    "X-Original-URL: /v1/control/start-run",
    "X-HTTP-Method-Override: PUT",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: xchunked",
    "Content-Length: 3",
    "Expect: 100-continue",
)
"""Of a request that is allowed, with another one in its body."""
ALLOWED = {("POST", PULL)}


class Upstream:
    """Stands in the SuperLink's place and notes what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note a request and answer it."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((scope["method"], scope["raw_path"].decode(), headers, body))
        answered = [(b"content-type", b"application/protobuf"), (b"set-cookie", b"a=b"), (b"x-control", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": answered})
        await send({"type": "http.response.body", "body": b"answer"})


@contextmanager
def served(config: uvicorn.Config) -> Iterator[int]:
    """Serve a configuration on a port of 127.0.0.1, which is yielded."""
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield int(listening.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def door_before(upstream: Upstream) -> uvicorn.Config:
    """Return how a front door listens that passes requests on to ``upstream``."""
    transport = httpx.ASGITransport(app=upstream)
    return front_door.listening(front_door.front_door(transport, "https://control"))


def say(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send bytes as they are, one after the other, and return the answer until the door closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        for part in parts:
            with suppress(OSError):
                plain.sendall(part)
            time.sleep(pause)
        answer = b""
        with suppress(OSError):
            while more := plain.recv(1 << 16):
                answer += more
        return answer


def asked(line: str) -> bytes:
    """Return a whole request of this first line without a body."""
    return f"{line} HTTP/1.1\r\nHost: control\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def smuggling(header: str) -> bytes:
    """Return an allowed request with a header, whose body is a request to the coordinator's route."""
    hidden = b"0\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\nHost: control\r\nContent-Length: 0\r\n\r\n"
    lines = [f"POST {PULL} HTTP/1.1", "Host: control", header, f"Content-Length: {len(hidden)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode() + hidden


def routes_behind() -> list[str]:
    """Return method and path of every route of the installed SuperLink but those of the sites and its health."""
    lines = {
        f"{method} {getattr(one.route, 'path', '')}"
        for one in iter_route_contexts(create_app().routes)
        for method in getattr(one.route, "methods", None) or ("GET",)
    }
    own = {path.decode() for path in (*front_door.ROUTES, front_door.HEALTH)}
    return sorted(line for line in lines if line.split()[1] not in own)


def _beginning_alike() -> AbstractContextManager[Any]:
    """The door passes on whatever begins as the sites' routes do."""

    class Beginning(frozenset[bytes]):
        def __contains__(self, path: object) -> bool:
            return isinstance(path, bytes) and path.startswith(b"/v1/fleet/")

    return patch.object(front_door, "ROUTES", Beginning())


def _all_paths() -> AbstractContextManager[Any]:
    """The door passes on every path."""

    class All(frozenset[bytes]):
        def __contains__(self, _: object) -> bool:
            return True

    return patch.object(front_door, "ROUTES", All())


PREFIX = Fault("a door that looks at how a path begins", _beginning_alike)
OPEN = Fault("a door that looks at no path", _all_paths)


def audit_front_door(fault: Fault = SOUND) -> Finding:
    """Return whether anything but a site's own request reaches the SuperLink behind the door."""
    upstream, routes = Upstream(), routes_behind()
    with fault.plant(), served(door_before(upstream)) as port:
        for line in (*routes, *TRICKS):
            say(port, asked(line))
        for header in HEADERS:
            say(port, smuggling(header))
    reached = sorted({f"{method} {path}" for method, path, *_ in upstream.seen if (method, path) not in ALLOWED})
    smuggled = len(upstream.seen) > len(HEADERS)
    figures: dict[str, int | float | str] = {
        "routes of Control and Runtime tried": len(routes),
        "tricks tried": len(TRICKS) + len(HEADERS),
        "reached": ", ".join(reached[:5]) or "none",
    }
    return judged("requests at the sites' port", fault.name, bool(reached) or smuggled, figures)


def audit_front_doors() -> list[Finding]:
    """Return the findings about the door as it is, and with each fault."""
    return [audit_front_door(fault) for fault in (SOUND, PREFIX, OPEN)]

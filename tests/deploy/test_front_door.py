"""The front door of a server whose Flower speaks HTTP, attacked, and the loopback ports that know one user."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import fleet_pb2
from flwr.superlink import extensions
from flwr.superlink import main as flowers

from audits.front_door import (
    HEADERS,
    PULL,
    TRICKS,
    Upstream,
    asked,
    audit_front_doors,
    door_before,
    routes_behind,
    say,
    served,
    smuggling,
)
from fedveil.deploy import fleet, fleet_http, front_door, superlink
from fedveil.deploy.fleet_answers import Answer
from fedveil.deploy.front_door import HEALTH, ROUTES
from fedveil.deploy.node_keys import pem_of
from fedveil.deploy.road import Road
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.superlink import OwnUserAlone, Receive, Scope, Send, is_allowed, owner

NOBODY = 65534


@pytest.fixture
def serve() -> Iterator[Callable[[uvicorn.Config], int]]:
    """Return a function that serves a configuration on a port of 127.0.0.1."""
    with ExitStack() as running:
        yield lambda config: running.enter_context(served(config))


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def door(serve: Callable[[uvicorn.Config], int], upstream: Upstream) -> int:
    return serve(door_before(upstream))


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_each_method_of_the_fleet_and_its_health_pass_and_nothing_but_flowers_headers(
    door: int, upstream: Upstream
) -> None:
    methods = [method.name for method in fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods]
    named = {"/v1/fleet/" + re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower() for name in methods}
    assert {path.decode() for path in ROUTES} == named
    given = {"flwr-timestamp": "now", "authorization": "x", "cookie": "y", "x-forwarded-for": "127.0.0.1", "via": "z"}
    given |= {"flwr-task-token": "t", "flwr-superexec-signature": "s", "host": "control", "content-type": "a/b"}
    for path in sorted(named):
        found = httpx.post(f"http://127.0.0.1:{door}{path}", content=b"asked", headers=given)
        assert (found.status_code, found.content) == (200, b"answer")
        assert not {"set-cookie", "x-control", "server"} & found.headers.keys()
    assert httpx.get(f"http://127.0.0.1:{door}/health").status_code == 200
    assert [path for _, path, _, _ in upstream.seen] == [*sorted(named), HEALTH.decode()]
    for method, _, headers, body in upstream.seen[:-1]:
        assert (method, body) == ("POST", b"asked")
        assert headers.keys() & given.keys() == {"flwr-timestamp", "content-type", "host"}
        assert headers["host"] == "control"


def test_no_route_of_control_and_runtime_passes_and_a_door_that_lets_one_through_is_found() -> None:
    sound, prefix, opened = audit_front_doors()
    assert all(finding.passed for finding in (sound, prefix, opened))
    assert {"POST /v1/control/start-run", "POST /v1/runtime/pull-messages", "GET /docs"} <= set(routes_behind())


@pytest.mark.parametrize("line", [f"{method} /" for method in ("GET", "POST", "PUT", "OPTIONS")] + [*TRICKS])
def test_no_other_path_or_method_reaches_the_superlink(line: str, door: int, upstream: Upstream) -> None:
    answer = say(door, asked(line))
    assert status(answer) in (0, 400, 404, 405), answer
    assert not upstream.seen


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_moves_no_request_and_hides_none(header: str, door: int, upstream: Upstream) -> None:
    say(door, smuggling(header))
    for method, path, headers, _ in upstream.seen:
        assert (method, path) == ("POST", PULL)
        assert not {"x-original-url", "x-http-method-override", "upgrade", "http2-settings"} & headers.keys()
    assert len(upstream.seen) <= 1


def test_slow_and_huge_requests_end(door: int, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "LARGEST", 1000)
    monkeypatch.setattr(front_door, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(front_door, "HEAD_SECONDS", 0.3)
    head = f"POST {PULL} HTTP/1.1\r\nHost: x\r\n".encode()
    assert status(say(door, head + b"Content-Length: 1001\r\n\r\n")) == 413
    piece = b"200\r\n" + 512 * b"x" + b"\r\n"
    assert status(say(door, head + b"Transfer-Encoding: chunked\r\n\r\n", piece, piece, b"0\r\n\r\n")) == 413
    assert status(say(door, head + b"Content-Length: 10\r\n\r\n", b"x")) == 408
    began = time.monotonic()
    assert say(door, head) == b"", "a head that does not end holds its connection"
    assert say(door, b"") == b"", "so does one that does not begin"
    first = head + b"Content-Length: 0\r\n\r\n"
    again = say(door, first, head, pause=0.05)
    assert again.count(b"HTTP/1.1 ") == 1, "and a second one"
    assert time.monotonic() - began < 15
    assert len(upstream.seen) == 1
    assert status(say(door, b"GET /" + 200_000 * b"a")) in (0, 400, 431)


def test_a_superlink_that_does_not_answer_is_said(serve: Callable[[uvicorn.Config], int]) -> None:
    port = serve(front_door.listening(front_door.front_door(httpx.AsyncHTTPTransport(), "http://127.0.0.1:1")))
    assert httpx.post(f"http://127.0.0.1:{port}{PULL}", content=b"x").status_code == 503


STAYS = """
import encodings.idna, os, sys, socket
os.setuid(int(sys.argv[2]))
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
plain.sendall(sys.argv[3].encode().replace(b"|", b"\\r\\n"))
print(plain.getsockname()[1], plain.recv(100).partition(b"\\r\\n")[0].decode() if len(sys.argv) > 4 else "", flush=True)
sys.stdin.read()
"""


def dial(port: int, user: int, said: str = "", *more: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Dial a port as a user, say something, and stay; return what it printed."""
    words = [sys.executable, "-c", STAYS, str(port), str(user), said, *more]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().split(maxsplit=1)


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("FEDVEIL_CI"), reason="only root can play another user")
def test_the_kernel_says_whose_a_connection_is_and_one_that_was_closed_is_nobodys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = listening.getsockname()
        listening.settimeout(20)
        for user in (os.getuid(), NOBODY):
            process, _ = dial(place[1], user)
            accepted, peer = listening.accept()
            assert owner(peer, place) == user
            assert is_allowed(peer, place) == (user == os.getuid())
            process.communicate()
            deadline = time.monotonic() + 10
            while owner(peer, place) is not None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert owner(peer, place) is None, "of a closed socket the kernel says that it is root's"
            accepted.close()
    assert is_allowed(("10.0.0.9", 40000), ("10.0.0.1", 8000)), "who dials another address comes from elsewhere"
    assert not is_allowed(None, ("127.0.0.1", 8000))
    assert not is_allowed(("127.0.0.1", 1), None)


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("FEDVEIL_CI"), reason="only root can play another user")
def test_another_user_of_the_machine_is_refused_whatever_its_headers_say(
    serve: Callable[[uvicorn.Config], int], upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "folder", "--insecure"])
    monkeypatch.setattr(superlink, "IS_HTTP", False)
    monkeypatch.setattr("flwr.superlink.cli.flower_superlink", lambda: None)
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    superlink.main()
    outermost = flowers._get_middleware()[0]
    assert outermost.cls is OwnUserAlone, "this Flower does not take the middleware"
    assert sys.argv == ["flower-superlink", "--insecure"]
    port = serve(uvicorn.Config(OwnUserAlone(upstream), log_level="warning", ws="none", lifespan="off"))
    asked = "GET / HTTP/1.1|Host: x|X-Forwarded-For: 8.8.8.8|X-Forwarded-Proto: https||"
    for user, answer in ((NOBODY, "HTTP/1.1 403 Forbidden"), (os.getuid(), "HTTP/1.1 200 OK")):
        process, (_, said) = dial(port, user, asked, "and hear")
        assert said.strip() == answer
        process.communicate()
    assert len(upstream.seen) == 1


def test_a_program_that_ends_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(superlink, "AGAIN_SECONDS", 0.01)

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        if len(started) == 3:
            threading.Event().wait()  # a program that runs on, in a thread that ends with the tests
        return subprocess.CompletedProcess(command, 9)

    monkeypatch.setattr(superlink.subprocess, "run", run)
    superlink.keep_running(["door"])
    deadline = time.monotonic() + 10
    while len(started) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == [["door"]] * 3
    assert "the front door ended with 9 and is started again" in capfd.readouterr().err


ANSWERS = [
    (400, {"code": 2003, "detail": "Invalid heartbeat interval."}, 0, Answer.REGISTERED),
    (412, {"code": 2004, "detail": "Failed to activate SuperNode."}, 0, Answer.UNKNOWN_KEY),
    (412, {"code": 2001, "detail": "SuperNode authentication is enabled."}, 0, Answer.UNKNOWN_KEY),
    (401, {"detail": "Invalid SuperNode authentication"}, 0, Answer.OTHER),
    (401, {"detail": "Invalid SuperNode authentication"}, 1000, Answer.CLOCK),
    (401, {"detail": "Invalid SuperNode authentication"}, -1000, Answer.CLOCK),
    (503, None, 0, Answer.UNREACHABLE),
    (404, None, 0, Answer.OTHER),
    (200, None, 0, Answer.OTHER),
]


@pytest.mark.parametrize(("code", "told", "ahead", "answer"), ANSWERS)
def test_a_site_understands_what_a_server_answers_by_http(
    code: int,
    told: Any,
    ahead: int,
    answer: Answer,
    serve: Callable[[uvicorn.Config], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope)
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True).encode()
        await send({"type": "http.response.start", "status": code, "headers": [(b"date", date)]})
        await send({"type": "http.response.body", "body": b"" if told is None else json.dumps(told).encode()})

    folder = make_server(tmp_path / "server", ["127.0.0.1"])
    keys = {"ssl_keyfile": str(folder.path / "server.key"), "ssl_certfile": str(folder.path / "server.pem")}
    port = serve(uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", date_header=False, **keys))
    monkeypatch.setattr(fleet, "_calls", fleet_http.calls)
    authority, key = (folder.path / "ca.crt").read_bytes(), ec.generate_private_key(ec.SECP384R1())
    assert fleet.ask_to_join(f"127.0.0.1:{port}", authority, key, Road()).answer is answer
    demands = False if code == 200 else True if told and told.get("code") == 2001 else None
    assert fleet.asks_for_keys(f"127.0.0.1:{port}", authority) is demands
    head = dict(asked[0]["headers"])
    assert asked[0]["raw_path"] == b"/v1/fleet/activate-node"
    assert b64decode(head[b"flwr-public-key"]) == pem_of(key)
    signed = b64decode(head[b"flwr-signature"])
    key.public_key().verify(signed, head[b"flwr-timestamp"], ec.ECDSA(hashes.SHA256()))
    paths = [scope["raw_path"].rpartition(b"/")[2] for scope in asked[1:]]
    assert paths == [b"register-node", *([b"unregister-node"] if code == 200 else [])], "a key is left there"

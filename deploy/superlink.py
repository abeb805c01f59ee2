"""Flower's SuperLink, whose loopback ports answer its own user alone, and the front door of one that speaks HTTP.

Control and Runtime API have no login. What comes in on the loopback is some program of this machine, and the kernel
says whose. Run as ``python -P -m fedveil.deploy.superlink FOLDER``, followed by the words of ``flower-superlink``.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from fedveil.common.parent import die_with_parent
from fedveil.deploy.commands import own_module
from fedveil.deploy.transport import IS_HTTP

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED, ROOT = "01", 0
AGAIN_SECONDS = 1.0
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class OwnUserAlone:
    """ASGI middleware that refuses what another user of this machine sends to a loopback address."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403; what is no HTTP is closed, as a WebSocket is."""
        if scope["type"] == "lifespan" or is_allowed(scope.get("client"), scope.get("server")):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"another user of this machine"})
        else:
            await send({"type": "websocket.close"})


def is_allowed(client: tuple[str, int] | None, server: tuple[str, int | None] | None) -> bool:
    """Return whether a connection is of this process's user or root, or comes from elsewhere by another address.

    Args:
        client, server: both ends, as the listening socket has them.
    """
    if server is None or server[1] is None:
        return False
    if not _address(server[0]).is_loopback or not TABLES[0].is_file():
        return True
    return client is not None and owner(client, (server[0], server[1])) in (os.getuid(), ROOT)


def owner(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Return the user whose open socket ``client`` is; None: nobody's. One that was closed counts as nobody's."""
    ends = {(local, remote) for local in _forms(*client) for remote in _forms(*server)}
    for table in TABLES:
        for line in table.read_text(encoding="ascii").splitlines()[1:] if table.is_file() else ():
            row = line.split()
            # Of a socket that waits for its end the kernel says that it is root's.
            if (row[1], row[2]) in ends and row[3] == ESTABLISHED and row[9] != "0":
                return int(row[7])
    return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(host.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


def _forms(host: str, port: int) -> Iterator[str]:
    """Yield an end of a connection as the kernel's tables write it.

    >>> list(_forms("127.0.0.1", 8000))
    ['0100007F:1F40', '0000000000000000FFFF00000100007F:1F40']
    """
    address = _address(host)
    packed = address.packed
    words = "".join(packed[i : i + 4][::-1].hex().upper() for i in range(0, len(packed), 4))
    yield f"{words}:{port:04X}"
    if address.version == 4:
        yield f"0000000000000000FFFF0000{words}:{port:04X}"


def keep_running(command: list[str]) -> None:
    """Run a program for as long as this one lives, and start it again whenever it ends."""

    def run() -> None:
        while True:
            began = time.monotonic()
            ended = subprocess.run(command, check=False, preexec_fn=die_with_parent).returncode
            print(f"the front door ended with {ended} and is started again", file=sys.stderr, flush=True)
            time.sleep(0.0 if time.monotonic() - began > AGAIN_SECONDS else AGAIN_SECONDS)

    threading.Thread(target=run, daemon=True).start()


def main() -> None:
    """Run Flower's own command with the middleware outermost."""
    folder = sys.argv.pop(1)
    if IS_HTTP:
        keep_running([*own_module("fedveil.deploy.front_door"), folder])
    # Behind no proxy: a header would otherwise say where a request comes from.
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    before = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(OwnUserAlone), *before())
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()

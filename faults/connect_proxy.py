"""An HTTP proxy for tests and faults that opens ways by CONNECT, or refuses them, or opens the TLS within.

As a process of its own: ``python -P -m faults.connect_proxy PORT HOST:PORT``.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ConnectProxy:
    """A proxy on a port of 127.0.0.1; it resolves the names that ``places`` has, and no other."""

    places: Mapping[str, int]
    """Port on 127.0.0.1 of each HOST:PORT."""
    reached: str = "127.0.0.1"
    """Where those ports are, if elsewhere."""
    answer: bytes = b"HTTP/1.1 200 Connection established"
    """To a CONNECT; all but a 200 ends it."""
    inspects: ssl.SSLContext | None = None
    """With whose certificate it ends TLS itself."""
    heads: list[str] = field(default_factory=list)
    """What was asked of it."""
    port: int = 0

    def serve(self, listening: socket.socket) -> None:
        """Answer until the listening socket is closed."""
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(1) or b"\r\n\r\n"
            self.heads.append(head.decode())
            near.sendall(self.answer + b"\r\n\r\n")
            if b" 200 " not in self.answer:
                return
            if self.inspects:
                self.inspects.wrap_socket(near, server_side=True).close()
                return
            with socket.create_connection((self.reached, self.places[head.decode().split()[1]])) as far:
                back = threading.Thread(target=_copy, args=(far, near), daemon=True)
                back.start()
                _copy(near, far)
                back.join()


def _copy(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
    with suppress(OSError):
        to.shutdown(socket.SHUT_WR)


@contextmanager
def connect_proxy(places: Mapping[str, int], **given: object) -> Iterator[ConnectProxy]:
    """Serve a proxy within."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = ConnectProxy(places, **given)  # type: ignore[arg-type]
        proxy.port = int(listening.getsockname()[1])
        threading.Thread(target=proxy.serve, args=(listening,), daemon=True).start()
        yield proxy
        listening.shutdown(socket.SHUT_RDWR)


def ending_tls(folder: Path) -> ssl.SSLContext:
    """Return a server's side of TLS by the certificate of a server's folder."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def main() -> None:
    """Serve until the process is killed."""
    port, server = sys.argv[1:]
    host, _, behind = server.rpartition(":")
    with socket.create_server(("127.0.0.1", int(port))) as listening:
        ConnectProxy({server: int(behind)}, host).serve(listening)


if __name__ == "__main__":
    main()

"""Ports: what is one, which of this machine are free, and how one is dialled."""

from __future__ import annotations

import socket

from fedveil.common.errors import ConfigError

LARGEST = 65535


def check_port(what: str, port: int) -> None:
    """Raise ConfigError unless ``port`` is the number of a TCP port; ``what`` names it."""
    if not 1 <= port <= LARGEST:
        raise ConfigError(f"{what} must be from 1 to {LARGEST}, not {port}")


def dialled(host: str, port: int) -> str:
    """Return host and port as programs dial them, an address of IPv6 in brackets.

    >>> dialled("fl.example.org", 9092), dialled("::1", 8000)
    ('fl.example.org:9092', '[::1]:8000')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_ports(count: int) -> list[int]:
    """Return ``count`` different TCP ports of 127.0.0.1 that are free now; another process may take one."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

"""Road from a site to its server: straight, or through a proxy that is asked by HTTP CONNECT.

Which it is, is decided here and nowhere else. The SuperNode's libraries read other variables in other orders, and go
straight where they cannot read one: so they get either one address that was checked here, or none.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from fedveil.common.errors import ConfigError
from fedveil.common.ports import dialled

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""That may name the proxy, in the order in which gRPC reads them."""
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
READ_ELSEWHERE = ("all_proxy", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")
"""Of other libraries; a SuperNode does without them."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Where node and worker meet, past every proxy."""
LONGEST_HEAD = 1 << 16
"""Bytes of a proxy's answer that are read for its end."""


class ProxyRefusal(Exception):
    """The proxy opens no way to the server; the words say why, and what to do."""


@dataclass(frozen=True)
class Proxy:
    """A proxy that is asked by HTTP CONNECT."""

    host: str
    port: int
    url: str = field(repr=False)
    """As the SuperNode's libraries take it."""
    login: str = field(repr=False, default="")
    """``USER:PASSWORD``; empty: none."""

    def __str__(self) -> str:
        return dialled(self.host, self.port)


@dataclass(frozen=True)
class Road:
    """How a server is dialled."""

    proxy: Proxy | None = None
    """None: straight."""
    source: str = "no proxy is named"
    """What names the proxy; or why there is none."""

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return an environment in which every library takes this road to the server, and none to the own machine."""
        others = {k: v for k, v in given.items() if k not in (*VARIABLES, *EXCEPTIONS, *READ_ELSEWHERE)}
        chosen = {"https_proxy": self.proxy.url} if self.proxy else {}
        return past_proxies({**others, **chosen})

    @property
    def channel_options(self) -> tuple[tuple[str, str | int], ...]:
        """What lets a gRPC channel of this process take the road."""
        return (("grpc.http_proxy", self.proxy.url),) if self.proxy else (("grpc.enable_http_proxy", 0),)

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """Return a connection to the server's port; a name is resolved by the proxy, where there is one.

        Raises:
            ProxyRefusal: the proxy does not answer, or opens no way there.
            OSError: there is no proxy, and no connection either.
        """
        if self.proxy is None:
            return socket.create_connection((host, port), timeout=seconds)
        try:
            plain = socket.create_connection((self.proxy.host, self.proxy.port), timeout=seconds)
        except OSError as error:
            why = error.strerror or error
            raise ProxyRefusal(f"the proxy {self.proxy} does not answer ({why}): compare {self.source}") from error
        try:
            self._ask(plain, self.proxy, dialled(host, port))
        except BaseException:
            plain.close()
            raise
        return plain

    def _ask(self, plain: socket.socket, proxy: Proxy, server: str) -> None:
        login = base64.b64encode(proxy.login.encode()).decode()
        lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
        lines += [f"Proxy-Authorization: Basic {login}"] if proxy.login else []
        head = b""
        try:
            plain.sendall("\r\n".join([*lines, "", ""]).encode())
            while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
                # One byte at a time: what follows the answer is the server's.
                if not (more := plain.recv(1)):
                    break
                head += more
        except OSError as error:
            raise ProxyRefusal(f"the proxy {proxy} does not answer a CONNECT ({error.strerror or error})") from error
        version, _, rest = head.partition(b" ")
        code = int(rest[:3]) if version.startswith(b"HTTP/1.") and rest[:3].isdigit() else 0
        if code // 100 != 2:
            raise ProxyRefusal(_refusal(proxy, server, code, self.source))


def past_proxies(given: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which programs of this machine meet past every proxy, and all else is as it was."""
    return {**given, "no_proxy": ",".join([*filter(None, [given.get("no_proxy") or given.get("NO_PROXY")]), *LOOPBACK])}


def _refusal(proxy: Proxy, server: str, code: int, source: str) -> str:
    named = f"{code} {HTTPStatus(code).phrase}" if code in {*HTTPStatus} else str(code)
    if not code:
        return f"what listens at {proxy} does not answer as an HTTP proxy: compare {source}"
    if code == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        wanted = "refuses user and password" if proxy.login else "wants user and password"
        return f"the proxy {proxy} {wanted} ({named}): write http://USER:PASSWORD@HOST:PORT in {source}"
    if code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"the proxy {proxy} cannot reach {server} ({named}): is it running, and does the proxy know its name?"
    return f"the proxy {proxy} does not let this site out to {server} ({named}): have it allow that address"


def road_to(host: str, file: Path, proxy: str, exceptions: str, environment: Mapping[str, str] = os.environ) -> Road:
    """Return the road to a server.

    Args:
        host: of the server.
        file, proxy, exceptions: ``site.toml``, and its ``https-proxy`` and ``no-proxy``.
        environment: where ``https_proxy`` is read if the file names none, and more exceptions as ``no_proxy``.

    Raises:
        ConfigError: the proxy's address is none, or holds a password that others can read; its text is not shown.
    """
    named = next((name for name in VARIABLES if environment.get(name)), "")
    source = f"https-proxy in {file}" if proxy else f"the variable {named}"
    if not proxy and not named:
        return Road()
    if _is_loopback(host):
        return Road(source="the own machine is dialled past every proxy")
    entries = ",".join([exceptions, *(environment.get(name, "") for name in EXCEPTIONS)]).split(",")
    if entry := next((entry.strip() for entry in entries if _is_exception(host, entry.strip())), ""):
        return Road(source=f"{entry} is excepted from the proxy")
    found = _parsed(proxy or environment[named], source)
    if proxy and found.login and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigError(f"{file} holds the proxy's password and others can read it: chmod 600 {file}")
    return Road(found, source)


def _parsed(text: str, source: str) -> Proxy:
    """Return what a proxy's address names; its text may hold a password, and no message shows it."""
    wrong = ConfigError(f"{source} is no proxy's address: write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT")
    try:
        parts: SplitResult = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # its words quote the text
        raise wrong from None
    login = unquote(parts.netloc.rpartition("@")[0])
    if parts.scheme != "http" or not host or not port or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise wrong
    if "@" in login or not (login.isascii() and login.isprintable()):
        raise ConfigError(f"{source}: user and password may hold no '@' and nothing but ASCII, as gRPC reads them")
    return Proxy(host, port, text, login)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_exception(host: str, entry: str) -> bool:
    """Return whether a host is one of an entry of ``no_proxy``: a name, a domain, an address or a network.

    >>> [_is_exception("fl.example.org", entry) for entry in ("example.org", ".Example.org", "*", "ample.org", "")]
    [True, True, True, False, False]
    >>> _is_exception("10.1.2.3", "10.0.0.0/8"), _is_exception("10.1.2.3", "2.3")
    (True, False)
    """
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name, domain = host.lower(), entry.lower().removeprefix("*").removeprefix(".")
        return bool(domain) and (name == domain or name.endswith(f".{domain}"))
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False

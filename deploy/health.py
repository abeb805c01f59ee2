"""A quick check that a server's or a site's programs do their work, for ``fedveil doctor --health`` and probes.

A probe runs every few seconds: this imports little, opens no record and no model, and changes nothing.
"""

from __future__ import annotations

import os
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.ports import dialled
from fedveil.deploy.check_results import CheckResult
from fedveil.deploy.road import ProxyRefusal, Road, road_to

PATIENCE = 5.0
"""Seconds that one connection may take."""


def examine_health(path: Path) -> Iterator[CheckResult]:
    """Say whether a server's ports answer with its certificate, or a site's node runs and its server answers."""
    folder = expanded(path).absolute()
    file = next((folder / name for name in ("server.toml", "site.toml") if (folder / name).is_file()), None)
    try:
        if file is None:
            raise ConfigError(f"{folder} has no server.toml and no site.toml")
        known = tomllib.loads(file.read_text(encoding="utf-8"))
        yield from (_server if file.name == "server.toml" else _site)(folder, known)
    except (ConfigError, OSError, KeyError, ValueError) as error:
        yield CheckResult(False, "health", f"{error}; 'fedveil doctor {folder}' says more")


def _server(folder: Path, known: Mapping[str, Any]) -> Iterator[CheckResult]:
    fleet, control = str(known["fleet"]).rpartition(":")[2], (str(known["control-host"]), int(known["control-port"]))
    yield _answer("Fleet port", folder, "127.0.0.1", int(fleet), Road())
    yield _answer("Control port", folder, *control, Road())


def _site(folder: Path, known: Mapping[str, Any]) -> Iterator[CheckResult]:
    runs = has_process(secret_of(folder, str(known["site"])))
    yield CheckResult(runs, "node", "it runs" if runs else "it does not run: see what 'fedveil site start' says")
    host, _, port = str(known["server"]).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    proxy, past = (str(known.get(key, "")) for key in ("https-proxy", "no-proxy"))
    road = road_to(host, folder / "site.toml", proxy, past)
    yield _answer("server", folder, host, int(port), road)


def _answer(what: str, folder: Path, host: str, port: int, road: Road) -> CheckResult:
    context, address = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), dialled(host, port)
    context.load_verify_locations(folder / "ca.crt")
    try:
        with road.connect(host, port, PATIENCE) as plain, context.wrap_socket(plain, server_hostname=host):
            return CheckResult(True, what, f"{address} shows a certificate of the authority")
    except (OSError, ProxyRefusal) as error:
        return CheckResult(False, what, f"{address}: {error}; 'fedveil doctor {folder}' says more")


def secret_of(folder: Path, site: str) -> Path:
    """Return the file by which a site's worker proves itself to its SuperNode; new at every start."""
    return flower_home(folder) / f"{site}.secret"


def flower_home(folder: Path) -> Path:
    """Return Flower's own folder: FLWR_HOME if it is set (a container's folders are read-only)."""
    return Path(os.environ.get("FLWR_HOME") or folder / "flwr")


def has_process(secret: Path) -> bool:
    """Return whether a process of this machine was started with a site's secret, as its SuperNode and worker are."""
    named = str(secret).encode()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile, or another user's
            if named in command.read_bytes().split(b"\0"):
                return True
    return False

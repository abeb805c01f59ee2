"""Faults of what stands between a site and the server: a proxy that restarts, and the front door, killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from faults.checks import Expected, examine
from faults.faulty_site import AFTER
from faults.federation import PATIENCE, SIZES, Federation
from faults.network import Cable
from faults.processes import wait_until
from faults.scenarios import RECONNECTED
from fedveil.common.findings import Finding
from fedveil.common.ports import free_ports
from fedveil.deploy.commands import own_module
from fedveil.deploy.transport import IS_HTTP

ALL = Expected(tuple(SIZES))
GROUP, DOOR = "between site and server", "fedveil.deploy.front_door"
AWAY_SECONDS = 5.0


def proxy_restarts(federation: Federation, cable: Cable, deadline: float) -> Iterator[Finding]:
    """Let the lab reach the server through a proxy alone, which is killed while its reply is due."""
    (port,), address = free_ports(1), federation.sites["lab"].host
    server = f"{cable.address}:{federation.server.fleet_port}"
    command = [*own_module("faults.connect_proxy"), str(port), server]
    federation.processes.start("proxy", command, federation.own_environment())
    _lead_lab(federation, cable.address, f"127.0.0.1:{port}")
    federation.plan.write({"lab": {1: AFTER}})
    run = federation.submit(rounds=2, round_timeout=max(deadline, RECONNECTED), min_sites=len(SIZES))
    federation.wait_held("lab", 1)
    federation.processes.kill("proxy")
    federation.plan.free("lab", 1)
    time.sleep(AWAY_SECONDS)
    federation.processes.start("proxy", command, federation.own_environment())
    run.result()
    yield examine(federation, run, 1, f"its proxy gone for {AWAY_SECONDS:g} seconds", ALL, GROUP)
    yield examine(federation, run, 2, "the round after it", ALL, GROUP)
    _lead_lab(federation, address)
    federation.processes.kill("proxy")


def _lead_lab(federation: Federation, address: str, proxy: str = "") -> None:
    federation.processes.kill("lab")
    federation.lead("lab", address, proxy)
    federation.start_site("lab")
    federation.wait_online("lab", restart=True)


def door_killed(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill the front door while replies are due; by gRPC there is none, and nothing is played."""
    if not IS_HTTP:
        return
    federation.plan.write({site: {1: AFTER} for site in SIZES})
    run = federation.submit(rounds=2, round_timeout=max(deadline, RECONNECTED), min_sites=len(SIZES))
    for site in SIZES:
        federation.wait_held(site, 1)
    (door,) = _doors(federation)
    os.kill(door, signal.SIGKILL)
    for site in SIZES:
        federation.plan.free(site, 1)
    back = wait_until(lambda: _doors(federation) not in ([], [door]), "another front door", PATIENCE)
    run.result()
    more = {"seconds until another stood there": round(back, 1)}
    yield examine(federation, run, 1, "the front door killed", ALL, GROUP, more=more)
    yield examine(federation, run, 2, "the round after that", ALL, GROUP)


def _doors(federation: Federation) -> list[int]:
    """Return the process of the server's front door, in a list."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if DOOR.encode() in words and str(federation.server.path).encode() in words:
                found.append(int(process.name))
    return found

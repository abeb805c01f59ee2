"""The file ``server.json`` of a run's folder: the server's code, connections and machine at each start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedveil.common.run_lines import RunFile


@dataclass(frozen=True)
class CheckLine:
    """One line of the server's own check, as ``fedveil doctor`` has it."""

    ok: bool
    what: str
    found: str
    """What was found; where it is not well, also what to do."""


@dataclass(frozen=True)
class OwnCheck:
    """What a server found of itself when a run began or went on."""

    named: bool = False
    """Whether the SuperLink says which folder it was started from. If not, of TLS and keys nothing is known."""
    tls: bool | None = None
    """Whether the port that sites dial took a TLS handshake; None: not known."""
    certificate: str = ""
    """SHA-256 fingerprint of the certificate that this port showed; empty: not known."""
    keys: bool | None = None
    """Whether this port turned away an unregistered key; None: not known."""
    checks: list[CheckLine] = field(default_factory=list)


Reach = Literal["network", "simulation", "one process"]
"""How sites are reached; only in the first case does anything go over a network."""
ENGINES: dict[Reach, str] = {
    "network": "Flower, with sites over a network",
    "simulation": "Flower's simulation, with sites in processes of their own",
    "one process": "in process, without Flower: one process for server and sites",
}
"""What conducts a run, in words."""


@dataclass(frozen=True)
class ServerStart:
    """One start of a run's server."""

    began: str
    """UTC, ISO 8601."""
    bundle: str
    """SHA-256 of the server's code, as ``fedveil bundle`` prints it."""
    reach: Reach
    """How sites are reached."""
    check: OwnCheck
    system_entropy: bool = True
    """Whether private randomness came from the operating system; False: from a test's source."""
    fresh_ledgers: bool = False
    """Whether all ledgers are this run's own and began empty, as a simulation's that names none."""
    registered: list[str] = field(default_factory=list)
    """Rows of user code in this process, such as ``strategy 'mine'``, which no version of FedVeil has."""


@dataclass(frozen=True)
class ServerFile(RunFile):
    """What the server knew of its code, its connections and its machine, at each start of the run."""

    NAME: ClassVar[str] = "server.json"
    starts: list[ServerStart]

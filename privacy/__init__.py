"""Privacy mechanisms, sampling, noise and accounting: every claim rests on this folder.

A mechanism is an axis of its own, chosen by ``privacy.mode``: one file and one row of ``MECHANISMS``. What a release
costs is a row of ``privacy.events.EVENTS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedveil.privacy.claim import Claim
from fedveil.privacy.client_level import ClientLevel
from fedveil.privacy.mechanism import Mechanism
from fedveil.privacy.no_privacy import NoPrivacy
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.shared_noise import SecureSum
from fedveil.privacy.units import RECORD, UNITS, Unit

MECHANISMS: dict[str, Mechanism] = {row.name: row for row in (DPSGD(), SecureSum(), ClientLevel(), NoPrivacy())}

__all__ = [
    "MECHANISMS",
    "UNITS",
    "Mechanism",
    "Unit",
    "mechanism_of",
    "promise_of",
    "promising",
    "sharing_noise",
    "trusting_the_server",
]


def promising(names: Iterable[str] | None = None) -> list[str]:
    """Return those of the named rows that promise something; None: of all rows."""
    return [name for name in _known(names) if MECHANISMS[name].claims]


def sharing_noise(names: Iterable[str] | None = None) -> list[str]:
    """Return those of the named rows in which sites share the noise of a sum; None: of all rows."""
    return [name for name in _known(names) if MECHANISMS[name].summed]


def trusting_the_server(names: Iterable[str] | None = None) -> list[str]:
    """Return those of the named rows in which no record is protected from the server; None: of all rows."""
    return [name for name in _known(names) if MECHANISMS[name].central]


def _known(names: Iterable[str] | None) -> Iterable[str]:
    return MECHANISMS if names is None else (name for name in names if name in MECHANISMS)


def promise_of(settings: Mapping[str, str | int | float | bool]) -> Claim | None:
    """Return what a run with these flat settings promises; None: nothing, or nothing that this version knows."""
    row = mechanism_of(settings)
    return row.claim if row and row.claims else None


def mechanism_of(settings: Mapping[str, str | int | float | bool]) -> Mechanism | None:
    """Return what a run with these flat settings promises by; None if this version knows no such row or unit."""
    row = MECHANISMS.get(str(settings.get("privacy.mode", "none")))
    unit = UNITS.get(str(settings.get("privacy.unit", RECORD.name)))
    if row is None or unit is None or (row.claims and unit not in row.units):
        return None
    return row.of_unit(unit.name)

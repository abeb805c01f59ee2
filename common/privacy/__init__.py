"""The privacy room: mechanisms, accounting and plans. All claims rest on what is in here.

A mechanism is an axis of its own, chosen by ``privacy.mode``: one file and one row of ``MECHANISMS``. What a release
costs is a row of ``common.privacy.events.EVENTS``.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.privacy.client_level import ClientLevel
from common.privacy.mechanism import Mechanism
from common.privacy.no_privacy import NoPrivacy
from common.privacy.record_level import DPSGD
from common.privacy.shared_noise import SecureSum
from common.privacy.units import RECORD, UNITS, Unit

MECHANISMS: dict[str, Mechanism] = {row.name: row for row in (DPSGD(), SecureSum(), ClientLevel(), NoPrivacy())}

__all__ = ["MECHANISMS", "UNITS", "Mechanism", "Unit", "mechanism_of"]


def mechanism_of(settings: Mapping[str, str | int | float | bool]) -> Mechanism | None:
    """Return what a run with these flat settings promises by; None if this version knows no such row or unit."""
    row = MECHANISMS.get(str(settings.get("privacy.mode", "none")))
    unit = UNITS.get(str(settings.get("privacy.unit", RECORD.name)))
    if row is None or unit is None or (row.claims and unit not in row.units):
        return None
    return row.of_unit(unit.name)

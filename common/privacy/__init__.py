"""The privacy room: mechanisms, accounting and plans. All claims rest on what is in here.

A mechanism is an axis of its own, chosen by ``privacy.mode``: one file and one row of ``MECHANISMS``. What a release
costs is a row of ``common.privacy.events.EVENTS``.
"""

from __future__ import annotations

from common.privacy.mechanism import Mechanism
from common.privacy.no_privacy import NoPrivacy
from common.privacy.record_level import DPSGD
from common.privacy.shared_noise import SecureSum

MECHANISMS: dict[str, Mechanism] = {row.name: row for row in (DPSGD(), SecureSum(), NoPrivacy())}

__all__ = ["MECHANISMS", "Mechanism"]

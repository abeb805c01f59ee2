"""The time of a site's answer: as soon as it is there, or a fixed time after the task, which says nothing of records.

How long a round takes follows from how many records were drawn and how long they are; one long record can be
nearly all of it. With ``reply-after`` in the policy an answer leaves at a fixed time. What follows from no record
postpones that time (``Deadline.extended``). The seconds themselves are divided by the policy alone, so that a server
cannot choose its figures to learn how long the records took:

======= ============================================================================================================
``1/8`` reading, preparing, hashing and looking up the records; more is refused before the charge
``3/4`` the round; a run that may take more, by the worst that the rehearsal makes likely, is refused before the charge
``1/8`` in reserve, for the ledger's rows: of the charge, and of a round that has failed
======= ============================================================================================================

A round that is not done in time all the same sends noise, as one that fails does.

Python's garbage collector visits every live object, and takes the longer the more records there are. It runs while
the time of the answer runs, and at no other time visits what was there before.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedveil.common.errors import PolicyRefusal

PREPARED = 1 / 8
"""Share of ``reply-after`` that the site's records may take before they are paid for."""
TRAINED = 3 / 4
"""Share of it that a round may take. The rest is the reserve."""
log = logging.getLogger("fedveil.site")


class TooLate(Exception):
    """The round would not be answered at the time that the policy sets."""


@dataclass
class Deadline:
    """The time of the answer to one task."""

    seconds: float = 0.0
    """From the task's arrival; 0: as soon as the answer is there."""
    began: float = field(default_factory=time.monotonic)
    reserve: float = 0.0
    """Seconds that a step needs to be left when it begins a pass; see ``Timing.reserve``."""
    _round_ends: float = field(init=False)
    """Seconds after ``began`` by which a round is done."""

    def __post_init__(self) -> None:
        self._round_ends = self.seconds
        if self.seconds:
            gc.unfreeze()

    def allow(self, worst: float, reserve: float) -> None:
        """Raise PolicyRefusal if a round might not be done in time, and keep its reserve.

        Both follow from public figures and the rehearsal alone. How long the records took so far is no part of it: a
        server could choose steps and rate so that the refusal tells.

        Args:
            worst: seconds that the round may take; infinite: that is not known.
            reserve: those of them that a step needs to be left when it begins a pass.
        """
        room = TRAINED * self.seconds
        if self.seconds and room < worst:
            takes = "how long a round of this run takes is not known"
            if math.isfinite(worst):
                takes = (
                    f"by made-up records a round of this run may take {worst:.1f} seconds here: it needs fewer steps, "
                    "a lower sample rate or shorter records"
                )
            raise PolicyRefusal(
                f"the site's policy has reply-after = {self.seconds:g}, of which a round has {room:g} seconds; {takes}"
            )
        self.reserve = reserve

    @contextmanager
    def extended(self) -> Iterator[None]:
        """Answer later by as long as this takes: what follows from no record, such as building a model or a price."""
        began, collects = time.monotonic(), bool(self.seconds) and gc.isenabled()
        if collects:
            gc.disable()
        try:
            yield
        finally:
            self.began += time.monotonic() - began
            if collects:
                gc.enable()

    def check_prepared(self) -> None:
        """Raise PolicyRefusal if the records took longer than their share so far, which the steward alone chooses."""
        room = PREPARED * self.seconds
        if self.seconds and time.monotonic() - self.began > room:
            raise PolicyRefusal(
                f"the site's policy has reply-after = {self.seconds:g}, of which its records have {room:g} seconds to "
                "be read, prepared and hashed, and they took longer: the site's steward must raise it"
            )

    def begin_round(self) -> None:
        """Let the round's share begin: its charge is on disk."""
        self._round_ends = min(self.seconds, time.monotonic() - self.began + TRAINED * self.seconds)

    def check(self) -> None:
        """Raise TooLate if a pass that began now might not end in time for an answer."""
        if self.seconds and time.monotonic() - self.began > self._round_ends - self.reserve:
            raise TooLate

    def left(self) -> float:
        """Return the seconds, at least 0, until the answer leaves; infinite if it leaves as soon as it can."""
        return max(0.0, self.began + self.seconds - time.monotonic()) if self.seconds else math.inf

    def wait(self) -> None:
        """Return when the answer may leave; until the next task's time runs, no live object is visited."""
        if self.seconds:
            gc.freeze()  # before the sleep: another thread's garbage would have it end late
        left = self.began + self.seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif self.seconds:
            log.error("answered %.1f seconds after reply-after: when, is not covered by the claim", -left)

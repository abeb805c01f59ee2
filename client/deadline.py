"""The time of a site's answer: as soon as it is there, or a fixed time after the task, which says nothing of records.

How long a round takes follows from how many records were drawn and how long they are; one long record can be
nearly all of it. With ``reply-after`` in the policy an answer leaves at a fixed time. What follows from no record
postpones that time (``Deadline.extended``). The seconds themselves are divided by the policy alone, so that a server
cannot choose its figures to learn how long the records took:

======== ============================================================================================================
``1/8``  reading, preparing, hashing and looking up the records; more is refused before the charge
``1/16`` writing the charge down
``3/4``  the round; a run that may take more, by the worst that the rehearsal makes likely, is refused before the charge
``1/16`` writing down that a round has failed
======== ============================================================================================================

A round that is not done in time all the same sends noise, as one that fails does.

Python's collector of garbage goes over all that is held, and takes the longer the more records there are. It runs while
the time of the answer runs, and else goes over nothing that was there before.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedveil.common.errors import PolicyRefusal

PREPARED = 1 / 8
"""Share of ``reply-after`` that the site's records may take before they are paid for."""
TRAINED = 3 / 4
"""Share of it that a round may take."""
NOTED = 1 / 16
"""Share of it that the ledger's row of a charge, and that of a failure, may take."""
MORE = 1e-9
"""Chance that a step draws more records than a round has time for."""
log = logging.getLogger("fedveil.site")


class TooLate(Exception):
    """The round would not be answered at the time that the policy sets."""


def most_drawn(expected: float) -> int:
    """Return a number of records that a Poisson sample of so many ``expected`` ones passes with a chance of ``MORE``.

    Bernstein's inequality: the sample is a sum of independent zeros and ones, whose variance is at most its mean.

    >>> most_drawn(1.0), most_drawn(25.0), most_drawn(2000.0)
    (17, 64, 2294)
    """
    bits = -math.log(MORE)
    return math.floor(expected + bits / 3 + math.sqrt(bits**2 / 9 + 2 * bits * expected))


@dataclass(frozen=True)
class Timing:
    """Seconds that the rehearsal took, on records that are no one's."""

    passes: Mapping[int, float]
    """Of one full pass, its clip included, by its length."""
    rows: Mapping[int, int]
    """Records of such a pass."""
    empty: float
    """Of a step on no record: its noise."""
    score: float
    """Of scoring one record of the greatest length."""

    def worst(self, steps: int, batch: float, scored: int, each: int = 1, at_once: int = sys.maxsize) -> float:
        """Return the seconds of a round that draws the most records, of the slowest lengths, with ``reserve`` in hand.

        Every length that occurs costs a pass, however few records of it there are, anew for every so many units as
        pass together. Any other record costs its row of a pass at most. With the reserve no pass of such a round is
        given up.

        Args:
            steps: private steps.
            batch: expected units of a step, by the public size.
            scored: records that are scored for a noised count, by the public size.
            each: most records of a unit.
            at_once: most units whose records pass together.
        """
        units = most_drawn(batch)
        most = each * units
        begun = math.ceil(units / at_once) * sum(sorted(self.passes.values())[-most:])
        rows = (most - 1) * max(seconds / self.rows[length] for length, seconds in self.passes.items())
        return steps * (begun + rows + self.empty) + scored * self.score + self.reserve(steps)

    def reserve(self, steps: int) -> float:
        """Return the seconds from a pass that may be begun to an answer of noise: the pass, its step's noise, all."""
        return max(self.passes.values()) + (steps + 1) * self.empty


@dataclass
class Deadline:
    """The time of the answer to one task."""

    seconds: float = 0.0
    """From the task's arrival; 0: as soon as the answer is there."""
    began: float = field(default_factory=time.monotonic)
    reserve: float = 0.0
    """Seconds that a step needs to be left when it begins a pass; see ``Timing.reserve``."""

    def __post_init__(self) -> None:
        if self.seconds:
            gc.unfreeze()

    def allow(
        self,
        timing: Timing,
        steps: int,
        batch: float,
        scored: int,
        ahead: tuple[Timing, int, float] | None = None,
        each: int = 1,
        at_once: int = sys.maxsize,
    ) -> None:
        """Raise PolicyRefusal if a round might not be done in time, and hold it to that; arguments as Timing.worst.

        ``ahead`` is how fast, how often, and over how many records, a round computes something else before its steps.

        It follows from public figures and the rehearsal alone. How long the records took so far is no part of it: a
        server could choose steps and rate so that the refusal tells.
        """
        worst, room = timing.worst(steps, batch, scored, each, at_once), TRAINED * self.seconds
        reserve = timing.reserve(steps)
        if ahead:
            worst += ahead[1] * ahead[0].worst(1, ahead[2], 0)
            reserve += ahead[0].reserve(1)
        if self.seconds and room < worst:
            raise PolicyRefusal(
                f"the site's policy has reply-after = {self.seconds:g}, of which a round has {room:g} seconds; by "
                f"made-up records a round of this run may take {worst:.1f} seconds here: it needs fewer steps, a lower "
                "sample rate or shorter records"
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

    def check(self) -> None:
        """Raise TooLate if a pass that began now might not end in time for an answer."""
        if self.seconds and time.monotonic() - self.began > (1 - NOTED) * self.seconds - self.reserve:
            raise TooLate

    def left(self) -> float:
        """Return the seconds, at least 0, until the answer leaves; infinite if it leaves as soon as it can."""
        return max(0.0, self.began + self.seconds - time.monotonic()) if self.seconds else math.inf

    def wait(self) -> None:
        """Return when the answer may leave; until the next task's time runs, nothing that is held is gone over."""
        if self.seconds:
            gc.freeze()  # before the sleep: another thread's garbage would have it end late
        left = self.began + self.seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif self.seconds:
            log.error("answered %.1f seconds after reply-after: when, is not covered by the claim", -left)

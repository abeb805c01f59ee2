"""When a site answers: as soon as it can, or a fixed time after the task, which says nothing of its records.

How long a round takes follows from how many records were drawn and how long they are; one long record can be
nearly all of it. With ``reply-after`` in the policy an answer leaves at a fixed time. A time below the worst that
the rehearsal makes likely is refused before the charge. A round that is not done in time all the same sends
noise, as one that fails does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import PolicyRefusal

DEVIATIONS = 6.0
"""Standard deviations of the number of records drawn that a round must have time for: more are drawn once in 10⁹."""
log = logging.getLogger("fedveil.site")


class TooLate(Exception):
    """The round would not be answered at the time that the policy sets."""


@dataclass(frozen=True)
class Timing:
    """Seconds that the rehearsal took, on records that are no one's."""

    passes: Mapping[int, float]
    """Of one full pass, by its length."""
    rows: Mapping[int, int]
    """Records of such a pass."""
    empty: float
    """Of a step on no record: its noise."""
    score: float
    """Of scoring one record of the greatest length."""

    def worst(self, steps: int, batch: float, scored: int) -> float:
        """Return the seconds of a round whose records are all of the slowest length.

        Args:
            steps: private steps.
            batch: expected records of a step.
            scored: records that are scored for a noised count, by the declared size.
        """
        most = batch + DEVIATIONS * math.sqrt(batch)
        slowest = max(math.ceil(most / self.rows[length]) * seconds for length, seconds in self.passes.items())
        return steps * (self.empty + slowest) + scored * self.score

    @property
    def reserve(self) -> float:
        """Seconds that a pass under way and the noise may still take."""
        return max(self.passes.values()) + 2 * self.empty


@dataclass
class Deadline:
    """The time of the answer to one task."""

    seconds: float = 0.0
    """From the task's arrival; 0: as soon as the answer is there."""
    began: float = field(default_factory=time.monotonic)

    def allow(self, worst: float) -> None:
        """Raise PolicyRefusal if a round that may take ``worst`` seconds might not be done in time."""
        if self.seconds and self.seconds < worst:
            raise PolicyRefusal(
                f"the site's policy has reply-after = {self.seconds:g}; by made-up records a round of this run may "
                f"take {worst:.1f} seconds here: it needs fewer steps, a lower sample rate or shorter records"
            )

    @contextmanager
    def extended(self) -> Iterator[None]:
        """Answer later by as long as this takes: building and rehearsing a model, which follow from no record."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - began

    def check(self, reserve: float) -> None:
        """Raise TooLate unless ``reserve`` seconds are left."""
        if self.seconds and time.monotonic() - self.began > self.seconds - reserve:
            raise TooLate

    def wait(self) -> None:
        """Return when the answer may leave."""
        left = self.began + self.seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif self.seconds:
            log.error("answered %.1f seconds after reply-after: when, is not covered by the claim", -left)

"""The longest that a private round may take, from made-up records that were timed and from public figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

MORE = 1e-9
"""Chance that a step draws more records than a round has time for."""


def most_drawn(expected: float) -> int:
    """Return a number of records that a Poisson sample of ``expected`` ones passes with a chance of ``MORE``.

    Bernstein's inequality: the sample is a sum of independent zeros and ones, whose variance is at most its mean.

    >>> most_drawn(1.0), most_drawn(25.0), most_drawn(2000.0)
    (17, 64, 2294)
    """
    bits = -math.log(MORE)
    return math.floor(expected + bits / 3 + math.sqrt(bits**2 / 9 + 2 * bits * expected))


@dataclass(frozen=True)
class Timing:
    """Seconds that a rehearsal took, on made-up records."""

    passes: Mapping[int, float]
    """Of one full pass, its clip included, by its length."""
    rows: Mapping[int, int]
    """Records of such a pass."""
    empty: float
    """Of a step on no record: its noise."""
    score: float
    """Of scoring one record of the greatest length."""
    unfold: float = 0.0
    """Of unfolding one (``Task.unfold``)."""
    unfolded: int = 1
    """Rows of an unfolded one."""

    def worst(self, steps: int, batch: float, scored: int, each: int = 1, at_once: int = sys.maxsize) -> float:
        """Return the seconds of a round that draws the most records, of the slowest lengths, with its ``reserve``.

        Every length that occurs costs a pass, however few records of it there are, and again for every ``at_once``
        units. Any other record costs its row of a pass at most. With the reserve no pass of such a round is given up.

        Args:
            steps: private steps.
            batch: expected units of a step, by the public size.
            scored: records that are scored for a noised count, by the public size.
            each: most records of a unit.
            at_once: most units whose records pass together.
        """
        units = most_drawn(batch)
        most = each * units * self.unfolded
        begun = math.ceil(units / at_once) * sum(sorted(self.passes.values())[-most:])
        rows = (most - 1) * max(seconds / self.rows[length] for length, seconds in self.passes.items())
        unfold = each * units * self.unfold
        return steps * (unfold + begun + rows + self.empty) + scored * self.score + self.reserve(steps)

    def reserve(self, steps: int) -> float:
        """Return the seconds from a pass that may be begun to an answer of noise: the pass, its step's noise, all."""
        return max(self.unfold, *self.passes.values()) + (steps + 1) * self.empty

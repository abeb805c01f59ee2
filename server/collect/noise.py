"""The noise on a round's average, as what collected it knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Noise(Protocol):
    """Gaussian noise on one number of a round's averaged change."""

    def usual(self) -> float:
        """Return the standard deviation that counts for the server's rates and scores.

        No site counts with more than the run's own noise, times as many as all of them state: sites with earlier runs
        add more, and a lie about noise moves nothing.
        """

    def exact(self) -> float | None:
        """Return the standard deviation where the average is a gradient with Gaussian noise of that size; else None."""


@dataclass(frozen=True)
class ServerNoise:
    """Noise that the server drew itself, or none."""

    std: float
    """Standard deviation."""

    def usual(self) -> float:
        """Return what was drawn."""
        return self.std

    def exact(self) -> float | None:
        """Return what was drawn."""
        return self.std


NO_NOISE = ServerNoise(0.0)

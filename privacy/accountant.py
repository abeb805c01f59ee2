"""An epsilon's origin as data: purposes of releases, and the accountant with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["pld", "rdp"]

TRAINING, INITIALISATION, EVALUATION = PURPOSES = ("training", "initialisation", "evaluation")
"""What releases are for: an optimiser step; a full gradient before round 1; a noised count of a site's own records that
the model gets right, which one record changes by at most 1, without clipping."""
METHODS: tuple[Method, ...] = ("pld", "rdp")
BELOW_FLOOR, TOO_LARGE, NOT_FINITE = "noise", "loss", "delta"
DEPARTED, AT_RATE_1 = "plan", "rate"
ERRORS = ("ArithmeticError", "FloatingPointError", "OverflowError", "ZeroDivisionError", "ValueError", "MemoryError")
"""What a library of accountants may fail with on figures that another machine made up."""
REASONS = ("", BELOW_FLOOR, TOO_LARGE, NOT_FINITE, DEPARTED, AT_RATE_1, *ERRORS)
"""Why RDP stands in for the PLD: a noise is below the floor, the loss is too large for the grid, no answer is finite at
this delta, what was released departs from what was planned, or the PLD failed with an error. Or why it does not stand
in, but rates are taken as 1: the plan has whole batches alone. Empty: none of it."""
PLD_INTERVAL = 1e-3
"""The grid on which a privacy loss distribution is rounded against us."""
PLD_NOISE_FLOOR = 0.1
"""The least noise multiplier for which there is such a grid."""
FINEST_GRID = 1 / 64
"""The first step, in powers of two, of the grids on which noise and rates are rounded against us; each next is twice as
wide."""
MOST_GRID = 13
"""Number of the widest grid, the finest being 1."""


@dataclass(frozen=True)
class Detour:
    """Why an epsilon is not simply that of its method on the releases as they are."""

    reason: str = ""
    """One of REASONS."""
    figure: float = 0.0
    """The least noise multiplier (``noise``) or the delta (``delta``) that is the reason, or RDP's order (``plan``)."""
    error: str = ""
    """What RDP failed with, one of ERRORS: epsilon is infinite then. Empty: it did not."""
    grid: int = 0
    """On which grid noise and rates were rounded, the finest being 1. 0: on none."""


@dataclass(frozen=True)
class Accountant:
    """What computed an epsilon; as text, the words of a report."""

    method: Method
    version: str
    """Of dp-accounting."""
    detour: Detour | None = None
    """None for the method's own answer."""

    def __str__(self) -> str:
        """Return method, version and the reasons in words."""
        library, detour = f"dp-accounting {self.version}", self.detour or Detour()
        if self.method == "pld":
            words = f"PLD ({library}, discretisation {PLD_INTERVAL:.0e})".replace("e-03", "e-3")
        else:
            words = f"RDP ({library})"
        if detour.reason == AT_RATE_1:
            words += " (rates below 1 taken as 1: the data set's first run planned whole batches)"
        elif detour.reason and self.method == "rdp":
            words += f" (fallback: {_reason_in_words(detour)})"
        if detour.error:
            words += f" (failed with {detour.error})"
        if detour.grid:
            percent = 100 * (2 ** (FINEST_GRID * 2 ** (detour.grid - 1)) - 1)
            words += f" (noise rounded down and rates up, by up to {percent:.2g} %)"
        return words


def _reason_in_words(detour: Detour) -> str:
    return {
        BELOW_FLOOR: f"noise multiplier {detour.figure:g} is below {PLD_NOISE_FLOOR:g}",
        TOO_LARGE: "the privacy loss is too large for the PLD's grid",
        DEPARTED: f"not as the data set's first run planned, at order {detour.figure:g}",
        NOT_FINITE: f"the PLD has no finite answer at delta {detour.figure:g}",
    }.get(detour.reason, f"the PLD failed with {detour.reason}")

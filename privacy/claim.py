"""The words of a privacy claim: unit, neighbours, adversary, sampler. Every report prints a mechanism's own."""

from __future__ import annotations

from dataclasses import dataclass

NO_CLAIM = "none: nothing is promised about any record"


@dataclass(frozen=True)
class Claim:
    """What is promised, in words."""

    unit: str
    """What one neighbour is: whose addition or removal nobody notices."""
    adjacency: str
    """How neighbouring data sets differ."""
    adversary: str
    """Against whom the promise holds."""
    sampler: str
    """How the records of a step are chosen."""
    per: str = ""
    """The unit in one word."""
    leaves_out: tuple[str, ...] = ()
    """What somebody might take for promised, and is not."""
    across: str = "their records are disjoint."
    """Why a federation's figure is the maximum over its sites, or what that means for a unit at several of them."""


NOTHING = Claim(NO_CLAIM, NO_CLAIM, NO_CLAIM, NO_CLAIM)

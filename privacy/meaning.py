"""Bounds on membership attacks, and the ε of somebody with several units: an ε in terms of people.

Both come from the privacy loss distribution that ε itself comes from, not from the pair (ε, δ), which says far less.

An attacker sees all that was released and says whether one unit was among the records. Where the releases are
(ε, δ(ε))-private for every ε >= 0, a test with a false-positive rate α is right about a member at most in

    min over ε of  min(δ(ε) + exp(ε) α,  1 - exp(-ε) (1 - δ(ε) - α))

of all cases (Kairouz, Oh and Viswanath 2015, arXiv 1311.0776, theorem 2.1), and true-positive less false-positive rate
is at most δ(0). The minimum is taken over a grid of ε, so a coarse grid makes a bound looser, never wrong.

Somebody with m units, each sampled on its own, is in a sum with weight Binomial(m, q): a mixture of Gaussians dominates
the release (Ganesh 2024, arXiv 2401.10294), and the PLD of the mixture composes as any other. Group privacy from the
pair (ε, δ) would say m ε at a δ that grows with exp(m ε).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedveil.common.check import in_range
from fedveil.privacy.accountant import PLD_INTERVAL
from fedveil.privacy.accounting import Merged, Release, composable, epsilon
from fedveil.privacy.events import Event, kind_of

if TYPE_CHECKING:
    from dp_accounting.pld import PLDAccountant

FALSE_POSITIVES = (0.001, 0.01)
"""False-positive rates of the attacks that are bounded."""
UNITS = (2, 4, 8)
"""Units of one person."""
MOST_UNITS = 1000
"""Of one person, of whom an ε is computed."""
GRID = (20.0, 2001)
"""Largest ε of the curve, and points of it."""
POINTS = 1000
"""Points of a grid of losses, for one release of one event; more for many, whose roundings add up."""


@dataclass(frozen=True)
class Attack:
    """A bound on every attack with one false-positive rate."""

    false_positives: float
    """Share of those who are not members, and are taken for some."""
    true_positives: float
    """Share of members who are found, at most."""


@dataclass(frozen=True)
class Several:
    """The ε of somebody with several units."""

    units: int
    epsilon: float


@dataclass(frozen=True)
class Meaning:
    """What the releases of one site mean; every figure is an upper bound."""

    attacks: list[Attack]
    advantage: float
    """Largest difference of true-positive and false-positive rate, from 0 to 1."""
    several: list[Several]
    """At the δ of the claim. Empty: no event of the site has a price for several units."""


def meaning_of(releases: Sequence[Release], delta: float) -> Meaning | None:
    """Return what publishing all ``releases`` means; None where no PLD answers, as ε is then in the hundreds.

    Raises:
        ConfigError: ``delta`` is not in (0, 1].
    """
    in_range(0, 1, delta=delta)
    merged = composable(releases)
    return None if merged is None else _meaning(merged, delta)


def epsilon_of_several(releases: Sequence[Release], units: int, delta: float) -> float:
    """Return the ε at ``delta`` of a person with several units, each sampled on its own; infinite where none is known.

    It is never below that of one unit.

    Raises:
        ConfigError: ``delta`` is not in (0, 1], or ``units`` not in 1 to ``MOST_UNITS``.
    """
    in_range(0, 1, delta=delta)
    in_range(0, MOST_UNITS, units=units)
    if not releases:
        return 0.0
    merged = composable(releases)
    found = None if merged is None else _of_several(merged, units, delta)
    return math.inf if found is None else max(found, epsilon(releases, delta))


@lru_cache(maxsize=256)
def _meaning(merged: Merged, delta: float) -> Meaning | None:
    import numpy as np

    try:
        one = _composed(merged, 1, PLD_INTERVAL)
        if one is None:
            return None
        epsilons = np.linspace(0, *GRID)
        deltas = np.clip(np.asarray(one.get_delta(epsilons)), 0.0, 1.0)
        attacks = []
        for rate in FALSE_POSITIVES:
            upper = np.minimum(deltas + np.exp(epsilons) * rate, 1 - np.exp(-epsilons) * (1 - deltas - rate))
            attacks.append(Attack(rate, float(min(1.0, upper.min()))))
    except (ArithmeticError, ValueError, MemoryError):
        # Figures that another party made up must not stop whoever reports them.
        return None
    figures = {units: _of_several(merged, units, delta) for units in UNITS}
    several = [Several(units, figure) for units, figure in figures.items() if figure is not None]
    return Meaning(attacks, float(deltas[0]), several)


def _of_several(merged: Merged, units: int, delta: float) -> float | None:
    """Return ε of several units of one person; None where the library has no finite answer."""
    import numpy as np

    spread = max(_spread(event, units) for event, _ in merged)
    finer = 1 + math.log10(max(count for _, count in merged))
    # Many different releases share the points of four, so that a report takes seconds whatever was released.
    points = POINTS * finer / max(1.0, len(merged) / 4)
    try:
        with np.errstate(all="ignore"):
            loss = _composed(merged, units, max(PLD_INTERVAL, spread / points))
            found = math.inf if loss is None else float(loss.get_epsilon(delta))
    except (ArithmeticError, ValueError, MemoryError, TypeError):
        # A TypeError: dp-accounting finds no end of the tail of a mixture whose noise is very small.
        return None
    return max(0.0, found) if math.isfinite(found) else None


def _composed(merged: Merged, units: int, interval: float) -> PLDAccountant | None:
    from dp_accounting import NeighboringRelation, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for event, count in merged:
        composed = kind_of(event.kind).dp_event_of(event, units)
        if composed is None:
            return None
        accountant.compose(SelfComposedDpEvent(composed, count))
    return accountant


def _spread(event: Event, units: int) -> float:
    """Return about how far the loss of one release reaches, at ten standard deviations of its noise."""
    ratio = units / event.noise_multiplier
    return 10 * ratio + ratio * ratio / 2

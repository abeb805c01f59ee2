"""Calibration: the least noise multiplier with which releases stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from fedveil.common.check import in_range, positive
from fedveil.common.errors import BudgetExhausted
from fedveil.privacy.accounting import Merged, Release, add, merge, price_of
from fedveil.privacy.events import LEAST_NOISE, MOST_NOISE, Event, sampled_gaussian
from fedveil.privacy.figures import epsilon_text


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Sequence[Release] = (),
) -> float:
    """Return the least noise multiplier of sums over Poisson samples at ``sample_rate``; as ``least_noise``."""
    return least_noise(sampled_gaussian(1.0, sample_rate), epsilon, delta, steps, spent)


def least_noise(event: Event, epsilon: float, delta: float, steps: int, spent: Sequence[Release] = ()) -> float:
    """Return the least noise multiplier with which ``steps`` more releases stay within ``epsilon``.

    Guarantees: ``spent`` and ``steps`` releases of ``event`` at the answer, its other figures as they are, cost at most
    ``epsilon`` by ``privacy.accounting``, and the answer is at most 1.001 times the least such noise. It has at most 5
    significant digits, so that a person can copy it, and lies within [``LEAST_NOISE``, ``MOST_NOISE``].

    Raises:
        ConfigError: a figure is out of range.
        BudgetExhausted: ``spent`` alone exceeds ``epsilon``, or leaves too little for any noise.
    """
    positive(epsilon=epsilon)
    in_range(0, 1, delta=delta)
    # Noise and what the price does not depend on make no other search of it.
    like = Release(event, steps).event.having(noise_multiplier=1.0).priced()
    return _least_noise(epsilon, delta, like, steps, merge(spent))


@lru_cache(maxsize=256)
def _least_noise(target: float, delta: float, event: Event, steps: int, spent: Merged) -> float:
    already = price_of(spent, delta)
    if already > target:
        raise BudgetExhausted(
            f"epsilon {epsilon_text(already, decimals=4)} is spent already, above the budget of {target:g} at "
            f"delta {delta:g}: no step is left; train on other data or agree on a larger budget"
        )

    def cost(noise: float) -> float:
        return price_of(add(spent, event.having(noise_multiplier=noise), steps), delta)

    found = least_at(cost, target)
    if found is None:
        raise BudgetExhausted(
            f"epsilon {epsilon_text(already, decimals=4)} of {target:g} is spent at delta {delta:g}, too little is "
            f"left for {steps} more steps at any noise: ask for fewer steps or agree on a larger budget"
        )
    return found


def least_at(cost: Callable[[float], float], target: float) -> float | None:
    """Return the least noise multiplier whose ``cost`` is at most ``target``, as ``least_noise`` does; None: none is.

    ``cost`` falls with the noise. A cached one saves half of the time.
    """
    enough = 1.0
    while cost(enough) > target:
        enough *= 2
        if enough > MOST_NOISE:
            return None
    short = enough / 2
    while cost(short) <= target:
        enough, short = short, short / 2
        if enough <= LEAST_NOISE:
            return LEAST_NOISE
    enough = _narrow(cost, target, short, enough)
    rounded = _five_digits_up(enough)
    return rounded if cost(rounded) <= target else enough


def _narrow(cost: Callable[[float], float], target: float, short: float, enough: float) -> float:
    """Return a noise with ``cost <= target`` that is at most 1.0008 times one with ``cost > target``.

    Log-log interpolation, because a cost is dear and nearly a power of the noise; every third probe
    halves the bracket instead, because the cost jumps where RDP takes over.
    """
    probes, last_fitted = 0, True
    while enough > short * 1.0008:
        dear, cheap = cost(short), max(cost(enough), 1e-9)
        share = 0.5
        if probes % 3 < 2 and math.isfinite(dear):
            share = math.log(dear / target) / math.log(dear / cheap)
        # Aim a little past the root, at the side that the last probe missed, so that the bracket closes.
        probe = short * (enough / short) ** share * (0.9996 if last_fitted else 1.0004)
        if not short < probe < enough:
            probe = math.sqrt(short * enough)
        last_fitted = cost(probe) <= target
        enough, short = (probe, short) if last_fitted else (enough, probe)
        probes += 1
    return enough


def _five_digits_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 4)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.5g}")

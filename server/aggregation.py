"""Weights and lengths of the results that count: no site is more than its share of the average.

A site's share of the average is ``p_k ∝ n_k / max(1, σ_k / σ)²``, with n_k the size that it declares, σ_k the
noise multiplier that it states and σ the run's own (``usual_noise``): independent parts are best weighed by one
over their variance. Where all state the same noise the shares are those of the sizes. A site that states more may
send an update that is longer by as much (``plausible``), and weighs less by its square. A site that states less than
the run's gains nothing.

With three sites or more, two bounds hold whatever is stated. No share is above ``max-share``. And no update is
longer than the mechanism's ``longest`` times the round's middle one, each over what an honest one can be: it is
scaled down to that (norm clipping; Sun et al. 2019, "Can you really backdoor federated
learning?"). Norms are of what was noised at the sites, so both are free under privacy. Of all updates' weighted
lengths one site is then at most ``longest p / (longest p + 1 - p)``, where the others are as long as the middle one.

Two sites have no middle, and the server cannot say which of them lies. No share is then above ``(1 + max-share) / 2``:
half of what is free above ``max-share`` is left to an honest pair whose sizes differ. No update is longer than
``longest`` times what an honest one can be by the settings, where they bound it.

They bound no plain step without a clip. There an update may be as long as a change usually is, by the server's Adam
(``optimizer.usual_change``), however short the middle one is: by that Adam a site then moves the numbers by about its
share of full steps. Of fewer than three sites none is longer than ``longest`` times that. In the first round nothing is
usual yet, so that nothing bounds two sites there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from statistics import median

from fedveil.common.log import about
from fedveil.common.messages.formats import FORMATS
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply
from fedveil.server.optimizer import usual_change
from fedveil.server.plausible import held_by, honest_norm, update_norm
from fedveil.server.terms import least_plan, usual_noise
from fedveil.strategies.job import Job
from fedveil.strategies.state import Contribution, ServerState

log = logging.getLogger("fedveil.server")
ENOUGH = 3
"""Sites that a middle needs."""
WORTH_TELLING = 1.2
"""How many times what it would be by size the noise of an average is, at least, before a line says so."""


def contributions(
    job: Job,
    results: Sequence[TrainResult],
    state: ServerState,
    keep: Callable[[AdapterState], AdapterState] = lambda shorter: shorter,
) -> list[Contribution]:
    """Return what a strategy averages.

    Args:
        job: the run.
        results: those that count, all of one round.
        state: what the sites started from.
        keep: puts what is made of an update where the update is kept.
    """
    shares, factors = shares_of(job, results), factors_of(job, results, state)
    for result, factor in zip(results, factors, strict=True):
        if factor < 1:
            where = about(result.run, result.round_number, result.site)
            log.warning("the update is scaled by %.3g: it is longer than is likely", factor, extra=where)
    return [
        Contribution(result.site, share, shortened(job, result, state, factor, keep), result.rank, factor=factor)
        for result, share, factor in zip(results, shares, factors, strict=True)
    ]


def shares_of(job: Job, results: Sequence[TrainResult]) -> list[float]:
    """Return the weight of each result, in records; only ratios matter."""
    return capped(_believed(job, results), most_of(len(results), job.config.max_share))


def _believed(job: Job, results: Sequence[TrainResult]) -> list[float]:
    """Return the weight that each result would have if no site could lie."""
    return [result.public_size / _noise_ratio(job, result) ** 2 for result in results]


def warn_of_noise(job: Job, results: Sequence[TrainResult]) -> None:
    """Say so where holding a large site down makes the average of these results much noisier."""
    if not results or not all(result.spending for result in results):
        return
    noises = [result.spending.event.noise_multiplier / result.public_size for result in results if result.spending]
    times = noise_grown(shares_of(job, results), _believed(job, results), noises)
    if times >= WORTH_TELLING:
        sizes = [result.public_size for result in results]
        words = held_down(job.config.max_share, sizes, times)
        log.warning("%s", words, extra=about(results[0].run, results[0].round_number))


def noise_grown(shares: Sequence[float], believed: Sequence[float], noises: Sequence[float]) -> float:
    """Return how many times the noise of an average by ``shares`` is that of one by ``believed`` weights.

    Args:
        shares: weights, of which only ratios matter.
        believed: others of the same sites.
        noises: standard deviation of the noise in each site's part, in any one unit.

    >>> round(noise_grown([0.5, 0.25, 0.25], [20000, 500, 500], [1 / 20000, 1 / 500, 1 / 500]), 1)
    8.6
    """

    def noise(weights: Sequence[float]) -> float:
        return math.hypot(*(w * std for w, std in zip(weights, noises, strict=True))) / math.fsum(weights)

    return noise(shares) / noise(believed)


def held_down(max_share: float, sizes: Sequence[int], times: float) -> str:
    """Return what a person should know where sites of these sizes average ``times`` the noise that they would by size.

    >>> held_down(0.5, [20000, 500, 500], 8.62)
    "max-share 0.5 holds down the largest site, 20000 of 21000 in all, so the noise of the average is 8.6 times what \
it would be by size: set max-share = 1.0 if the sites' sizes can be believed"
    """
    return (
        f"max-share {max_share:g} holds down the largest site, {max(sizes)} of {sum(sizes)} in all, so the noise of "
        f"the average is {times:.1f} times what it would be by size: set max-share = 1.0 if the sites' sizes can be "
        "believed"
    )


def most_of(sites: int, max_share: float) -> float:
    """Return the largest share of the average that one of ``sites`` may be.

    >>> [most_of(sites, 0.5) for sites in (1, 2, 3)]
    [1.0, 0.75, 0.5]
    """
    return {1: 1.0, 2: (1 + max_share) / 2}.get(sites, max_share)


def _noise_ratio(job: Job, result: TrainResult) -> float:
    """Return how many times the run's own noise a site states, at least 1."""
    return max(1.0, result.spending.event.noise_multiplier / usual_noise(job, result)) if result.spending else 1.0


def capped(weights: Sequence[float], most: float) -> list[float]:
    """Return the weights, the largest lowered until none is above ``most`` of their sum; if none can be, all equal.

    >>> capped([10.0, 10.0, 980.0], 0.5)
    [10.0, 10.0, 20.0]
    """
    ordered = sorted(weights, reverse=True)
    for lowered in range(len(weights)):
        rest = math.fsum(ordered[lowered:])
        if lowered * most >= 1:
            break
        # With the first ``lowered`` weights at c, c = most (lowered c + rest).
        bound = most * rest / (1 - lowered * most)
        if ordered[lowered] <= bound:
            return [min(weight, bound) for weight in weights] if lowered else list(weights)
    return [1.0] * len(weights)


def factors_of(job: Job, results: Sequence[TrainResult], state: ServerState) -> list[float]:
    """Return what each update is scaled by: 1, or less for one that is longer than the others', or than is honest.

    All 1 where ``shorten-updates`` is false, as a run that promises nothing may have it.
    """
    if not job.config.shorten_updates:
        return [1.0] * len(results)
    honest = [honest_norm(job, least_plan(job, result), result, state) for result in results]
    bounded = all(math.isfinite(most) and most for most in honest)
    usual = 0.0 if bounded else usual_change(state)
    if len(results) < ENOUGH and not (bounded or usual):
        return [1.0] * len(results)
    lengths = [
        update_norm(job, result, state) / (most if math.isfinite(most) and most else 1.0)
        for result, most in zip(results, honest, strict=True)
    ]
    longest = job.mechanism.longest * (1 + FORMATS[job.config.wire.precision].room)
    if len(results) >= ENOUGH:
        longest = max(longest * median(lengths), usual)
    elif not bounded:
        longest *= usual
    return [longest / length if length > longest else 1.0 for length in lengths]


def shortened(
    job: Job,
    result: TrainResult,
    state: ServerState,
    factor: float,
    keep: Callable[[AdapterState], AdapterState] = lambda shorter: shorter,
) -> AdapterState:
    """Return the contribution whose change of what the site received is ``factor`` times as long, kept if it is new."""
    if factor == 1:
        return result.contribution
    held = held_by(job, result, state)
    own = {
        layer: {name: held.get(layer, {}).get(name, 0 * tensor) for name, tensor in factors.items()}
        for layer, factors in result.contribution.items()
    }
    return keep(apply(lambda sent, old: old + factor * (sent - old), result.contribution, own))

"""The noise in a round's averaged numbers: what follows from each site's stated noise, batch, rate and share.

A plain step of a site with batch b and rate η puts noise of standard deviation η σ C / b on every number of its change;
steps of one round add up by their squares, and so do the sites, each times its share of the average. A caller that
needs to know what noise alone would do asks here: strategies that choose layers, the server's rates, LoRAPrune's
scores, and thresholds of singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedveil.common.messages.round import TrainResult
from fedveil.server.collect.noise import NO_NOISE, Noise
from fedveil.server.terms import paid_plan, usual_noise
from fedveil.strategies.job import Job
from fedveil.strategies.state import Contribution


def plain_step(job: Job) -> bool:
    """Return whether a site's change is its gradient times a rate: one plain step, no rule."""
    training = job.config.training
    return training.local_steps == 1 and training.optimizer == "sgd" and not training.weight_decay


def site_noise(job: Job, result: TrainResult, *, most: float = math.inf) -> float:
    """Return the standard deviation of the noise on one number of a site's change, after plain steps.

    Args:
        job: the run, of which something is charged.
        result: the site's answer; only its round, its size and what it was charged for are used.
        most: count a site that states more than ``most`` times the run's own noise at that.
    """
    return _rate(job, result) * _gradient(job, result, result.public_size, most)


def release_noise(job: Job, result: TrainResult) -> float:
    """Return the standard deviation of the noise on one number of what a site releases for a paid start: σ C / b."""
    return _gradient(job, result, result.public_size)


def sum_noise(job: Job, results: Sequence[TrainResult], *, most: float = math.inf) -> float:
    """Return the same of the one change that the sum of all sites makes, in which every site adds its part.

    Args:
        job: the run, of which something is charged.
        results: those that are in the sum, at least one.
        most: as for ``site_noise``.
    """
    first = next((result for result in results if result.spending is not None), results[0])
    sizes = sum(result.public_size for result in results)
    return _rate(job, first) * _gradient(job, first, sizes, most) * math.sqrt(len(results))


def cohort_noise(job: Job, result: TrainResult) -> float:
    """Return the standard deviation of the noise on one number of a trusted server's mean, which it noises as it is.

    Args:
        job: a run in which the server draws the noise.
        result: of the whole cohort; only its size and what the round was charged for are used.
    """
    return _gradient(job, result, result.public_size)


def of_average(shares: Sequence[float], noises: Sequence[float]) -> float:
    """Return the standard deviation of one number of ``Σ p_k x_k`` for independent x_k.

    >>> of_average([0.6, 0.4], [1.0, 2.0])
    1.0
    """
    return math.hypot(*(share * noise for share, noise in zip(shares, noises, strict=True)))


@dataclass(frozen=True)
class SitesNoise:
    """The noise of an average to which each site adds its own."""

    job: Job
    results: Sequence[TrainResult]
    averaged: Sequence[Contribution]
    """In the order of ``results``."""

    def usual(self) -> float:
        """Return the noise with no site above the run's own, times as many as all state."""
        most = _stated_by_all(self.job, self.results)
        return self._mean([site_noise(self.job, result, most=most) for result in self.results])

    def stated(self) -> float:
        """Return the noise as the sites state it, each with the factor that its change was shortened by."""
        pairs = zip(self.averaged, self.results, strict=True)
        return self._mean([site_noise(self.job, r) if one.noise is None else one.noise for one, r in pairs])

    def exact(self) -> float | None:
        """Return ``stated`` where every site took one plain step."""
        return self.stated() if _stepped(self.job, self.results) else None

    def _mean(self, noises: Sequence[float]) -> float:
        whole = math.fsum(one.weight for one in self.averaged)
        return of_average([one.weight / whole for one in self.averaged], noises)


@dataclass(frozen=True)
class SumNoise:
    """The noise of a sum of which every site draws a part."""

    job: Job
    results: Sequence[TrainResult]

    def usual(self) -> float:
        """Return the noise with no site above the run's own, times as many as all state."""
        return sum_noise(self.job, self.results, most=_stated_by_all(self.job, self.results))

    def exact(self) -> float | None:
        """Return the noise where every site took one plain step."""
        return sum_noise(self.job, self.results) if _stepped(self.job, self.results) else None


@dataclass(frozen=True)
class StatisticNoise:
    """The noise of the mean of what sites released for a paid start."""

    job: Job
    results: Sequence[TrainResult]
    averaged: Sequence[Contribution]
    """In the order of ``results``."""

    def usual(self) -> float:
        """Return the noise as the sites state it."""
        return self.exact()

    def exact(self) -> float:
        """Return the noise as the sites state it."""
        whole = math.fsum(one.weight for one in self.averaged)
        pairs = zip(self.results, self.averaged, strict=True)
        noises = [release_noise(self.job, result) * one.factor for result, one in pairs]
        return of_average([one.weight / whole for one in self.averaged], noises)


def step_noise(job: Job, result: TrainResult) -> float | None:
    """Return the standard deviation of one coordinate of the noise in a site's change: η σ C / b.

    None where it does not follow from what is public: without privacy, after more than one step, or behind a rule or
    an optimiser that changes what a plain step does.
    """
    if result.spending is None or not _stepped(job, [result]):
        return None
    return site_noise(job, result)


def with_noises(job: Job, averaged: Sequence[Contribution], results: Sequence[TrainResult]) -> tuple[Contribution, ...]:
    """Return what a strategy combines, each with the noise of its site as far as it is known."""
    own = [step_noise(job, result) for result in results]
    return tuple(
        replace(one, noise=None if noise is None else noise * one.factor)
        for one, noise in zip(averaged, own, strict=True)
    )


def _stepped(job: Job, results: Sequence[TrainResult]) -> bool:
    return plain_step(job) and not any(noised_whole(job, result) for result in results)


def noised_whole(job: Job, result: TrainResult) -> bool:
    """Return whether a site's plan noises what leaves it, and not the steps."""
    return paid_plan(job, result).noises_rounds


def noised_at_sites(
    job: Job, averaged: Sequence[Contribution], results: Sequence[TrainResult]
) -> tuple[tuple[Contribution, ...], Noise]:
    """Return what is averaged with the noise that each site added, and the average's; in round 0 of what is released.

    Args:
        job: the run, of which something is charged.
        averaged: in the order of ``results``.
        results: those that count, all of one round.
    """
    if not results[0].round_number:
        return tuple(averaged), StatisticNoise(job, results, averaged)
    parts = with_noises(job, averaged, results)
    return parts, SitesNoise(job, results, parts)


def without_noise(
    job: Job, averaged: Sequence[Contribution], results: Sequence[TrainResult]
) -> tuple[tuple[Contribution, ...], Noise]:
    """Return what is averaged, of which no part has noise: the run promises nothing."""
    del job, results
    return tuple(replace(one, noise=0.0) for one in averaged), NO_NOISE


def _rate(job: Job, result: TrainResult) -> float:
    """Return what a step's noise is multiplied by in a round of plain steps."""
    number = result.round_number
    return math.hypot(*(job.config.site_rate(number, step) for step in range(job.config.training.local_steps)))


def _stated_by_all(job: Job, results: Sequence[TrainResult]) -> float:
    """Return how many times the run's own noise every site states, at least 1."""
    events = [(result, result.spending.event) for result in results if result.spending]
    return max(1.0, min((event.noise_multiplier / usual_noise(job, one) for one, event in events), default=1.0))


def _gradient(job: Job, result: TrainResult, size: int, most: float = math.inf) -> float:
    plan = paid_plan(job, result)
    event = result.spending.event if result.spending else plan.event
    if math.isfinite(most):
        event = event.having(noise_multiplier=min(event.noise_multiplier, most * usual_noise(job, result)))
    return type(plan)(event, event.sample_rate * size, plan.delta, plan.max_epsilon).gradient_noise_std

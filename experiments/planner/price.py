"""The price of a run in privacy, before it: from configuration and public sizes only, never from a record.

The noise is the one that the run itself will use: a plan is made by the same function that a site calls before
it is charged (``client.budget.plan_of``), for a site without a policy, whose ledger holds what is said of earlier runs
or nothing. A site's own policy may be stricter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedveil.common.data.partition import public_size_of_part, site_part
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import BudgetExhausted, ConfigError
from fedveil.experiments.planner.payers import payer_of, planned_site
from fedveil.privacy.accountant import Accountant
from fedveil.privacy.accounting import Release, alone
from fedveil.privacy.events import Event
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import (
    FRESH,
    History,
    commitment_to,
    noise_after,
    price,
    price_after,
    promised,
    promised_noise,
)
from fedveil.strategies.job import Job

MOST_ROUNDS = 100_000
"""Rounds beyond which no end of the budget is looked for."""
MOST_PRICED = 100
"""Most rounds that are priced: of a longer run this many, evenly spread, and always the last."""
LEAST_SIGNAL = 0.25
"""Signal-to-noise of a run below which it is said to hardly train; found by trying, see docs/guides/planning.md."""


@dataclass(frozen=True)
class PricedRound:
    """What a site has spent once a round is done."""

    round_number: int
    """1-based; 0 is a paid initialisation."""
    steps: int
    """Optimiser steps so far; of a trusted server, sums."""
    epsilon: float
    """The number of record, at the run's delta."""
    epsilon_rdp: float
    """The cross-check."""
    accountant: Accountant
    """What gave ``epsilon``."""


@dataclass(frozen=True)
class ThrownAway:
    """A run's price for a site with a number of failed attempts at a sum, each charged as a round."""

    attempts: int
    epsilon: float
    """After the run, at the run's delta and noise."""
    epsilon_alone: float
    """The same if no other site adds its noise."""
    noise_multiplier: float
    """The least noise with which the budget pays for these attempts and all rounds."""


@dataclass(frozen=True)
class SignalToNoise:
    """How far the sites' averaged gradient carries the trained numbers, over how far its noise does.

    Signal of one step: the length of the mean clipped gradient, ``alignment`` · C. Alignment 1 would mean that
    all records pull the same way with at least the clip's length; no job reaches it. Noise of one step: the
    expected length of the noise on the average over sites, sqrt(d) sqrt(sum_k (p_k σ C / b_k)²), with d trained
    numbers, p_k the averaging weight and b_k the expected batch of site k. Over T steps the signal adds up as T
    and the noise as sqrt(T), so the run's figure is sqrt(T) times the step's. At 1, half of the squared
    distance that plain gradient steps cover is noise. It leaves out the optimiser, and that sites drift apart.
    """

    trained_numbers: int
    steps: int
    noise: float
    """Expected length of one step's averaged noise, in units of the clip norm."""
    alignment: tuple[float, float] | None
    """Measured on public records at the start: the estimate and its upper end; None: not measured."""

    @property
    def step_bound(self) -> float:
        """The step's figure at alignment 1: an upper limit."""
        return 1.0 / self.noise

    @property
    def run_bound(self) -> float:
        """The run's figure at alignment 1: an upper limit."""
        return math.sqrt(self.steps) * self.step_bound

    @property
    def step(self) -> float | None:
        """The step's figure at the measured alignment."""
        return None if self.alignment is None else self.alignment[0] * self.step_bound

    @property
    def run(self) -> tuple[float, float] | None:
        """The run's figure at the measured alignment, and at its upper end."""
        if self.alignment is None:
            return None
        estimate, upper = self.alignment
        return estimate * self.run_bound, upper * self.run_bound

    @property
    def too_low(self) -> bool:
        """Whether the job will hardly train: even the upper end of the run's figure is below ``LEAST_SIGNAL``."""
        return (self.run_bound if self.run is None else self.run[1]) < LEAST_SIGNAL

    def as_json(self) -> dict[str, Any]:
        """Return fields and figures as plain values."""
        figures = {name: getattr(self, name) for name in ("step", "step_bound", "run", "run_bound")}
        return {**asdict(self), **figures, "threshold": LEAST_SIGNAL}


def simulated_sizes(job: Job, sites: int) -> tuple[int, ...]:
    """Return the sizes that the sites of a simulation declare as public.

    Raises:
        ConfigError: there is no site, or the records cannot be divided as configured.
        DataError: the records cannot be read, or are too few.
    """
    if sites < 1:
        raise ConfigError(f"a federation needs at least 1 site, not {sites}")
    train, unit = train_and_test(job.config.data, job.config.model.task)[0], job.unit
    parts = [site_part(train, job.config.data, k, sites) for k in range(sites)]
    return tuple(public_size_of_part(unit.count(part)) for part in parts)


def paid_before(job: Job) -> list[Release]:
    """Return the releases that a site makes ahead of its first step: a paid initialisation, or nothing."""
    paid = job.origin.release(planned_site(1).policy.min_noise_multiplier)
    return [paid] if paid else []


def site_plans(job: Job, sizes: Sequence[int], history: History = FRESH) -> list[PrivacyPlan]:
    """Return each site's plan, as the run will make it; none where nothing is charged.

    A trusted server has one plan, of the sum, for all sites. ``sizes`` are the sites' public sizes.

    Raises:
        PrivacyError: delta does not fit a size, or earlier runs or the initialisation spend the budget.
    """
    return payer_of(job).plans(job, sizes, history)


def releases_of_round(job: Job) -> int:
    """Return how many releases a plan counts a round as: its steps, or the one sum of a trusted server."""
    return payer_of(job).releases_of_round(job)


def round_numbers(job: Job) -> list[int]:
    """Return the rounds after which a run is priced, with 0 where sites pay for an initialisation."""
    return ([0] if paid_before(job) else []) + spread(job.config.rounds, MOST_PRICED)


def priced_rounds(
    job: Job, plan: PrivacyPlan, history: History = FRESH, numbers: Sequence[int] | None = None
) -> list[PricedRound]:
    """Return what a site has spent after these rounds; None: after all of ``round_numbers``.

    By the plan that its ledger writes down with the first charge, as that prices: a start alone has its δ, too.
    """
    before, local = paid_before(job), releases_of_round(job)
    whole = [*before, plan.release(job.config.rounds * local)]
    commitment = history.commitment if history.releases else commitment_to(whole, ())
    priced = []
    for number in round_numbers(job) if numbers is None else numbers:
        releases = [*before, plan.release(number * local)] if number else before
        value, accountant = price([*history.releases, *releases], commitment, plan.delta)
        rdp = promised([*history.releases, *releases], plan.delta, method="rdp")[0]
        priced.append(PricedRound(number, number * local, value, rdp, accountant))
    return priced


def spread(count: int, most: int) -> list[int]:
    """Return the numbers 1 to ``count``, or ``most`` of them, evenly spread, with the first and the last.

    >>> spread(4, 10), spread(100, 4)
    ([1, 2, 3, 4], [1, 34, 67, 100])
    """
    if count <= most:
        return list(range(1, count + 1))
    return [1 + round(i * (count - 1) / (most - 1)) for i in range(most)]


def thrown_away(job: Job, plan: PrivacyPlan, history: History = FRESH) -> list[ThrownAway]:
    """Return the price of one failed attempt and of the most that a run makes; empty without secure sums.

    Raises:
        PrivacyError: no noise keeps these rounds within the budget.
    """
    most = job.config.rounds * job.config.round_retries
    if not job.config.privacy.honest_sites or not most:
        return []
    priced = []
    for attempts in sorted({1, most}):
        release = plan.release(job.config.total_steps + attempts * job.config.training.local_steps)
        least = noise_for_all(history, plan.event, release.count, (), plan.max_epsilon, plan.delta)
        summed = price_after(history, [release], plan.delta)[0]
        single = price_after(history.changed(alone), alone([release]), plan.delta)[0]
        priced.append(ThrownAway(attempts, summed, single, least))
    return priced


def noise_for_all(
    history: History, event: Event, steps: int, beside: Sequence[Release], epsilon: float, delta: float
) -> float:
    """Return the noise with which a run fits into what a history leaves; as ``promised_noise`` without one.

    Raises:
        BudgetExhausted: no noise does.
    """
    fresh = promised_noise(event, epsilon, delta, steps, beside)
    found = noise_after(history, event.having(noise_multiplier=fresh), steps, beside, epsilon, delta)
    if found is None:
        raise BudgetExhausted(
            f"earlier runs leave too little of epsilon {epsilon:g} at delta {delta:g} for {steps} steps at any noise: "
            "ask for fewer rounds, or agree on a larger budget"
        )
    return found


def rounds_within(job: Job, plan: PrivacyPlan, history: History = FRESH) -> int:
    """Return how many rounds the budget lasts at the plan's noise, from 0 to ``MOST_ROUNDS``."""
    before, local = paid_before(job), releases_of_round(job)

    def fits(rounds: int) -> bool:
        return price_after(history, [*before, plan.release(rounds * local)], plan.delta)[0] <= plan.max_epsilon

    return last_within(fits, MOST_ROUNDS)


def last_within(fits: Callable[[int], bool], most: int) -> int:
    """Return an n from 0 to ``most`` such that n fits (or is 0) and n + 1 does not (or is above ``most``).

    ``fits`` is called in doubling steps and then by halving, so it must not hold again once it has failed.

    >>> last_within(lambda n: n * n <= 50, 1000), last_within(lambda n: False, 9), last_within(lambda n: True, 9)
    (7, 0, 9)
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def signal_to_noise(
    plans: Sequence[PrivacyPlan],
    shares: Sequence[float],
    steps: int,
    trained_numbers: int,
    *,
    margin: float = 1.0,
    alignment: tuple[float, float] | None = None,
) -> SignalToNoise:
    """Return the run's signal-to-noise figure.

    Args:
        plans: one per site, at least one.
        shares: the sites' averaging weights; only ratios matter.
        steps: of a site in the whole run.
        trained_numbers: how many numbers are clipped and noised together.
        margin: factor on the noise where equal bits are not certain (``rounding_margin``).
        alignment: length of the mean clipped gradient over the clip norm, in [0, 1], and its upper end; None: not
            measured.
    """
    total = math.fsum(shares)
    squares = math.fsum(
        (p / total * plan.gradient_noise_std / plan.event.clip_norm) ** 2 for p, plan in zip(shares, plans, strict=True)
    )
    return SignalToNoise(trained_numbers, steps, margin * math.sqrt(trained_numbers * squares), alignment)

"""The noise, the number of rounds, or the sample rate that a privacy budget allows.

Every answer is priced again: it is within the budget, and the next step is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedveil.common.check import one_of
from fedveil.common.errors import BudgetExhausted, ConfigError, PrivacyError
from fedveil.experiments.planner.payers import payer_of
from fedveil.experiments.planner.price import MOST_ROUNDS, last_within, noise_for_all, paid_before, releases_of_round
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import LEAST_NOISE
from fedveil.privacy.privacy_filter import FRESH, History, price_after
from fedveil.strategies.job import Job

RATES = (*(float(f"{digits}e{power}") for power in range(-7, -2) for digits in range(100, 1000)), 1.0)
"""Sample rates of three digits, from 1e-5 to 1: the candidates of ``sample_rate_for``."""


@dataclass(frozen=True)
class Found:
    """An answer, what it costs, and what one step further would cost."""

    setting: str
    """Key of the setting that takes the answer."""
    value: float
    epsilon: float
    budget: float
    next_value: float | None
    """One step dearer; None when the search ends here for another reason than the budget."""
    next_epsilon: float | None


def find(job: Job, quantity: str, history: History = FRESH) -> Found:
    """Return what the budget ``privacy.epsilon`` allows of ``quantity``: noise, rounds or sample-rate.

    Raises:
        ConfigError: privacy is off, the quantity is unknown, or it needs ``privacy.noise-multiplier``.
        BudgetExhausted: the budget allows not even the smallest step.
    """
    one_of(QUANTITIES, find=quantity)
    if not job.claim.per:
        raise ConfigError(
            f"privacy.mode is {job.config.privacy.mode!r}: there is no budget to plan for; set it to 'dp-sgd'"
        )
    if quantity != "noise" and not job.config.privacy.noise_multiplier:
        raise ConfigError(
            f"--find {quantity} needs a noise multiplier: set privacy.noise-multiplier (0 lets the run choose it)"
        )
    found = QUANTITIES[quantity](job, history)
    if not found.epsilon <= found.budget or (found.next_epsilon is not None and found.next_epsilon <= found.budget):
        raise PrivacyError(f"{found.setting} = {found.value} did not stand its check: this is a fault of FedVeil")
    return found


def noise_for(job: Job, history: History) -> Found:
    """Return the least noise multiplier that keeps every round within the budget, to a thousandth."""
    budget, steps = job.config.privacy.epsilon, job.config.rounds * releases_of_round(job)
    before = tuple(paid_before(job))
    event = job.event
    noise = noise_for_all(history, event, steps, before, budget, _delta(job, history))
    return _found(
        job,
        history,
        "privacy.noise-multiplier",
        noise,
        None if noise <= LEAST_NOISE else noise / 1.001,
        lambda value: Release(event.having(noise_multiplier=value), steps),
    )


def rounds_for(job: Job, history: History) -> Found:
    """Return the most rounds that stay within the budget at the configured noise."""
    event, local = job.event, releases_of_round(job)

    def release(rounds: float) -> Release:
        return Release(event, int(rounds) * local)

    rounds = last_within(lambda count: _fits(job, history, release(count)), MOST_ROUNDS)
    if not rounds:
        raise _nothing(job, "one round")
    return _found(job, history, "rounds", rounds, rounds + 1 if rounds < MOST_ROUNDS else None, release)


def sample_rate_for(job: Job, history: History) -> Found:
    """Return the largest sample rate of three digits that stays within the budget at the configured noise."""
    event, steps = job.event, job.config.rounds * releases_of_round(job)

    def release(rate: float) -> Release:
        return Release(event.having(sample_rate=rate), steps)

    count = last_within(lambda n: _fits(job, history, release(RATES[n - 1])), len(RATES))
    # The rate of the first plan is cheaper than those around it, where the noise is its own, too.
    planned = [each.event.sample_rate for each in history.commitment.releases]
    rates = [rate for rate in planned if _fits(job, history, release(rate))]
    if not count and not rates:
        raise _nothing(job, f"a sample rate of {RATES[0]:g}")
    rate = max([*RATES[:count][-1:], *rates])
    following = next((other for other in RATES if other > rate), None)
    return _found(job, history, payer_of(job).rate_setting, rate, following, release)


QUANTITIES: dict[str, Callable[[Job, History], Found]] = {
    "noise": noise_for,
    "rounds": rounds_for,
    "sample-rate": sample_rate_for,
}


def _price(job: Job, history: History, release: Release) -> float:
    return price_after(history, [*paid_before(job), release], _delta(job, history))[0]


def _delta(job: Job, history: History) -> float:
    return min(job.config.privacy.delta, history.delta)


def _fits(job: Job, history: History, release: Release) -> bool:
    return _price(job, history, release) <= job.config.privacy.epsilon


def _nothing(job: Job, least: str) -> BudgetExhausted:
    privacy = job.config.privacy
    return BudgetExhausted(
        f"at noise multiplier {privacy.noise_multiplier:g} not even {least} stays within epsilon {privacy.epsilon:g} "
        f"at delta {privacy.delta:g}: raise privacy.noise-multiplier or privacy.epsilon"
    )


def _found(
    job: Job,
    history: History,
    setting: str,
    value: float,
    following: float | None,
    release: Callable[[float], Release],
) -> Found:
    dearer = None if following is None else _price(job, history, release(following))
    return Found(setting, value, _price(job, history, release(value)), job.config.privacy.epsilon, following, dearer)

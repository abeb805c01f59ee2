"""What a run's public settings ask of a site in one round: the least noise, and the usual one."""

from __future__ import annotations

import dataclasses

from common.errors import BudgetExhausted
from common.messages.round import TrainResult
from common.privacy.plan import PrivacyPlan
from strategies.job import Job


def least_plan(job: Job, result: TrainResult) -> PrivacyPlan | None:
    """Return the least that an honest site does in this round, whatever its policy; None without privacy.

    A site calibrates its noise for the rounds that its policy lets it join, after a start that may cost it
    less than the run's. Who joins one round needs least; only noise that the run sets itself holds for all.

    Raises:
        FedVeilError: no plan follows from the size that the site declares.
    """
    config, source = job.config, job.strategy.gradient
    if not config.privacy.on:
        return None
    plan = PrivacyPlan.for_run(config.privacy, config.training, config.training.local_steps, result.public_size)
    if source is None or result.round_number:
        return plan
    return dataclasses.replace(
        plan,
        clip_norm=source.clip_norm,
        noise_multiplier=source.noise_multiplier,
        sample_rate=source.sample_rate,
        expected_batch_size=source.sample_rate * result.public_size,
    )


def usual_noise(job: Job, result: TrainResult) -> float:
    """Return the noise multiplier, in this round, of a site that has no rule of its own and joins every round.

    Where the budget is too small for every round, only sites with rules of their own can have answered: then it is
    the least one.

    Raises:
        ConfigError: the run makes no privacy claim.
        FedVeilError: as for least_plan.
    """
    config, source = job.config, job.strategy.gradient
    if source and not result.round_number:
        return source.noise_multiplier
    terms = (config.privacy, config.training)
    before = [source.release()] if source and not source.public_data else []
    try:
        plan = PrivacyPlan.for_run(*terms, config.total_steps, result.public_size, before)
    except BudgetExhausted:
        plan = PrivacyPlan.for_run(*terms, config.training.local_steps, result.public_size)
    return plan.noise_multiplier

"""The terms of a run for a site in one round: the least noise, and the usual one."""

from __future__ import annotations

from fedveil.common.errors import BudgetExhausted
from fedveil.common.messages.round import TrainResult
from fedveil.common.starts import PaidStart
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.strategies.job import Job


def least_plan(job: Job, result: TrainResult) -> Plan:
    """Return the least that an honest site does in this round, whatever its policy.

    Raises:
        FedVeilError: no plan follows from the size that the site declares.
    """
    plan = job.site_plan(job.config.training.local_steps, result.public_size)
    return _of_round(job, result, plan) if isinstance(plan, PrivacyPlan) else plan


def paid_plan(job: Job, result: TrainResult) -> PrivacyPlan:
    """Return the least that a site is charged for in this round.

    A site calibrates its noise for the rounds that its policy lets it join, after a start that may cost it
    less than the run's. Who joins one round needs least; only noise that the run sets itself holds for all.

    Raises:
        ConfigError: nothing is charged in this run.
        FedVeilError: as for least_plan.
    """
    return _of_round(job, result, job.plan(job.config.training.local_steps, result.public_size))


def _of_round(job: Job, result: TrainResult, plan: PrivacyPlan) -> PrivacyPlan:
    if result.round_number or not isinstance(job.origin, PaidStart):
        return plan
    return job.origin.plan(plan, result.public_size)


def usual_noise(job: Job, result: TrainResult) -> float:
    """Return the noise multiplier, in this round, of a site that has no rule of its own and joins every round.

    Where the budget is too small for every round, only sites with rules of their own can have answered: then it is
    the least one.

    Raises:
        ConfigError: nothing is charged in this run.
        FedVeilError: as for least_plan.
    """
    config, paid = job.config, job.origin.release()
    if paid and not result.round_number:
        return paid.event.noise_multiplier
    try:
        plan = job.plan(config.total_steps, result.public_size, [paid] if paid else [])
    except BudgetExhausted:
        plan = job.plan(config.training.local_steps, result.public_size)
    return plan.event.noise_multiplier

"""Plan a job for real sites before it is sent, from settings, declared numbers and public files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedveil.common.config.run import RunConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import public_test
from fedveil.common.errors import ConfigError, PrivacyError
from fedveil.common.files import expanded
from fedveil.common.paths import is_path
from fedveil.common.words import counted
from fedveil.experiments.planner.payers import payer_of
from fedveil.experiments.planner.price import rounds_within, site_plans
from fedveil.privacy.claim import NO_CLAIM
from fedveil.privacy.plan import PrivacyPlan
from fedveil.server.aggregation import WORTH_TELLING, held_down
from fedveil.strategies.job import Job


def warnings_ahead(job: Job, sites: int, records: int) -> list[str]:
    """Return what a plan warns of in a job, as if its sites had equal parts of the records; nothing is loaded.

    Args:
        job: the run.
        sites: that are expected, at least 1.
        records: that they have declared together, or persons; 0: unknown, and what follows from sizes is not looked at.

    Raises:
        ConfigError: the plan refuses the job, or a public file of it is not there.
        DataError: the public test records cannot be read.
    """
    _check_public(job.config)
    size = records // sites
    if not size:
        return [] if job.claim.per else [_no_claim()]
    sizes = [size] * sites
    try:
        plans = site_plans(job, sizes[:1]) * sites
    except PrivacyError as error:
        said = f"with {counted(sites, 'site')} of {size:,} {job.unit.name}s each, as data.records says"
        raise ConfigError(f"{error} ({said})") from error
    given = job.config.privacy.noise_multiplier
    lasts = next((rounds_within(job, plan) for plan in plans[:1] if given), None)
    return warnings_of_plans(job, sizes, plans, lasts)


def warnings_of_plans(job: Job, sizes: Sequence[int], plans: Sequence[PrivacyPlan], lasts: int | None) -> list[str]:
    """Return what a person should know before a run starts, by its sites' plans alone.

    Args:
        job: the run.
        sizes, plans: of its sites.
        lasts: rounds that the budget lasts; None: all.
    """
    rounds, payer = job.config.rounds, payer_of(job)
    if not job.claim.per:
        return [_no_claim()]
    found = []
    if lasts is not None and lasts < rounds:
        found.append(
            f"the budget ends after round {lasts}: rounds {lasts + 1} to {rounds} will be refused; raise "
            "privacy.noise-multiplier, or set it to 0"
        )
    if (times := payer.noise_of_shares(job, sizes, plans)) >= WORTH_TELLING:
        found.append(held_down(job.config.max_share, sizes, times))
    return [*found, *payer.warnings(job, sizes)]


def _no_claim() -> str:
    return f"claim: {NO_CLAIM}"


def _check_public(config: RunConfig) -> None:
    """Look at the server's public files; a relative path is the server's to find."""
    model, test = config.model.name, config.data.test or config.data.name
    if is_path(model) and expanded(model).is_absolute() and not expanded(model).exists():
        raise ConfigError(
            f"model.name is {model!r}, and there is no such folder: name one that is here and at each site"
        )
    if test in DATASETS or Path(test).is_absolute():
        public_test(config.data, config.model.task)

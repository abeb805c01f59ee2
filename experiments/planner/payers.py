"""The payers of a run's rounds in its plan: one row for each place where noise is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from fedveil.client.budget import plan_of
from fedveil.client.ledger.rows import Terms
from fedveil.client.site import Site
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import History
from fedveil.server.aggregation import capped, most_of, noise_grown
from fedveil.server.collect.trusted import sums_plan
from fedveil.strategies.job import Job


class SitesPay:
    """Each site adds its noise, and its ledger pays for its steps."""

    whose: ClassVar[str] = "of each site"
    """Of whom a table's ε is."""
    counts: ClassVar[str] = "steps"
    """What a plan counts a round as."""
    rate_setting: ClassVar[str] = "training.sample-rate"
    """The setting by which a release draws."""

    def plans(self, job: Job, sizes: Sequence[int], history: History) -> list[PrivacyPlan]:
        """Return each site's plan, as the run will make it.

        Raises:
            PrivacyError: delta does not fit a size, or the budget is spent by earlier runs or the initialisation.
        """
        return [plan_of(job, planned_site(size), Terms(math.inf, history.delta), history) for size in sizes]

    def releases_of_round(self, job: Job) -> int:
        """Return how many releases a round is."""
        return job.config.training.local_steps

    def noises(self, plans: Sequence[PrivacyPlan], sites: int) -> list[float | None]:
        """Return the noise multiplier of each site; None: it adds none."""
        del sites
        return [plan.event.noise_multiplier for plan in plans]

    def stated(self, plans: Sequence[PrivacyPlan]) -> Sequence[PrivacyPlan]:
        """Return the plans of which a site's reply states the price."""
        return plans

    def weights(self, job: Job, sizes: Sequence[int]) -> list[float]:
        """Return the weights of sites of these sizes in an average, all with the run's noise; only ratios matter."""
        return capped([float(size) for size in sizes], most_of(len(sizes), job.config.max_share))

    def noise_of_shares(self, job: Job, sizes: Sequence[int], plans: Sequence[PrivacyPlan]) -> float:
        """Return how many times the noise of the average is what it would be by size alone."""
        return noise_grown(self.weights(job, sizes), sizes, [plan.gradient_noise_std for plan in plans])

    def bare_signal(self, trained: int, plans: Sequence[PrivacyPlan]) -> float | None:
        """Return the noise of a round in clips where no record says how long a signal is; None: records do."""
        del trained, plans
        return None

    def note(self, job: Job, plans: Sequence[PrivacyPlan]) -> str:
        """Return the note below the table of rounds, or an empty text."""
        del job, plans
        return ""

    def warnings(self, job: Job, sizes: Sequence[int]) -> list[str]:
        """Return what a person should know of sites of these sizes."""
        if min(job.config.training.sample_rate * size for size in sizes) >= 1:
            return []
        return [f"a site's expected batch is below one {job.unit.name}: most of its steps are noise alone"]


class SumPays(SitesPay):
    """Each site adds a part of the noise of a sum, and its ledger pays for its steps."""

    def weights(self, job: Job, sizes: Sequence[int]) -> list[float]:
        """Return the sizes: a sum holds no site down."""
        del job
        return [float(size) for size in sizes]

    def noise_of_shares(self, job: Job, sizes: Sequence[int], plans: Sequence[PrivacyPlan]) -> float:
        """Return 1: no site is held down."""
        del job, sizes, plans
        return 1.0


class ServerPays(SitesPay):
    """A trusted server adds the noise, and its ledger pays for one sum a round."""

    whose: ClassVar[str] = "of every site, by the server's ledger"
    counts: ClassVar[str] = "sums"
    rate_setting: ClassVar[str] = "privacy.site-rate"

    def plans(self, job: Job, sizes: Sequence[int], history: History) -> list[PrivacyPlan]:
        """Return the one plan, of the sum, for every site."""
        return [sums_plan(job, history)] * len(sizes)

    def releases_of_round(self, job: Job) -> int:
        """Return 1: the sum."""
        del job
        return 1

    def noises(self, plans: Sequence[PrivacyPlan], sites: int) -> list[float | None]:
        """Return None for each site."""
        del plans
        return [None] * sites

    def stated(self, plans: Sequence[PrivacyPlan]) -> Sequence[PrivacyPlan]:
        """Return none: no site pays."""
        del plans
        return []

    def noise_of_shares(self, job: Job, sizes: Sequence[int], plans: Sequence[PrivacyPlan]) -> float:
        """Return 1: the noise is the sum's."""
        del job, sizes, plans
        return 1.0

    def bare_signal(self, trained: int, plans: Sequence[PrivacyPlan]) -> float | None:
        """Return the noise against updates as long as the clip."""
        plan = plans[0]
        return math.sqrt(trained) * plan.gradient_noise_std / plan.event.clip_norm

    def note(self, job: Job, plans: Sequence[PrivacyPlan]) -> str:
        """Return how the sum is noised and divided."""
        event = plans[0].event
        return (
            f"The server noises the sum with σ {event.noise_multiplier:.5g} clips, and divides it by "
            f"{plans[0].expected_batch_size:g}: {job.config.privacy.cohort} sites, drawn at {event.sample_rate:g}."
        )

    def warnings(self, job: Job, sizes: Sequence[int]) -> list[str]:
        """Return whether there are more sites than the cohort has."""
        cohort = job.config.privacy.cohort
        if len(sizes) <= cohort:
            return []
        return [f"{len(sizes)} sites are more than privacy.cohort, which is {cohort}: no round will begin"]


class NobodyPays(SitesPay):
    """Nothing is promised and nothing is charged."""

    def plans(self, job: Job, sizes: Sequence[int], history: History) -> list[PrivacyPlan]:
        """Return none."""
        del job, sizes, history
        return []

    def noises(self, plans: Sequence[PrivacyPlan], sites: int) -> list[float | None]:
        """Return None for each site."""
        del plans
        return [None] * sites

    def noise_of_shares(self, job: Job, sizes: Sequence[int], plans: Sequence[PrivacyPlan]) -> float:
        """Return 1: there is no noise."""
        del job, sizes, plans
        return 1.0

    def warnings(self, job: Job, sizes: Sequence[int]) -> list[str]:
        """Return none."""
        del job, sizes
        return []


PAYERS: dict[str, SitesPay] = {
    "at the site": SitesPay(),
    "in the sum": SumPays(),
    "at the server": ServerPays(),
    "nowhere": NobodyPays(),
}
"""By where a mechanism adds the noise that its price counts on."""


def payer_of(job: Job) -> SitesPay:
    """Return who pays for the rounds of a run."""
    return PAYERS[job.mechanism.noised]


def planned_site(size: int) -> Site:
    """Return a site of which nothing is known but its public size: no record, no ledger, no policy."""
    return Site("planned", Dataset("planned", (), ()), "planned", size, Path())

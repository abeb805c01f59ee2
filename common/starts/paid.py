"""Starts from the sites' records: released once, clipped, noised and charged; or as they are, without privacy."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from fedveil.common.adapters import Place
from fedveil.common.check import POSITIVE, Interval
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.starts.base import Needs, Start, seeded
from fedveil.common.starts.gradient import open_weights
from fedveil.common.tasks import Record
from fedveil.privacy.accountant import INITIALISATION
from fedveil.privacy.accounting import Release, check_terms
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised_noise

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


@dataclass(frozen=True)
class PaidStart(Start):
    """A start from one release of every site's records: clipped, noised, and charged to its ledger."""

    needs: ClassVar[Needs] = "paid release"
    clip_norm: ClassVar[float] = 1.0
    """L2 bound of one record's statistic over all adapted layers together."""
    on_features: ClassVar[bool] = False
    """Whether the release is made from features of the frozen base model, which are computed before it."""
    on_losses: ClassVar[bool] = False
    """Whether it is made from the records' losses, and from no gradient."""

    noise_multiplier: Annotated[float, POSITIVE, Unit("clip norms")] = 5.0
    """Standard deviation of the noise of the one release over its clip norm."""

    @property
    def draw_rate(self) -> float:
        """Chance of each record to be used."""
        return 1.0

    def release(self, least_noise: float = 0.0) -> Release:
        """Return the one release; also for a run's plan, before any site is known."""
        event = sampled_gaussian(max(self.noise_multiplier, least_noise), self.draw_rate, self.clip_norm)
        return Release(event, 1, INITIALISATION)

    @property
    def passes(self) -> int:
        """How often each record that is drawn passes the model for one release."""
        return 1

    def plan(self, whole: PrivacyPlan, public_size: int, least_noise: float = 0.0) -> PrivacyPlan:
        """Return the plan of the release, by which a site acts and the server judges.

        Args:
            whole: the site's plan of the run, whose budget and delta hold here too.
            public_size: as the site declares it, in records.
            least_noise: the least noise multiplier that the site's policy allows.

        Raises:
            MechanismError: the run's mechanism does what is priced as another kind of event than the release is.
        """
        event = self.release(least_noise).event
        return dataclasses.replace(whole, event=event, expected_batch_size=event.sample_rate * public_size)

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return the context in which what the release is made from takes a gradient: the adapted layers' weights."""
        return open_weights(model)

    @abstractmethod
    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Site: return what it releases of records that the plan draws: clipped, noised, over a public divisor.

        ``before_pass`` is called before each pass, and may raise. Without a record it is noise alone.
        """

    def found(self, statistic: AdapterState, rank: int, noise: float) -> str:
        """Server: return what of the sites' mean statistic is above its noise, in words; empty: nothing is said.

        Args:
            statistic: what ``privatise`` gave, averaged.
            rank: how many directions the run takes of it.
            noise: standard deviation of one of its numbers.
        """
        del statistic, rank, noise
        return ""


@dataclass(frozen=True)
class SampledStart(PaidStart):
    """A paid start from a sample of each site's records."""

    sample_rate: Annotated[float, Interval(0, 1), Unit("probability")] = 0.1
    """Chance of each record to be used."""

    @property
    def draw_rate(self) -> float:
        """Return it."""
        return self.sample_rate


@dataclass(frozen=True)
class PaidByShare(SampledStart):
    """A paid start whose noise follows from the part of the run's budget that it takes."""

    share: Annotated[float, Interval(0, 1, or_zero=True), RATIO] = 0.25
    """Part of the run's budget for round 0, where ``noise-multiplier`` is left at its default: its releases have
    share^(-1/2) times the noise with which they would use up all. 0: the default itself."""

    def within(self, privacy: PrivacyConfig) -> Self:
        """Return the start with the noise of its share of the budget: of many small steps, 1/σ² adds up about so.

        Of one release that is not small the share is of 1/σ² as well, which is what its noise is worth.
        """
        if not self.share or self.noise_multiplier != PaidStart.noise_multiplier or not privacy.mechanism.charged:
            return self
        count = self.release().count
        event = sampled_gaussian(1.0, self.draw_rate, self.clip_norm)
        check_terms([Release(event, count)], privacy.delta)  # a server may ask for any
        least = promised_noise(event, privacy.epsilon, privacy.delta, count)
        return dataclasses.replace(self, noise_multiplier=least / math.sqrt(self.share))


@dataclass(frozen=True)
class PaidGradient(SampledStart):
    """A paid start of the records' gradients: what LoRA-SB and LoRA-GA take, each of another part of them."""

    @property
    def unfit(self) -> str:
        """Name the start that other runs have."""
        return "is a release that privacy.mode 'dp-sgd' alone pays for: use 'public-gradient', from public records"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the sites have answered."""
        return seeded(place, wanted)


@dataclass(frozen=True)
class UnpaidStart(Start):
    """A start from every site's records as they are; no privacy."""

    needs: ClassVar[Needs] = "records, without privacy"

    sample_rate: Annotated[float, Interval(0, 1), Unit("probability")] = 0.1
    """Chance of each record to be used; a site uses at least one."""

"""The interface of a start.

A start says which directions an adapter's factors begin in. Most follow from the seed or the base
weights, so that server and sites derive them and compare a fingerprint. Others need a statistic first,
such as a mean gradient: round 0 asks for it, at the server or at the sites, and what the statistic
gives travels once. What records are used, and what that costs, is stated here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from fedveil.common.adapters import Adapter, Place
from fedveil.common.check import CLIP_NORM, POSITIVE, Interval
from fedveil.common.config.fields import RATIO, Unit, check_fields
from fedveil.common.config.sections import PrivacyConfig, RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import METRIC, AdapterState, Factors
from fedveil.common.messages.wire import Layout
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.common.starts.gradient import open_weights
from fedveil.common.tasks import Batch, Record
from fedveil.privacy.accountant import INITIALISATION
from fedveil.privacy.accounting import Release, check_terms
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised_noise
from fedveil.privacy.randomness import stream

Needs = Literal["nothing", "weights", "public records", "paid release", "records, without privacy"]
Asked = Literal["nobody", "server", "sites"]
_ASKED: Mapping[Needs, Asked] = {
    "nothing": "nobody",
    "weights": "nobody",
    "public records": "server",
    "paid release": "sites",
    "records, without privacy": "sites",
}

_UNFIT: Mapping[Needs, str] = {
    "records, without privacy": "sends what private records hold, which no ε covers: choose another",
    "paid release": "is a release that privacy.mode 'dp-sgd' alone pays for: choose another",
}


@dataclass(frozen=True)
class Labels:
    """The labels of a run's records, as far as they are public."""

    names: tuple[str, ...]
    """In order; none: records have no labels."""
    phrases: tuple[tuple[str, ...], ...]
    """Of each label, phrases about it; at least its name."""


@dataclass(frozen=True)
class Start(ABC):
    """Where the factors begin; options of a start are its fields, which declare what they may be."""

    name: ClassVar[str]
    """What ``adapter.start`` calls it."""
    needs: ClassVar[Needs]
    """What it is made from, besides the run's public seed."""
    gives: ClassVar[tuple[str, ...]] = ("A", "B")
    """The directions that it has; an adapter that asks for more is refused."""
    from_seed: ClassVar[tuple[str, ...]] = ()
    """Those of them that a statistic says nothing of: they stay as ``factors`` has them. An adapter that begins with
    these alone is refused, because round 0 would be for nothing."""
    opens_weights: ClassVar[bool] = False
    """Whether it is made from a gradient of the adapted layers' own weights, at the server or the sites."""

    def __post_init__(self) -> None:
        check_fields(self, "start.")

    @property
    def asked(self) -> Asked:
        """The party that computes a statistic in round 0, or ``nobody`` without a round 0."""
        return _ASKED[self.needs]

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Raise ConfigError, saying what to do, unless the run can start so."""
        if not adapter.directions and self.asked != "nobody" and METRIC not in self.gives:
            raise ConfigError(
                f"adapter.start {self.name!r} asks the {self.asked} where factors begin, and the adapter "
                f"{adapter.name!r} has no factors: leave adapter.start at 'orthonormal'"
            )
        if unfit := config.privacy.mechanism.unfit_start(self.needs, self.unfit):
            raise ConfigError(f"adapter.start {self.name!r} {unfit}")

    def resolved(self) -> Self:
        """Return the start with what its options leave open filled in."""
        return self

    def within(self, privacy: PrivacyConfig) -> Self:
        """Return the start with what its options leave to the run's budget filled in."""
        del privacy
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public text that it is made from, on which server and sites must agree; empty: none is."""
        return ""

    @abstractmethod
    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return what server and sites derive: ``A``, shape (rank, into), and ``B``, shape (out, rank), if ``wanted``.

        Float32, on the CPU. A start that needs a statistic returns what holds until it is there.
        """

    @property
    def unfit(self) -> str:
        """What is said of it where the run's mechanism has no start that is made of what it needs."""
        return _UNFIT.get(self.needs, f"needs {self.needs}, of which this privacy.mode makes no start: choose another")

    # --- round 0, of a start that needs a statistic ---

    def layout(self, model: FederatedModel) -> Layout:
        """Return names and shapes of the statistic, by layer."""
        del model
        return {}

    def check_public(self, config: RunConfig) -> str:
        """Server: refuse public text that is not public to this run; return what there is to say of it, in words.

        Raises:
            DataError: it is among the run's records, or cannot be read.
        """
        del config
        return ""

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Server: return the statistic of public records, for a start that needs those.

        Raises:
            ConfigError: the public records do not fit the run.
            DataError: they cannot be read.
        """
        raise self._asks_nobody()

    def measure(self, model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
        """Return the mean statistic of records, given in parts. No privacy.

        Raises:
            ModelError: the records say nothing.
        """
        raise self._asks_nobody()

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Server: return ``A`` and ``B`` from one layer's mean statistic, as ``factors`` does, and ``R`` if it moves W.

        Directions that are ``from_seed`` are not among them.
        """
        raise self._asks_nobody()

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Server: return the sites' mean statistic, with what public records add to it once it is there.

        Args:
            model: at the start of the run.
            config: the run's.
            labels: of the records.
            statistic: what ``measure`` or ``privatise`` gave, averaged.
        """
        del model, config, labels
        return statistic

    def around_head(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Server: return the statistic by the model as it is, where the head was fitted before the adapter.

        Empty: factors stay where they began. Arguments and errors as in ``from_public``.
        """
        del model, config, labels
        return {}

    @property
    def way(self) -> float:
        """How many times as long as one step's gradient a site's statistic can be."""
        return 1.0

    # --- what it costs ---

    def release(self, least_noise: float = 0.0) -> Release | None:
        """Return what a site is charged that adds at least ``least_noise``, over the clip norm; None: nothing."""
        del least_noise
        return None

    def _asks_nobody(self) -> TypeError:
        return TypeError(f"the start {self.name!r} asks {self.asked} for a statistic, and not so")


@dataclass(frozen=True)
class PaidStart(Start):
    """A start from one release of every site's records: clipped, noised, and charged to its ledger."""

    needs: ClassVar[Needs] = "paid release"
    on_features: ClassVar[bool] = False
    """Whether the release is made from features of the frozen base model, which are computed before it."""

    sample_rate: Annotated[float, Interval(0, 1), Unit("probability")] = 0.1
    """Chance of each record to be used."""
    noise_multiplier: Annotated[float, POSITIVE, Unit("clip norms")] = 5.0
    """Standard deviation of the noise of the one release over its clip norm."""
    clip_norm: Annotated[float, CLIP_NORM, Unit("L2 norm")] = 1.0
    """L2 bound of one record's statistic over all adapted layers together."""

    def release(self, least_noise: float = 0.0) -> Release:
        """Return the one release; also for a run's plan, before any site is known."""
        event = sampled_gaussian(max(self.noise_multiplier, least_noise), self.sample_rate, self.clip_norm)
        return Release(event, 1, INITIALISATION)

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
class PaidByShare(PaidStart):
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
        event = sampled_gaussian(1.0, self.sample_rate, self.clip_norm)
        check_terms([Release(event, count)], privacy.delta)  # a server may ask for any
        least = promised_noise(event, privacy.epsilon, privacy.delta, count)
        return dataclasses.replace(self, noise_multiplier=least / math.sqrt(self.share))


@dataclass(frozen=True)
class PaidGradient(PaidStart):
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


def seeded(place: Place, wanted: Collection[str]) -> Factors:
    """Return orthonormal rows A and orthonormal columns B from public streams of the run's seed, each its own."""

    def rows(factor: str, columns: int) -> Tensor:
        return orthonormal_rows(place.rank, columns, stream(place.seed, "adapter", place.layer, factor))

    made = {"A": lambda: rows("A", place.into), "B": lambda: rows("B", place.out).T.contiguous()}
    return {factor: make() for factor, make in made.items() if factor in wanted}

"""The interface of a start.

A start says which directions an adapter's factors begin in. Most follow from the seed or the base
weights, so that server and sites derive them and compare a fingerprint. Others need a statistic first,
such as a mean gradient: round 0 asks for it, at the server or at the sites, and what the statistic
gives travels once. What records are used, and what that costs, is stated here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from fedveil.common.adapters import Adapter, Place
from fedveil.common.config.fields import check_fields
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import METRIC, AdapterState, Factors
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.common.tasks import Batch
from fedveil.privacy.accounting import Release
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.derived import Source
    from fedveil.common.messages.blocks import Layout
    from fedveil.common.model.federated import FederatedModel

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
    votes: ClassVar[bool] = False
    """Whether the sites' records vote: then a site's policy must name the start (``votes``)."""
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

    def sources(self) -> Sequence[Source]:
        """Server: return the earlier runs whose adapters it begins at."""
        return ()

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

    def shown_layout(self, began: AdapterState) -> Layout:
        """Return names and shapes of the public tensors that round 0's task brings to a site; usually none.

        Args:
            began: the adapter as server and sites derive it.
        """
        del began
        return {}

    def shown(self, adapter: Adapter, began: AdapterState) -> AdapterState:
        """Server: return these tensors.

        Raises:
            DataError: what they are made from cannot be read, or is of another adapter.
        """
        del adapter, began
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


def seeded(place: Place, wanted: Collection[str]) -> Factors:
    """Return orthonormal rows A and orthonormal columns B from public streams of the run's seed, each its own."""

    def rows(factor: str, columns: int) -> Tensor:
        return orthonormal_rows(place.rank, columns, stream(place.seed, "adapter", place.layer, factor))

    made = {"A": lambda: rows("A", place.into), "B": lambda: rows("B", place.out).T.contiguous()}
    return {factor: make() for factor, make in made.items() if factor in wanted}

"""What a federated strategy for low-rank adapters is.

A strategy is pure: states in, states out. It knows no Flower, no model, no data and no noise, and
both halves (server and site) stand in one file that reads like its paper. Averaging weights come
from public sizes and told noise; everything it sees from a site has passed the site's mechanism.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from common.errors import ProtocolError
from common.privacy.accounting import INITIALISATION, Release
from common.tensors import merge, select, weighted_sum
from common.types import HEAD, AdapterState


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round; enough to go on after a crash."""

    round_number: int
    """Rounds done; 0 before the first."""
    adapter: AdapterState
    """The global adapter, complete: every factor of every layer, and the head."""
    memory: AdapterState = field(default_factory=dict)
    """Whatever else the strategy or the server's optimiser needs, as tensors."""


FIRST_MOMENT, SECOND_MOMENT, STEPS = MOMENTS = "adam.m/", "adam.v/", "adam.t/"
"""Prefixes of layer names under which the server optimiser's moments, and their steps, stand in the memory."""
ServerStep = Callable[[ServerState, ServerState], ServerState]
"""From the state before a round and the one averaged to: the state after the server optimiser's step."""


@dataclass(frozen=True)
class Contribution:
    """What one site sent in one round."""

    site: str
    weight: float
    """The site's declared public size, less where it tells more noise than the run asks for; only ratios matter."""
    state: AdapterState


@dataclass(frozen=True)
class GradientSource:
    """A full gradient of the adapted layers that a strategy wants before round 1 (as "round 0")."""

    public_data: str = ""
    """Taken by the server from this public data set; empty: by every site from its own records."""
    public_records: int = 0
    sample_rate: float = 1.0
    """At a site: chance of each record to be used."""
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    """At a site: above 0, the gradient is clipped, noised and charged; 0 is for runs without privacy."""

    def release(self, least_noise: float = 0.0) -> Release:
        """Return what it costs a site that adds at least ``least_noise``, over the clip norm.

        Raises:
            ConfigError: there is no noise: without privacy nothing is priced.
        """
        return Release(max(self.noise_multiplier, least_noise), self.sample_rate, 1, kind=INITIALISATION)


@dataclass(frozen=True)
class Strategy(ABC):
    """One aggregation algorithm; options of a strategy are its fields."""

    name: ClassVar[str]
    paper: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]]
    """Adapters it is defined for; the first is the default."""
    sent: ClassVar[tuple[str, ...]]
    """Factors that a site sends each round (and the head, when it is trained)."""
    received: ClassVar[tuple[str, ...]]
    """Factors that a site receives each round (and the head, when it is trained)."""
    exact: ClassVar[bool]
    """Whether the new weights are exactly the mean of the sites' weights."""
    noise: ClassVar[str]
    """How a site's noise x on what it trains enters a layer's weights, and the norm of that per step."""
    privacy: ClassVar[str] = "dp-sgd, none"
    """Privacy modes it may run in."""

    def check(self, *, private: bool) -> None:
        """Raise ConfigError, saying what to do, if the options do not fit the privacy mode."""
        del private

    def adapter_init(self, configured: str) -> str:
        """Return how the adapter starts; most strategies leave it to ``adapter.init``."""
        return configured

    @property
    def gradient(self) -> GradientSource | None:
        """What round 0 must bring, or None when the strategy starts without a gradient."""
        return None

    @property
    def sent_once(self) -> tuple[str, ...]:
        """Factors that a site receives with the first task it gets and keeps."""
        return ()

    def start(self, adapter: AdapterState) -> ServerState:
        """Return the state before round 1 (or round 0) from the adapter's start."""
        return ServerState(0, adapter)

    def begin(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Server: use what round 0 brought, one full gradient ``G`` per layer."""
        del contributions
        return state

    def basis(self, state: ServerState) -> AdapterState:
        """Server: return what travels once."""
        return select(state.adapter, self.sent_once)

    def downlink(self, state: ServerState) -> AdapterState:
        """Server: return what travels to every site. Full state, never an increment: sites may have missed rounds."""
        return select(state.adapter, (*self.received, *_head_factors(state.adapter)))

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Site: return what to write into the model, from the shared start and what was received."""
        return merge(start, received)

    def contribution(self, trained: AdapterState) -> AdapterState:
        """Site: return what travels to the server, from the trained tensors."""
        return select(trained, (*self.sent, *_head_factors(trained)))

    @abstractmethod
    def aggregate(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Server: return the state that this round's contributions (at least one) average to, one round on."""

    def settle(self, state: ServerState) -> ServerState:
        """Server: bring a new state into the form that the next round starts from.

        A strategy that changes the basis of a layer's factors drops that layer's moments (``without_moments``).
        """
        return state

    def server_update(
        self, state: ServerState, contributions: Sequence[Contribution], step: ServerStep | None = None
    ) -> ServerState:
        """Server: return the next state: aggregate, let the server's optimiser ``step`` (if any), settle.

        ``aggregate`` sees the strategy's own memory only, ``settle`` the optimiser's as well.
        """
        averaged = self.aggregate(replace(state, memory=own_memory(state.memory)), contributions)
        return self.settle(step(state, averaged) if step else averaged)


def own_memory(memory: AdapterState) -> AdapterState:
    """Return what the strategy itself keeps: all but the server optimiser's."""
    return {layer: factors for layer, factors in memory.items() if not layer.startswith(MOMENTS)}


def without_moments(memory: AdapterState, layers: Collection[str]) -> AdapterState:
    """Return the memory without what the server's optimiser keeps about ``layers``: it begins anew for them."""
    dropped = {prefix + layer for prefix in MOMENTS for layer in layers}
    return {layer: factors for layer, factors in memory.items() if layer not in dropped}


def _head_factors(state: AdapterState) -> tuple[str, ...]:
    return tuple(state.get(HEAD, ()))


def mean(contributions: Sequence[Contribution]) -> AdapterState:
    """Return ``sum_k p_k state_k`` with ``p_k`` the weights brought to sum 1, over this round's sites only.

    Raises:
        ProtocolError: there is no contribution, or a weight is not above 0.
    """
    total = sum(c.weight for c in contributions)
    if not contributions or any(not c.weight > 0 for c in contributions):
        raise ProtocolError("averaging needs at least one contribution, each of a public size above 0")
    return weighted_sum([c.weight / total for c in contributions], [c.state for c in contributions])

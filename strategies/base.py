"""The interface of a federated strategy.

A strategy is pure: states in, states out. It knows no Flower, no model, no data and no noise, and
both halves (server and site) are in one file that reads like its paper. Averaging weights come
from public sizes and stated noise; everything it sees from a site has passed the site's mechanism.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedveil.common.adapters import Adapter
from fedveil.common.config.fields import check_fields
from fedveil.common.config.sections import RunConfig, Scalar
from fedveil.common.errors import ConfigError, ProtocolError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge, select, weighted_sum
from fedveil.privacy import Mechanism
from fedveil.strategies.state import Contribution, ServerState, ServerStep


@dataclass(frozen=True)
class Strategy(ABC):
    """One rule of aggregation; options of a strategy are its fields, which declare what they may be.

    A round of two sites, where training is stood in for by adding 1 and 4 to B:

    >>> import torch
    >>> from fedveil.strategies.ffa_lora import FFALoRA
    >>> strategy = FFALoRA()
    >>> start = {"layer": {"A": torch.eye(2), "B": torch.zeros(1, 2)}}
    >>> state = strategy.start(start, trained=("B",))
    >>> contributions = []
    >>> for site, size, step in (("north", 100, 1.0), ("south", 200, 4.0)):
    ...     model = strategy.install(start, strategy.downlink(state))
    ...     trained = {"layer": {"B": model["layer"]["B"] + step}}
    ...     contributions.append(Contribution(site, size, trained))
    >>> state = strategy.server_update(state, contributions)
    >>> state.round_number, state.adapter["layer"]["B"]
    (1, tensor([[3., 3.]]))
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    adapter: ClassVar[str]
    """The adapter that ``adapter.name = "auto"`` stands for; any other that fits ``trains`` and ``freezes`` may be
    chosen."""
    trains: ClassVar[tuple[str, ...]] = ()
    """The factors that an adapter must train, these and no other; empty: any."""
    freezes: ClassVar[tuple[str, ...]] = ()
    """The factors that an adapter must keep frozen, at least."""
    moves_frozen: ClassVar[bool] = False
    """Whether the server gives frozen factors another length or direction, so that how they began does not last."""
    requires: ClassVar[Mapping[str, Scalar]] = {}
    """Settings that must have these values, such as ``server.optimizer``; one that is left open gets it."""
    needs: ClassVar[Literal["mean", "each"]] = "each"
    """What the server takes of the sites: their weighted mean alone, or what each has sent."""
    noise: ClassVar[str] = ""
    """How a site's noise enters a layer's weights; empty: as the adapter says."""
    privacy: ClassVar[str] = "dp-sgd, none"
    """Privacy modes it may run in."""

    def __post_init__(self) -> None:
        check_fields(self, f"{self.name}.")

    def check(self, mechanism: Mechanism) -> None:
        """Raise ConfigError, saying what to do, if the strategy or its options do not fit the run's mechanism."""
        if (only_sum := mechanism.only_a_sum) and self.needs != "mean":
            raise ConfigError(
                f"strategy {self.name!r} takes more of the sites than the mean of what they trained, and {only_sum} "
                "more than a sum: choose another"
            )

    def check_run(self, config: RunConfig) -> None:
        """Raise ConfigError, saying what to do, if a run of this configuration cannot have the strategy."""
        del config

    @classmethod
    def check_adapter(cls, adapter: type[Adapter]) -> None:
        """Raise ConfigError, saying what to do, if this strategy is not defined for the adapter."""
        fits = (not cls.trains or set(cls.trains) == set(adapter.trained)) and set(cls.freezes) <= set(adapter.frozen)
        if not fits:
            raise ConfigError(
                f"strategy {cls.name!r} works on an adapter that {_factors(cls.trains, cls.freezes)}, "
                f"not on {adapter.name!r}, which {_factors(adapter.trained, adapter.frozen)}: "
                f"leave adapter.name at 'auto', which is {cls.adapter!r} here, and recipe at 'auto' or 'plain'"
            )

    @classmethod
    def exact(cls, adapter: type[Adapter]) -> bool:
        """Return whether the new weights are exactly the mean of the sites' weights."""
        del adapter
        return False

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return the state before anything is trained, from the adapter's start and the factors that sites train."""
        return ServerState(0, adapter, trained)

    def basis(self, state: ServerState) -> AdapterState:
        """Server: return the frozen factors as they were before round 1; a strategy that moves them remembers them.

        They travel once, with the first task that a site gets, where no site can derive them (``Job.basis``).
        """
        layers = {layer: factors for layer, factors in state.adapter.items() if layer != HEAD}
        frozen = {layer: {n: t for n, t in f.items() if n not in state.trained} for layer, f in layers.items()}
        return {layer: factors for layer, factors in frozen.items() if factors}

    def downlink(self, state: ServerState) -> AdapterState:
        """Server: return what travels to every site. Full state, never an increment: sites may have missed rounds."""
        head = {HEAD: state.adapter[HEAD]} if HEAD in state.adapter else {}
        return {**select({k: v for k, v in state.adapter.items() if k != HEAD}, state.trained), **head}

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Site: return what to write into the model, from the shared start and what was received."""
        return merge(start, received)

    @classmethod
    def chooses(cls) -> bool:
        """Return whether some round trains a part of the adapter alone."""
        return cls.trained_columns is not Strategy.trained_columns

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen | None:
        """Return the columns of every factor that a site trains in a round; None: every tensor whole.

        Server and site both ask, so it follows from nothing else. The server's own choice travels in ``received``, as
        masks of 0 and 1, and follows from what was sent to it.

        Args:
            received: what came down.
            round_number: the round's, from 1 on.
            rank: how many columns the site trains at most, as it declares; 0: as many as the run has.
        """
        del received, round_number, rank
        return None

    def told(self, state: ServerState) -> str:
        """Server: return what there is to say of the next round, in words; empty: nothing."""
        del state
        return ""

    @abstractmethod
    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Server: return the state that this round's contributions (at least one) make, one round on."""

    def settle(self, state: ServerState) -> ServerState:
        """Server: bring a new state into the form that the next round starts from.

        A strategy that writes a layer's factors in other coordinates drops that layer's moments
        (``state.optimizer.without``).
        """
        return state

    def server_update(
        self, state: ServerState, contributions: Sequence[Contribution], step: ServerStep | None = None
    ) -> ServerState:
        """Server: return the next state: combine, let the server's optimiser ``step`` (if any), settle."""
        combined = self.combine(state, contributions)
        return self.settle(step(state, combined) if step else combined)


def mean(contributions: Sequence[Contribution]) -> AdapterState:
    """Return ``sum_k p_k state_k`` with ``p_k`` the weights brought to sum 1, over this round's sites only.

    Raises:
        ProtocolError: there is no contribution, or a weight is not above 0.
    """
    total = sum(c.weight for c in contributions)
    if not contributions or any(not c.weight > 0 for c in contributions):
        raise ProtocolError("averaging needs at least one contribution, each of a public size above 0")
    return weighted_sum([c.weight / total for c in contributions], [c.state for c in contributions])


def _factors(trained: Sequence[str], frozen: Sequence[str]) -> str:
    said = [f"{verb} {' and '.join(names)}" for verb, names in (("trains", trained), ("freezes", frozen)) if names]
    return " and ".join(said) or "has no factors"

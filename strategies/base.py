"""The interface of a federated strategy.

A strategy is pure: states in, states out. It knows no Flower, no model, no data and no noise, and
both halves (server and site) are in one file that reads like its paper. Averaging weights come
from public sizes and stated noise; everything it sees from a site has passed the site's mechanism.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedveil.common.adapters import Adapter
from fedveil.common.config.fields import check_fields
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, ProtocolError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge, select, weighted_sum
from fedveil.common.requirements import Requirement
from fedveil.strategies.state import Contribution, ServerState, ServerStep


@dataclass(frozen=True)
class Facts:
    """What a row declares of a strategy beside its name."""

    paper: str
    noise: str = ""
    """How a site's noise enters a layer's weights; empty: as the adapter says."""
    exact: Literal["linear", "always", "never"] = "never"
    """Whether the new weights are exactly the mean of the sites' weights: ``always``, ``never``, or ``linear``: with an
    adapter whose weights are linear in what it trains."""
    moves_frozen: bool = False
    """Whether the server changes the length or direction of frozen factors, so that their initialisation does not
    last."""
    requires: tuple[Requirement, ...] = ()
    """Settings and the values that they must have; an open one gets its value here."""


@dataclass(frozen=True)
class Takes:
    """The adapters that a strategy works on."""

    default: str
    """The one that ``adapter.name = "auto"`` gives."""
    trains: tuple[str, ...] = ()
    """The factors that an adapter must train, these and no other; empty: any."""
    freezes: tuple[str, ...] = ()
    """The factors that an adapter must freeze, at least."""
    others: bool = True
    """Whether another adapter than the default one may be set."""


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
    facts: ClassVar[Facts]
    adapters: ClassVar[Takes]

    def __post_init__(self) -> None:
        check_fields(self, f"{self.name}.")

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, saying what to do, if a run of this configuration cannot have the strategy."""
        if only_sum := config.privacy.mechanism.only_a_sum:
            raise ConfigError(
                f"strategy {self.name!r} combines what each site sent, and {only_sum} more than a sum: choose a "
                "strategy that averages, such as 'ffa-lora', or set privacy.mode to 'dp-sgd'"
            )

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

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen | None:
        """Return the columns of every factor that a site trains in a round; None: every tensor whole.

        Server and site both call it, so it follows from its arguments alone. A choice that the server makes, from what
        sites sent before, travels in ``received`` as masks of 0 and 1. What a site sends has the chosen
        columns alone (``common.messages.columns``): ``Average`` puts their mean back, another ``combine`` does so
        itself and says in ``ServerState.active`` what rests.

        Args:
            received: what came down.
            round_number: the round's, from 1 on.
            rank: how many columns of B the site trains at most, as it declares; 0: as many as the run has.
        """
        del received, round_number, rank
        return None

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


def check_adapter(strategy: type[Strategy], adapter: type[Adapter]) -> None:
    """Raise ConfigError, saying what to do, if a strategy is not defined for an adapter."""
    takes = strategy.adapters
    trains = not takes.trains or set(takes.trains) == set(adapter.trained)
    if not (trains and set(takes.freezes) <= set(adapter.frozen)):
        raise ConfigError(
            f"strategy {strategy.name!r} works on an adapter that {_factors(takes.trains, takes.freezes)}, "
            f"not on {adapter.name!r}, which {_factors(adapter.trained, adapter.frozen)}: "
            f"leave adapter.name at 'auto', which is {takes.default!r} here, and recipe at 'auto' or 'plain'"
        )
    if not takes.others and adapter.name != takes.default:
        raise ConfigError(
            f"strategy {strategy.name!r} trains parts of factors as the adapter {takes.default!r} has them, and "
            f"adapter.name is {adapter.name!r}: leave it at 'auto'"
        )


def is_exact(strategy: type[Strategy], adapter: type[Adapter]) -> bool:
    """Return whether the new weights are exactly the mean of the sites' weights."""
    exact = strategy.facts.exact
    return exact == "always" or (exact == "linear" and adapter.traits.linear)


def chooses(strategy: type[Strategy]) -> bool:
    """Return whether a strategy trains only a part of the adapter in some round."""
    return strategy.trained_columns is not Strategy.trained_columns


def _factors(trained: Sequence[str], frozen: Sequence[str]) -> str:
    said = [f"{verb} {' and '.join(names)}" for verb, names in (("trains", trained), ("freezes", frozen)) if names]
    return " and ".join(said) or "has no factors"

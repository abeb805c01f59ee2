"""The state that the server carries from round to round, and the contributions that a round averages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import HEAD, METRIC, AdapterState


@dataclass(frozen=True)
class Moments:
    """What the server's optimiser keeps of every trained tensor; the layers that it has not met are in none."""

    first: AdapterState = field(default_factory=dict)
    """Running mean of the gradient, float64, of the shape of the tensor it belongs to."""
    second: AdapterState = field(default_factory=dict)
    """Running mean of the gradient's square, of the same shape."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Steps since a layer's moments began."""
    clocks: AdapterState = field(default_factory=dict)
    """The same of every column of a tensor that is trained by columns, shape (columns,), float64."""

    def without(self, layers: Collection[str]) -> Moments:
        """Return the moments of all other layers: these start without moments."""

        def others(state: AdapterState) -> AdapterState:
            return {layer: factors for layer, factors in state.items() if layer not in layers}

        steps = {layer: count for layer, count in self.steps.items() if layer not in layers}
        return Moments(others(self.first), others(self.second), steps, others(self.clocks))


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round; enough to go on after a crash."""

    round_number: int
    """Rounds done; 0 before the first."""
    adapter: AdapterState
    """The global adapter, complete: every factor of every layer, and the head."""
    trained: tuple[str, ...]
    """Factors of a layer that sites train; all else in a layer is frozen. A head that is here is trained."""
    memory: AdapterState = field(default_factory=dict)
    """Whatever else the strategy needs, as tensors."""
    optimizer: Moments = field(default_factory=Moments)
    """What the server's optimiser needs."""
    active: AdapterState = field(default_factory=dict)
    """Of a state just averaged, the share of the weight of the sites that trained each column of a tensor, float64,
    shape (columns,): as many as its last dimension has. A column of share 0 is inactive: the server's step leaves it
    and its moments as they are. A tensor that is not in it is trained whole, by all."""

    def trains(self, layer: str, name: str) -> bool:
        """Return whether sites train this tensor of the adapter."""
        return layer == HEAD or (layer != METRIC and name in self.trained)


def as_returned(state: object, before: ServerState, method: str) -> ServerState:
    """Return what a strategy's method returned, if the run can go on from it.

    Args:
        state: what it returned.
        before: the state that it was given.
        method: its name, as in ``strategy 'mine': combine``.

    Raises:
        ConfigError: it is no state, or its adapter has other layers, factors or shapes.
    """
    if not isinstance(state, ServerState):
        raise ConfigError(f"{method} returned {type(state).__name__}: return a ServerState, as by replace(state, ...)")
    shapes, usual = (
        {f"{layer}.{name}": tuple(t.shape) for layer, factors in adapter.items() for name, t in factors.items()}
        for adapter in (state.adapter, before.adapter)
    )
    if wrong := [name for name in {**usual, **shapes} if shapes.get(name) != usual.get(name)]:
        had, got = usual.get(wrong[0], "nothing"), shapes.get(wrong[0], "nothing")
        raise ConfigError(f"{method} returned {wrong[0]} as {got}, and it was {had}: return every tensor in its shape")
    return state


ServerStep = Callable[[ServerState, ServerState], ServerState]
"""From the state before a round and the one averaged to: the state after the server optimiser's step."""


@dataclass(frozen=True)
class Contribution:
    """What one site sent in one round."""

    site: str
    weight: float
    """The site's public size, less where it states more noise than the run asks for; only ratios matter."""
    state: AdapterState
    rank: int = 0
    """How many columns of B the site has declared that it trains; 0: the run's strategy does not ask."""
    noise: float | None = None
    """Standard deviation of the noise on one number of an adapted layer, as far as it is known; 0 without noise."""
    factor: float = 1.0
    """What the change that the site sent was multiplied by, because it was longer than is likely; 1: it is as sent."""

"""The interface of a server rule.

It works around the server's optimiser: it turns the averaged change before the optimiser takes it for a gradient, or
the step that came of it. Both have passed clip, noise and average, so a rule is post-processing and costs no privacy.
It takes nothing else, but for public text that it may measure at the server before round 1.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters import Adapter
from fedveil.common.config.fields import check_fields
from fedveil.common.config.run import RunConfig
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.requirements import Requirement
from fedveil.strategies.base import Strategy
from fedveil.strategies.state import ServerState

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


@dataclass(frozen=True)
class Known:
    """What a rule may know of a step beside the tensors that it moves; all of it is public."""

    frozen: AdapterState = field(default_factory=dict)
    """The factors that no site trains, of the layers alone, float64."""
    noise: float | None = None
    """Standard deviation of the noise on one number of a plain step; 0 without noise; None: unknown."""


@dataclass(frozen=True)
class ServerRule(ABC):
    """One rule; its options are its fields, set under its name, which declare what they may be."""

    name: ClassVar[str]
    """What ``server.rule`` calls it."""
    paper: ClassVar[str]
    lengthens: ClassVar[bool] = False
    """Whether noise may move the model further with the rule than without, so that no bound of the run's covers it."""
    noise: ClassVar[str] = "as without a rule"
    """How the noise of one averaged change enters the weights, τ being its standard deviation on one number."""

    def __post_init__(self) -> None:
        check_fields(self, f"{self.name}.")

    requires: ClassVar[tuple[Requirement, ...]] = ()
    """Settings and the values that they must have."""

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:  # noqa: B027  (most need none)
        """Raise ConfigError, saying what to do, unless the rule means anything in this run."""

    def measure(self, model: FederatedModel, config: RunConfig) -> AdapterState:
        """Server: return what the rule takes from public text before round 1; the model is at the run's start.

        Raises:
            DataError: the text cannot be read, or is not public to the run.
            ModelError: it says nothing.
        """
        del model, config
        return {}

    def change(self, change: Factors, factors: Factors, scaling: float, *, noised: bool) -> Factors:
        """Return what the optimiser takes for one layer's averaged change.

        Args:
            change: ``before - averaged`` of the trained factors, float64.
            factors: every factor of the layer before the round, float64.
            scaling: the adapter's s.
            noised: whether the change carries a mechanism's noise.
        """
        del factors, scaling, noised
        return change

    def step(self, before: AdapterState, after: AdapterState, measured: AdapterState, known: Known) -> AdapterState:
        """Return the result of the round, of the layers' trained factors, float64.

        Args:
            before: the trained factors before the round.
            after: the same after the optimiser's step.
            measured: what ``measure`` gave.
            known: what else is public of this step.
        """
        del before, measured, known
        return after

    def remember(
        self,
        before: ServerState,
        averaged: ServerState,
        model: FederatedModel,
        config: RunConfig,
        noise: Callable[[], float],
    ) -> AdapterState:
        """Return what goes into the memory of the state after a round, by layer and name; most rules keep nothing.

        Args:
            before: the state that the sites started from.
            averaged: the same with the round's average.
            model: the server's, whose base weights may be read.
            config: the run's.
            noise: returns the standard deviation of the noise on one number of the average; 0 without noise.
        """
        del before, averaged, model, config, noise
        return {}

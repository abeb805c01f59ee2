"""ALLoRA at the server: rows of B take steps that shorten as they grow.

Huang, Balestriero: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws (arXiv 2410.09692). Row i of the factor
that begins at 0 steps f_i = 1 / √(‖B_i‖ + 1 / η²) times as far, which is η at the start; there is no dropout and no
scale, s = 1. The authors' code was not found; this is what three independent ones agree on.

f follows from B, which passed clip and noise, and it acts on the optimiser's step: before Adam it would be divided
out. Between clip and noise it would break the promise, because a record could move the sum by η clips. Rows of B are
as long in whatever basis A has, so FedSVD's turn changes nothing of f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from fedveil.common.adapters import Adapter
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import AdapterState
from fedveil.strategies.base import Strategy
from fedveil.strategies.rules.base import Known, ServerRule


@dataclass(frozen=True)
class ALLoRA(ServerRule):
    """Row i of B steps 1 / √(‖B_i‖ + 1 / η²) times as far."""

    name: ClassVar[str] = "allora"
    paper: ClassVar[str] = "Huang and Balestriero 2024"
    lengthens: ClassVar[bool] = True
    noise: ClassVar[str] = "diag(f) x_B A: norm τ ‖A‖ √Σ f_i², at the start η times that without a rule"

    eta: Annotated[float, POSITIVE, RATIO] = 2.0
    """How many times as far a row of B steps that is still at 0."""

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
        """Refuse an adapter whose B is not trained from 0, and a scale."""
        del config, strategy
        if "B" not in adapter.trained or "mu" in adapter.trained:
            raise ConfigError(
                f"server.rule {self.name!r} is a rule for rows of B trained from 0, and the adapter {adapter.name!r} "
                f"trains {' and '.join(adapter.trained) or 'none'}: set server.rule to 'none', or adapter.name to "
                "'lora' or 'lora-frozen-a'"
            )
        if adapter.scaling != 1:
            raise ConfigError(
                f"server.rule {self.name!r} has no scale, and adapter.alpha {adapter.alpha:g} makes it "
                f"{adapter.scaling:g}: set adapter.alpha to {adapter.alpha / adapter.scaling:g}, where it is 1"
            )

    def step(self, before: AdapterState, after: AdapterState, measured: AdapterState, known: Known) -> AdapterState:
        """Return B + f (the step of B) in every layer."""
        del measured, known
        moved = {layer: dict(factors) for layer, factors in after.items()}
        for layer, factors in moved.items():
            if "B" in factors:
                held = before[layer]["B"]
                factors["B"] = held + row_factors(held, self.eta)[:, None] * (factors["B"] - held)
        return moved


def row_factors(B: Tensor, eta: float) -> Tensor:
    """Return f of every row of B, shape (out,)."""
    return (B.norm(dim=1) + eta**-2).rsqrt()

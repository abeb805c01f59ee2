"""LoRA-Pro at the server, in a form that noise does not blow up.

Wang et al.: LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, ICLR 2025. With G the gradient of the whole weight,
the factors' are g_A = s Bᵀ G and g_B = s G Aᵀ. Among all steps of the factors the one that moves s B A along G best
moves it along the tangent projection P_B G + (I - P_B) G P_A, which needs (Bᵀ B)⁻¹ g_A / s². At B = 0, where a run
begins, the authors' code multiplies g_A by 1e8, and under privacy g_A is noise alone there.

Here B = U β R and A = Q δ Vᵀ are singular value decompositions, and the two noised gradients are two views of one
tangent gradient: Uᵀ G V is seen by both, with noise of variance τ² / (s β_i)² and τ² / (s δ_j)², Uᵀ G (I - P_A) by g_A
alone, and (I - P_B) G V by g_B alone. Views are weighed by one over their variance, and shrunk by λ = (τ / (s ς))²,
where ς is the standard deviation that an entry of G is taken to have before it is seen:

    block_ij = (β_i (R g_A V)_ij + δ_j (Uᵀ g_B Q)_ij) / (s (β_i² + δ_j² + λ))
    right    = diag(β / (s (β² + λ))) R g_A (I - P_A)
    left     = (I - P_B) g_B Q diag(δ / (s (δ² + λ)))
    D        = U block Vᵀ + U right + left Vᵀ

and the factors' steps are b = D Aᵀ (A Aᵀ)⁻¹ / s and a = Rᵀ diag(1 / (s² (β² + λ))) R g_A (I - P_A), of which s (B a +
b A) = D. Nothing divides by β. Without noise λ is 0, and D is LoRA-Pro's own; then what B or A do not reach is left
where it is. Their pair is a + X A and b - B X for any X, which moves one factor for the other and no weight; this one's
a has no part that A reaches, where theirs is the nearest to (g_A, g_B). They keep Adam's moments of the m × n gradient;
here the optimiser's are of a and b, so that Adam, which divides each number by its own length, gives part of the rule
away again: ``server.optimizer = "momentum"`` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Adapter
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import Factors
from fedveil.common.requirements import Requirement, one_plain_step
from fedveil.strategies.base import Strategy, chooses
from fedveil.strategies.rules.base import ServerRule

NEGLIGIBLE = 1e-7
"""Share of the largest below which singular values of A count as zero, and those of B where nothing is damped; factors
are float32."""


@dataclass(frozen=True)
class LoRAPro(ServerRule):
    """The change of A and B becomes the one that moves the product as the gradient of the whole weight would."""

    name: ClassVar[str] = "lora-pro"
    paper: ClassVar[str] = "Wang et al. 2025"
    lengthens: ClassVar[bool] = True
    requires: ClassVar[tuple[Requirement, ...]] = one_plain_step(
        "it takes a change for a gradient, each number of which has the same noise"
    )
    noise: ClassVar[str] = (
        "D of noise alone; by singular values β of B, δ of A: norm² τ² / s² (Σ_ij (β_i² + δ_j²) / (β_i² + δ_j² + λ)² "
        "+ (n - r) Σ_i β_i² / (β_i² + λ)² + (m - r) Σ_j δ_j² / (δ_j² + λ)²)"
    )

    signal: Annotated[float, POSITIVE, RATIO] = 0.5
    """Standard deviation that an entry of a layer's gradient is taken to have, over that of the noise on one number of
    the averaged change: ς / τ. It damps the steps of a private run; without noise nothing is damped."""

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
        """Refuse what has no tangent to project on, and changes that are no gradient."""
        if set(adapter.trained) != {"A", "B"}:
            raise ConfigError(
                f"server.rule {self.name!r} joins the gradients of A and B, and the adapter {adapter.name!r} trains "
                f"{' and '.join(adapter.trained) or 'none of them'}, where it would be a rate alone: set server.rule "
                "to 'none', or strategy to 'fedavg-lora'"
            )
        if chooses(type(strategy)):
            raise ConfigError(
                f"server.rule {self.name!r} joins the gradients of A and B, and strategy {strategy.name!r} trains them "
                "in turns: set server.rule to 'none', or strategy to 'fedavg-lora'"
            )

    def change(self, change: Factors, factors: Factors, scaling: float, *, noised: bool) -> Factors:
        """Return a and b."""
        if "A" not in change or "B" not in change:
            return change
        damping = 1 / (scaling * self.signal) ** 2 if noised else 0.0
        a, b, _ = tangent_step(change["A"], change["B"], factors["A"], factors["B"], scaling, damping)
        return {**change, "A": a, "B": b}


def tangent_step(
    g_a: Tensor, g_b: Tensor, A: Tensor, B: Tensor, scaling: float, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b and D of the module's equations, float64.

    Args:
        g_a: gradient of A, shape (r, n). g_b: of B, shape (m, r).
        A: shape (r, n). B: shape (m, r).
        scaling: s.
        damping: λ, at least 0.
    """
    U, beta, R = torch.linalg.svd(B, full_matrices=False)
    Q, delta, Vt = torch.linalg.svd(A, full_matrices=False)
    # No step of B moves what A does not reach: those directions are among the others, which a step of A moves.
    reached = delta > NEGLIGIBLE * delta[:1]
    Q, delta, Vt = Q[:, reached], delta[reached], Vt[reached]
    beta_square, delta_square = _used(beta, damping), delta.square() + damping
    rows, columns = R @ g_a, g_b @ Q
    seen, across = rows @ Vt.T, U.T @ columns
    weights = scaling * (beta[:, None].square() + delta_square)
    block = (beta[:, None] * seen + delta * across) / weights
    beside = rows - seen @ Vt  # R g_A (I - P_A)
    right = (beta / (scaling * beta_square))[:, None] * beside
    left = (columns - U @ across) * (delta / (scaling * delta_square))
    D = U @ block @ Vt + U @ right + left @ Vt
    b = D @ Vt.T @ torch.diag(1 / delta) @ Q.T / scaling
    a = R.T @ ((1 / (scaling**2 * beta_square))[:, None] * beside)
    return a, b, D


def _used(values: Tensor, damping: float) -> Tensor:
    """Return the values' squares plus the damping; infinite, so that nothing comes of them, where neither says much."""
    squares = values.square() + damping
    if damping:
        return squares
    return torch.where(values > NEGLIGIBLE * values[:1], squares, torch.inf)

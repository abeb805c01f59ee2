"""SoRA's gate at the server: singular values of B A shrink each round by what noise alone would reach; small ones go.

SoRA (Ding et al. 2023, arXiv 2311.11696) and CoDyRA train W = W0 + s B diag(g) A and put a soft threshold on g after
every step. Averages of g and B are not averages of weights, and a threshold at the sites is not one of their mean. Here
A is frozen, B is trained, and the gate lives in the singular basis of the product at the server: with B A = U diag(g)
Vᵀ, g becomes max(g - ξ, 0), and B what makes that of A. It is the proximal step of ξ ‖B A‖_*, and does not depend on
the basis that A is written in. Nothing as large as a weight is formed: with Aᵀ = Q R the singular values are those of
B Rᵀ. Of ``lora-diagonal`` it shrinks z, S2-LoRA's sparsity.

ξ is the noise's own edge: what the largest singular value of one round's averaged noise behind A exceeds in any layer
with chance ``contrib.nulls.LEVEL``. So where records say nothing B stays at 0, to the bit, and no schedule is needed.
That needs one plain step at the sites and a plain one at the server, and is refused elsewhere: Adam, or a ball that
rolls on, would give a part of the noise back behind the threshold. Under ``client-level`` the noise is the server's
own, so more steps at the sites are fine. Without privacy there is no noise, and ``soft-threshold.threshold`` says ξ.

What differs from the published code: its operator shrinks by ξ and then drops what is below ξ, so that everything below
2 ξ goes, which is no proximal step. It also gates a basis of columns, over which a random A spreads each direction; and
CoDyRA's loss is a softmax over the batch's images, which joins records and cannot be run here.

It acts behind the average, on numbers that passed clip and noise, so it costs no privacy. The model changes, and is
scored after that; layers keep their rank on the wire. Kept values are too small by ξ: that is the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Adapter
from fedveil.common.check import NOT_NEGATIVE
from fedveil.common.config.fields import Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.contrib.nulls import LEVEL, edge_behind
from fedveil.strategies.base import Strategy
from fedveil.strategies.rules.base import Known, ServerRule

NEGLIGIBLE = 1e-6
"""Singular values of A below this share of the largest count as zero (float32 factors)."""


@dataclass(frozen=True)
class SoftThreshold(ServerRule):
    """Singular values of B A, or the entries of a diagonal, shrink each round by what noise alone would reach."""

    name: ClassVar[str] = "soft-threshold"
    paper: ClassVar[str] = "Ding et al. 2023 (SoRA)"
    noise: ClassVar[str] = f"at most that without a rule; where records say nothing, none in {1 - LEVEL:.0%} of rounds"

    threshold: Annotated[float, NOT_NEGATIVE, Unit("L2 norm")] = 0.0
    """By how much they shrink in each round; what is smaller becomes 0. 0: by what the noise of one round reaches,
    which follows from public figures where records are protected. CoDyRA's last is 0.005."""

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
        """Refuse an adapter that trains anything else, steps behind which it would not last, and no threshold."""
        if adapter.name not in ("lora-frozen-a", "lora-diagonal"):
            raise ConfigError(
                f"server.rule {self.name!r} shrinks all of B over a frozen A, or a diagonal, and the adapter is "
                f"{adapter.name!r}: set adapter.name to 'lora-frozen-a' or 'lora-diagonal', or server.rule to 'none'"
            )
        training, server = config.training, config.server
        if server.optimizer != "none" and (server.optimizer != "momentum" or server.momentum):
            raise ConfigError(
                f"server.rule {self.name!r} needs a plain step of the server, and server.optimizer "
                f"{server.optimizer!r} gives back of the noise what a threshold took: set server.optimizer to "
                "'momentum' with server.momentum 0, or to 'none'"
            )
        if self.threshold or config.privacy.mechanism.central:  # a trusted server knows the noise that it draws
            return
        if not config.privacy.mechanism.charged:
            raise ConfigError(
                f"server.rule {self.name!r} takes its threshold from the noise, and privacy.mode "
                f"{config.privacy.mechanism.name!r} has none: set {self.name}.threshold, such as to 0.005"
            )
        if training.local_steps != 1 or training.optimizer != "sgd" or training.weight_decay:
            raise ConfigError(
                f"server.rule {self.name!r} takes its threshold from the noise of one plain step, and "
                f"{training.local_steps} local steps of {training.optimizer} at a weight decay of "
                f"{training.weight_decay:g} are another: set training.local-steps to 1, training.optimizer to 'sgd' "
                f"and training.weight-decay to 0, or set {self.name}.threshold"
            )

    def step(self, before: AdapterState, after: AdapterState, measured: AdapterState, known: Known) -> AdapterState:
        """Return every layer's factor behind the threshold.

        Raises:
            ModelError: it is to follow from the noise of the round, which is not known.
        """
        del before, measured
        if not self.threshold and known.noise is None:
            raise ModelError(
                f"server.rule {self.name!r} takes its threshold from the noise, which does not follow from what this "
                f"run's mechanism says: set {self.name}.threshold"
            )
        return {
            layer: self._shrunk(factors, known.frozen.get(layer, {}), known.noise or 0.0, len(after))
            for layer, factors in after.items()
        }

    def _shrunk(self, trained: Factors, frozen: Factors, noise: float, layers: int) -> Factors:
        level = LEVEL / layers
        if "z" in trained:
            z = trained["z"]
            edge = noise * NormalDist().inv_cdf(1 - level / (2 * len(z)))
            return {**trained, "z": entries_shrunk(z, self.threshold or edge)}
        B, A = trained["B"], frozen["A"]
        edge = noise * edge_behind(len(B), torch.linalg.svdvals(A).tolist(), level)
        return {**trained, "B": product_shrunk(B, A, self.threshold or edge)}


def product_shrunk(B: Tensor, A: Tensor, threshold: float) -> Tensor:
    """Return B' of which B' A is the proximal step of ``threshold`` times the nuclear norm at B A.

    Args:
        B: shape (out, r), float64.
        A: shape (r, in), float64. What of B it does not reach changes no weight, and goes.
        threshold: in singular values of B A.
    """
    R = torch.linalg.qr(A.T).R
    U, values, Vt = torch.linalg.svd(B @ R.T, full_matrices=False)
    return (U * (values - threshold).clamp(min=0)) @ Vt @ torch.linalg.pinv(R.T, rtol=NEGLIGIBLE)


def entries_shrunk(z: Tensor, threshold: float) -> Tensor:
    """Return the proximal step of ``threshold`` times the L1 norm of a vector."""
    return z.sign() * (z.abs() - threshold).clamp(min=0)

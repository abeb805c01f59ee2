"""LoRA-SB, the parameterisation of Fed-SB: W = W0 + B R A, only the small square R is trained.

Singhal, Ponkshe et al.: Initialization using Update Approximation is a Silver Bullet (LoRA-SB) and
Fed-SB. B (out, rank) has orthonormal columns, A (rank, in) orthonormal rows, both frozen; R is
(rank, rank). The scale s is 1 whatever ``adapter.alpha`` says: with orthonormal factors the
gradient of R is then the projected gradient of the full weight, which is the point of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.adapters.base import ADAPTER_NAME, layer_shape, orthonormal_rows, stored_transposed
from common.adapters.low_rank import LowRank, lora_modules
from common.messages.state import Factors
from common.randomness import stream

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class _RThenB(nn.Sequential):
    """R, then B; outside training their product at once, as the exported adapter has it.

    In bfloat16 two products round otherwise than one, and a run's accuracy would not be quite its adapter's.
    """

    def forward(self, hidden: Tensor) -> Tensor:  # shape (..., rank) to (..., out)
        if self.training:
            return cast(Tensor, super().forward(hidden))
        R, B = (cast(nn.Linear, module).weight for module in self)
        with torch.autocast(hidden.device.type, enabled=False):
            folded = B @ R
        return F.linear(hidden, folded)


@dataclass(frozen=True)
class LoRASB(LowRank):
    """Factors ``B`` (out, rank) and ``A`` (rank, in), frozen, and ``R`` (rank, rank), trained.

    ``init`` is ``orthonormal`` (from the seed) or ``svd-of-weights`` (singular vectors of W0).
    """

    name: ClassVar[str] = "lora-sb"
    trained: ClassVar[tuple[str, ...]] = ("R",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "B")
    linear: ClassVar[bool] = True
    noise: ClassVar[str] = "B x_R A: norm σC/b r, whatever m and n"
    inits: ClassVar[tuple[str, ...]] = ("orthonormal", "svd-of-weights")
    scales: ClassVar[tuple[str, ...]] = ("rank",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.rank))

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and R, (rank, rank)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "R": (self.rank, self.rank)}

    def prepare(self, layer: LoraLayer) -> None:
        """Put R between PEFT's A and B."""
        B = cast(nn.Linear, lora_modules(layer)["B"])
        R = nn.Linear(self.rank, self.rank, bias=False, device=B.weight.device, dtype=B.weight.dtype)
        layer.lora_B[ADAPTER_NAME] = _RThenB(R, B)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the R and B that ``prepare`` put in a row."""
        R, B = cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])
        return {"A": layer.lora_A[ADAPTER_NAME], "R": R, "B": B}

    def start(self, layer_name: str, layer: LoraLayer, seed: int) -> Factors:
        """Return orthonormal B and A by ``init``, and R = 0."""
        out_features, in_features = layer_shape(layer)
        R = torch.zeros(self.rank, self.rank)
        if self.init == "svd-of-weights":
            weight = cast(Tensor, layer.get_base_layer().weight).detach().double().cpu()
            B, _, A = leading_singular_triple(weight.T if stored_transposed(layer) else weight, self.rank)
            return {"B": B.float(), "R": R, "A": A.float()}
        A = orthonormal_rows(self.rank, in_features, stream(seed, "adapter", layer_name, "A"))
        B = orthonormal_rows(self.rank, out_features, stream(seed, "adapter", layer_name, "B")).T
        return {"B": B.contiguous(), "R": R, "A": A}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return B R A."""
        del base_weight
        return factors["B"] @ factors["R"] @ factors["A"]

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return A, and R folded into B; exported with alpha = rank, so that the scale is 1."""
        return {"A": factors["A"], "B": factors["B"] @ factors["R"]}


def leading_singular_triple(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), S (rank,), Vᵀ (rank, in) of the largest singular values, signs fixed.

    In each column of U the entry of largest magnitude is positive, so that every party that computes
    this from the same matrix gets the same factors.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return (u * signs).contiguous(), s, (vt * signs.T).contiguous()

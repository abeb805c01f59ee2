"""FedAvg-LoRA (also FedIT, "FL + LoRA"): average both factors, A and B, and the head.

McMahan et al., AISTATS 2017, applied to LoRA's factors as by Zhang et al., ICASSP 2024 (FedIT).

Inexact on LoRA: with p_k summing to 1,
``sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar)``,
which vanishes when all sites agree on one factor. Under DP noise both factors are noised, so the
weights also carry the product of two noises. It averages any other adapter as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class FedAvgLoRA(Average):
    """Sites train A and B; the server averages each."""

    name: ClassVar[str] = "fedavg-lora"
    facts: ClassVar[Facts] = Facts("McMahan et al. 2017; Zhang et al. 2024 (FedIT)", exact="linear")
    adapters: ClassVar[Takes] = Takes("lora")

"""FFA-LoRA: A frozen at a shared start, sites train B, the server averages B.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024.

Exact: ``s (sum p_k B_k) A = sum p_k s B_k A``. A never travels where server and sites can
derive it and compare a fingerprint; else once. Noise on B enters the weights linearly. For SGD only
``eta s² A Aᵀ`` matters, so alpha and the scale of A are learning rates in disguise;
The default start, orthonormal rows, is the control arm for FedSVD; the paper's own is ``adapter.start = "kaiming"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class FFALoRA(Average):
    """Sites train B under one frozen A; the server averages B."""

    name: ClassVar[str] = "ffa-lora"
    facts: ClassVar[Facts] = Facts("Sun et al. 2024", exact="linear")
    adapters: ClassVar[Takes] = Takes("lora-frozen-a", trains=("B",), freezes=("A",))

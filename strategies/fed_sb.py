"""Fed-SB: only the r × r matrix R between two frozen orthonormal factors is trained and sent.

Singhal, Ponkshe et al.: Fed-SB, on the parameterisation of LoRA-SB. W = W0 + B R A.

Exact: ``B (sum p_k R_k) A = sum p_k B R_k A``. Per layer and round r² numbers travel each way and
nothing else; noise on R enters the weights with norm ``sigma C r / b``, whatever the layer's size.

Where B and A come from is ``adapter.start``. LoRA-SB's own recipe is ``nonprivate-gradient``, which only a run
without privacy has; ``public-gradient`` and ``dp-gradient`` stand in for it under privacy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class FedSB(Average):
    """Sites train R; the server averages it."""

    name: ClassVar[str] = "fed-sb"
    facts: ClassVar[Facts] = Facts("Singhal et al. 2025", exact="linear")
    adapters: ClassVar[Takes] = Takes("lora-sb", trains=("R",), freezes=("A", "B"))

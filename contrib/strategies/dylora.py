"""DyLoRA: one run whose adapter may be cut to any rank afterwards.

Valipour, Rezagholizadeh, Kobyzev, Ghodsi: DyLoRA, EACL 2023 (arXiv 2210.07558). The first b columns of B are to serve
alone for every b, so records train them alone. What differs from the paper and its code, and why:

* Each record has a rank of its own, and not each step (``contrib.adapters.lora_nested``).
* A is frozen with nested rows, and the scale s is the run's. ``alpha / b`` would change all columns with every b, and
  columns trained under unlike scales have no mean.

For any ranks a record's gradient is its own and is clipped as ever, so the ledger is FFA-LoRA's; averages are exact.
Every rank is exported from one run: the first b rows of A and columns of B, with alpha = s b (folder ``ranks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class DyLoRA(Average):
    """Sites train B under one frozen A, each record through a rank of its own; the server averages B."""

    name: ClassVar[str] = "dylora"
    facts: ClassVar[Facts] = Facts("Valipour et al. 2023", exact="linear")
    adapters: ClassVar[Takes] = Takes("lora-nested", trains=("B",), freezes=("A",))

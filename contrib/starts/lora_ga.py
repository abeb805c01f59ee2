"""LoRA-GA's directions from public records at the server: the first step is the best of its rank.

Wang, Yu, Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation. With G = U S Vᵀ the mean gradient of a layer,
the rows of A are the first r right singular vectors, and the columns of B the next r left ones, so that B Bᵀ G + G Aᵀ
A, the first step of a product of which both factors are trained, is the best rank-2r part of G. With A alone frozen
there the first step of plain SGD is the best rank-r part.

The paper's residual base weight, W0 - s B A, is left out: training from B on it is training from 0 on W0. So is its
length of the factors (the fourth root of m over the root of γ), which is a learning rate; ``adapter.alpha = 0`` gives
A, or a pair of which both are trained, the scale that suits the clip. PEFT's ``lora_ga`` is another method: it
multiplies B by the singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedveil.common.messages.state import Factors
from fedveil.contrib.starts.public_gradient import FromRecords


@dataclass(frozen=True)
class LoRAGA(FromRecords):
    """A spans the leading right singular vectors of the public records' mean gradient, B the next left ones."""

    name: ClassVar[str] = "lora-ga"

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return A, rows 1 to r of Vᵀ, and B, columns r + 1 to 2r of U; a layer with fewer gives its last r."""
        U, _, Vt = torch.linalg.svd(statistic["G"].double(), full_matrices=False)
        signs = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
        last = min(2 * rank, U.shape[1])
        made = {"A": (Vt * signs.T)[:rank], "B": (U * signs)[:, last - rank : last]}
        return {factor: t.float().contiguous() for factor, t in made.items()}

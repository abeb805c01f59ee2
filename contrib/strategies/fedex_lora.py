"""FedEx-LoRA: both factors averaged, and what their product misses added to the base.

Singhal, Ponkshe, Vepakomma: FedEx-LoRA (ACL 2025). ``W0 ← W0 + s E`` with E = Σ p_k B_k A_k - B̄ Ā, so that the model is
the mean of the sites' models. What differs here, and why:

* E goes into D of the adapter ``lora-merged`` and not into the base weights: those stay the model that policies allow
  and fingerprints name.
* D travels whole every round (m n numbers down): the paper sends the round's E in factors, to sites that missed none.
* Sites are weighed by their public sizes; the released code takes the plain mean.

E completes the average itself. A server optimiser takes another step than to that average, and E beside it belongs to
no model, so ``server.optimizer`` is ``none``, by default also under privacy; another is refused.

Under privacy each site's noise on A meets its noise on B in E: the quadratic part is K times that of averaged factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.requirements import Requirement
from fedveil.contrib.strategies.merging import Merging
from fedveil.strategies.base import Facts


@dataclass(frozen=True)
class FedExLoRA(Merging):
    """Sites train A and B; the server averages both and keeps the sites' covariance beside the base."""

    name: ClassVar[str] = "fedex-lora"
    facts: ClassVar[Facts] = Facts(
        "Singhal et al. 2025 (FedEx-LoRA)",
        noise="s (B x_A + x_B A + Σ p_k x_Bk x_Ak): quadratic, K times that of averaged factors",
        exact="always",
        moves_frozen=True,
        requires=(Requirement("server.optimizer", "none", "the covariance is kept of plain means"),),
    )

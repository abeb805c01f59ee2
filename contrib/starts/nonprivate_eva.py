"""EVA from the sites' records as they are: the control arm of ``dp-eva``, only without privacy.

Paischer, Hauzenberger et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.paid import UnpaidStart
from fedveil.common.tasks import Batch
from fedveil.contrib.starts.inputs import OfInputs, mean_moments, packed


@dataclass(frozen=True)
class NonprivateEVA(OfInputs, UnpaidStart):
    """The rows of A are the leading eigenvectors of the sites' mean moment of inputs; B is random, from the seed."""

    name: ClassVar[str] = "nonprivate-eva"

    @property
    def unfit(self) -> str:
        """Name the starts that a private run has."""
        return (
            "sends raw moments of private records, which no ε covers: use 'eva', from public text, or with "
            "privacy.mode 'dp-sgd' 'dp-eva'"
        )

    def measure(self, model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
        """Return the mean moment of the records, packed."""
        return {name: {"M": packed(factors["M"])} for name, factors in mean_moments(model, parts).items()}

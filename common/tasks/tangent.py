"""The step of a linearised model: what a change of the trained tensors does to the logits, to first order.

The logits of a record at θ are those at θ₀ and J (θ - θ₀), with J its own matrix of derivatives at θ₀. The losses
follow from differences of logits alone, so J has a row for each label after the first: its logit less the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.own_gradients import OwnGradients


class Tangent(OwnGradients):
    """The parameter ``step``, θ - θ₀ as one vector; 0 until it is set.

    Args:
        numbers: elements of all trained tensors below the head.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros(numbers))

    def forward(self, tangents: Tensor, scales: Tensor) -> Tensor:
        """Return what is added to the logits, shape (records, labels); the first label's is 0.

        Args:
            tangents: shape (records, labels - 1, numbers), in any precision.
            scales: shape (records, labels - 1): what each row of them is multiplied by.
        """
        # Number by number and not as a product of matrices: each record's sum is its own in every row.
        return F.pad((tangents.to(self.step.dtype) * self.step).sum(-1) * scales.to(self.step.dtype), (1, 0))

    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the step's gradient of each record, shape (records, numbers).

        Args:
            activations: what ``forward`` was called with.
            backprops: gradient of the loss with respect to what it returned, shape (records, labels).
        """
        tangents, scales = activations
        errors = backprops[:, 1:].to(self.step.dtype) * scales.to(self.step.dtype)
        gradients = torch.zeros(len(tangents), tangents.shape[-1], dtype=self.step.dtype, device=tangents.device)
        for label in range(tangents.shape[1]):
            gradients += errors[:, label, None] * tangents[:, label]
        return {self.step: gradients}

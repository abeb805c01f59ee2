"""The module that sites train: the base model as its task reads it, and a linear head where the task has labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.tasks.base import Batch


class TaskModule(nn.Module):
    """``head(scale(reading(encoder, batch)))``, or the reading itself without a head.

    Args:
        encoder: the base model with the adapter in it.
        reading: what the task takes from the encoder: with a head, features of shape (records, hidden), float32;
            without, logits.
        hidden_size: width of the features.
        classes: rows of the head; 0: there is none.
        feature_scale: length that features are brought to; 0 leaves them as they are.
    """

    def __init__(
        self,
        encoder: nn.Module,
        reading: Callable[[nn.Module, Batch], Tensor],
        hidden_size: int = 0,
        classes: int = 0,
        feature_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.reading = encoder, reading
        self.head = nn.Linear(hidden_size, classes) if classes else None
        self.feature_scale = feature_scale

    def features(self, batch: Batch) -> Tensor:
        """Return what the head sees, shape (records, hidden), float32."""
        features = self.reading(self.encoder, batch)
        return F.normalize(features, dim=-1) * self.feature_scale if self.feature_scale else features

    def forward(self, batch: Batch) -> Tensor:
        """Return logits: with a head of shape (records, classes), float32; without, as the task reads them."""
        if self.head is None:
            return self.reading(self.encoder, batch)
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits

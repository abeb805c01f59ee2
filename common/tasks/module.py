"""The module that sites train: the base model as its task reads it, and a linear head where the task has labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.derived import Source
from fedveil.common.tasks.base import Batch
from fedveil.common.tasks.featured import FEATURES, SCALES, TANGENTS
from fedveil.common.tasks.tangent import Tangent


class Metric(nn.Module):
    """A public map of features, the same at the server and at every site: ``(x - centre) map``, without a gradient.

    Args:
        width: of the features. It begins as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.map = nn.Parameter(torch.eye(width), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mapped features, shape (records, width)."""
        return (features - self.centre) @ self.map

    @torch.no_grad()
    def folded(self, head: nn.Linear) -> dict[str, Tensor]:
        """Return weight and bias with which a head does without the map what ``head`` does behind it."""
        weight = head.weight.double() @ self.map.double().T
        return {"weight": weight.float(), "bias": (head.bias.double() - weight @ self.centre.double()).float()}


class TaskModule(nn.Module):
    """``head(metric(scale(reading(encoder, batch))))``, or the reading itself without a head.

    Args:
        encoder: the base model with the adapter in it.
        reading: what the task takes from the encoder: with a head, features of shape (records, width) or (records,
            tokens, width), float32; without, logits.
        width: of the features.
        classes: rows of the head; 0: no head.
        feature_scale: length that features are brought to; 0 leaves them as they are.
    """

    earlier: Sequence[Source] = ()
    """Runs whose results it uses beside the encoder."""

    def __init__(
        self,
        encoder: nn.Module,
        reading: Callable[[nn.Module, Batch], Tensor],
        width: int = 0,
        classes: int = 0,
        feature_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.reading, self.width = encoder, reading, width
        self.head = nn.Linear(width, classes) if classes else None
        self.feature_scale = feature_scale
        self.metric: Metric | None = None
        self.error, self.prior = 0.5, 0.0
        """About how long a loss's gradient at the logits is, and where the offsets of the head begin."""
        self.tangent: Tangent | None = None
        """What a batch with tangents adds to the logits; None: batches have none."""

    def features(self, batch: Batch) -> Tensor:
        """Return features, shape (records, width), float32; of a batch that has it already, that."""
        if FEATURES in batch:
            return batch[FEATURES]
        features = self.reading(self.encoder, batch)
        return F.normalize(features, dim=-1) * self.feature_scale if self.feature_scale else features

    def forward(self, batch: Batch) -> Tensor:
        """Return logits: with a head of shape (records, classes), float32; without, as the task reads them."""
        if self.head is None:
            return self.reading(self.encoder, batch)
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(self.metric(features) if self.metric is not None else features)
            if self.tangent is not None and TANGENTS in batch:
                logits = logits + self.tangent(batch[TANGENTS], batch[SCALES])
        return logits

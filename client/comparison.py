"""Comparisons of a made-up record's gradients; what differs is a model that cannot be trained privately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedveil.common.errors import MechanismError
from fedveil.common.model.federated import FederatedModel

MIXED = 1e-4
"""Deviation of a record's gradient, over its norm, above which records are mixed. Honest models: 1e-6; float32."""
SMALL = 1e-2
"""Share of a record's whole gradient below which a tensor's is not held against its own norm, but against that."""
COARSE = 0.05
"""The same between passes of one record in bfloat16, whose rounding alone is about a percent."""
LEAST = 1e-9
"""Norm of a whole gradient, and its inverse, outside which float32 might not show what is compared."""


def check_own(gradients: Sequence[Tensor], alone: Sequence[Tensor], layers: Sequence[str], what: str) -> None:
    """Raise MechanismError unless a record's gradients are those that it has by itself.

    Args:
        gradients: as they came out of a batch, one for each tensor.
        alone: of the record by itself.
        layers: the tensors' layers.
        what: what is compared, for the message.
    """
    whole = _norm(alone)
    if not LEAST < whole < 1 / LEAST:
        raise MechanismError(f"a made-up record has no {what} that could be compared: zero or not finite")
    for layer, gradient, wanted in zip(layers, gradients, alone, strict=True):
        scale = max(float(wanted.double().norm()), SMALL * whole)
        if not float((gradient.double() - wanted.double()).norm()) <= MIXED * scale:
            raise MechanismError(
                f"in the layer {layer!r} a record's {what} depends on the records beside it or before it; choose a "
                "model that computes each record by itself, or other adapter.targets"
            )


def check_finite(gradients: Sequence[Tensor] | None, what: str) -> list[Tensor]:
    """Return finite gradients; raise MechanismError for none or others, of which a comparison would say nothing."""
    if gradients is None or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise MechanismError(f"a made-up record's {what} is not finite, so nothing can be compared")
    return list(gradients)


def check_forgets(before: Sequence[Tensor], now: Sequence[Tensor], precision: torch.dtype, what: str) -> None:
    """Raise MechanismError if a record's gradients change with what passed before it."""
    coarse = MIXED if precision == torch.float32 else COARSE
    apart = _norm([n.double() - b.double() for b, n in zip(before, now, strict=True)])
    if not apart <= coarse * _norm(before):
        raise MechanismError(f"a record's {what} depends on what was computed before it")


def check_repeats(before: Sequence[Tensor], now: Sequence[Tensor], device: torch.device, what: str) -> None:
    """Raise MechanismError if a record by itself gets other bits each time: how many passed before it shows.

    Of devices a CPU alone is known to add in a fixed order.
    """
    if device.type == "cpu" and not all(map(torch.equal, before, now)):
        raise MechanismError(f"a record's {what} depends on what was computed before it, if only by rounding")


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients]).norm())


class ComparedSteps(Protocol):
    """What is compared of a batch's records, and what a round does with all of them."""

    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return what is compared, of each record of a batch."""

    def release(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Do with batches what a round does."""


class FeatureSteps:
    """Features in place of gradients."""

    def __init__(self, model: FederatedModel) -> None:
        self._model = model

    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return the features of a batch's records."""
        del losses
        return [self._model.features(batch)]

    def release(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Compute the features of batches."""
        for batch in batches:
            self.samples(batch, losses)
        return []


class LossSteps(FeatureSteps):
    """Losses in place of gradients."""

    @torch.no_grad()
    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return the losses of a batch's records."""
        return [losses(batch)]

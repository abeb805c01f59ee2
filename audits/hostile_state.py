"""Adapter states that no honest server would send: how far one record then moves the sum, others included.

Any finite state is installed. With large factors the layers of a deep model blow rounding up until another
rounding is another answer. What must hold all the same is that a record moves nothing but its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from audits.worlds import minus, norm, plan
from common.batching import length_batches
from common.model import FederatedModel
from common.privacy.dpsgd import PrivateSteps
from common.tasks import Record

Cut = Callable[[FederatedModel, Sequence[Record]], Iterable[Any]]
CLIP = 1e-3


def fixed(model: FederatedModel, records: Sequence[Record]) -> Iterable[Any]:
    """Cut a batch as a site does."""
    return model.fixed_batches(records)


def by_neighbours(model: FederatedModel, records: Sequence[Record]) -> Iterable[Any]:
    """Cut a batch into as few tokens as fit, so that a record's shape depends on who is beside it (a fault)."""
    for group in length_batches([len(record["input_ids"]) for record in records], 64):
        yield model.batch([records[i] for i in group])


def install(model: FederatedModel, sizes: dict[str, float]) -> None:
    """Write a random B into each layer: of the size of the first key of ``sizes`` that is in the layer's name."""
    draw = torch.Generator().manual_seed(5)
    model.write(model.start)
    with torch.no_grad():
        for layer, factors in sorted(model.places().items()):
            if "B" in factors:
                size = next((size for word, size in sizes.items() if word in layer), 1.0)
                factors["B"].copy_(size * torch.randn(factors["B"].shape, generator=draw))


def clips_moved(model: FederatedModel, records: Sequence[Record], cut: Cut, leave_out: Iterable[int]) -> float:
    """Return how far, in clips, the noiseless sum moves at most when one of ``leave_out`` is taken away."""
    trained = [p for p in model.module.parameters() if p.requires_grad]

    def total(chosen: Sequence[Record]) -> list[Tensor]:
        with PrivateSteps(model.module, SGD(trained, lr=0.0), plan(CLIP)) as steps:
            return [gradient.double() for gradient in steps.release(cut(model, chosen), model.losses)]

    whole = total(records)
    return max(norm(minus(whole, total([*records[:i], *records[i + 1 :]]))) for i in leave_out) / CLIP

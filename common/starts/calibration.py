"""The length of a frozen factor at which records' gradients are as long as with random orthonormal directions.

One clip covers the adapter and the head: a start whose A makes the adapter's gradients longer takes from the head what
the clip leaves it. Where the trained factor is multiplied by frozen ones, only the product of these and
the scale matters (``FreeScale``: A where B or a diagonal is trained, B where A is), so a frozen one is scaled
and the scale stays 1. ``lora-increments`` trains both factors: there the length of neither is the scale, which is a
number of its own before the whole change. Other adapters have none that a start may choose, and say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedveil.common.errors import ModelError
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.starts.gradient import record_gradients
from fedveil.common.tasks import Record

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


def calibrated(model: FederatedModel, adapter: AdapterState, records: Sequence[Record]) -> AdapterState:
    """Return ``adapter`` with every factor of a free scale times one number.

    It is the median over public records of ‖∇‖ with random orthonormal directions, over that with those at hand; ∇ is a
    record's gradient of all that is trained below the head where the model starts: G Aᵀ of a B, Bᵀ G of an A at 0, for
    the gradient G of an adapted weight. With random directions it is taken in the root of the mean square over all of
    them, which for a B is r / n ‖G‖² of a layer with n inputs (``FreeScale.share``).

    Raises:
        ModelError: the median is 0, such as with a head that starts at zero.
    """
    free = model.adapter.traits.free_scale
    if isinstance(free, str):
        raise TypeError(f"the {model.adapter.name} adapter {free}")
    lengths: list[Tensor] = []
    model.write(adapter)
    for gradients in record_gradients(model, records):
        squares = torch.zeros(2, len(next(iter(gradients.values()))[0]), dtype=torch.float64)
        for name, (left, right) in gradients.items():
            factors = {factor: tensor.double() for factor, tensor in adapter[name].items()}
            for i, (one, other) in enumerate(zip(left.cpu().double(), right.cpu().double(), strict=True)):
                G = one.T @ other
                squares[0, i] += free.share(model.adapter.rank, *G.shape) * G.square().sum()
                squares[1, i] += sum(part.square().sum() for part in free.gradients(factors, G).values())
        lengths.append(squares.sqrt())
    random, given = torch.cat(lengths, dim=1).median(dim=1).values.tolist()
    if not (random > 0 and given > 0):
        raise ModelError(
            "adapter.alpha cannot be calibrated, because the public phrases have no gradient: set head.start to "
            "'label-words' or 'random', or give adapter.alpha a number"
        )
    times = random / given
    return {
        layer: {name: t * times if (layer not in OWN and name in free.factors) else t for name, t in factors.items()}
        for layer, factors in adapter.items()
    }

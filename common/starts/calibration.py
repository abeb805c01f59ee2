"""The length of A at which records' gradients are as long as with random orthonormal rows.

One clip covers the adapter and the head: a start whose A makes the adapter's gradients longer takes from the head what
the clip leaves it. With B trained from 0 only the product of scale and A matters, so A is scaled and the scale stays 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.adapters.base import stored_transposed
from common.errors import ModelError
from common.messages.state import OWN, AdapterState
from common.model.federated import FederatedModel
from common.starts.gradient import open_weights
from common.tasks import Record


def calibrated(model: FederatedModel, adapter: AdapterState, records: Sequence[Record]) -> AdapterState:
    """Return ``adapter`` with every A times one number.

    It is the median over public records of ‖G Aᵀ‖ with random orthonormal rows, over that with the A at hand; G is a
    record's gradient of all adapted weights where the model starts, B = 0. With random rows it is taken in the root of
    the mean square over all of them, which is r / n ‖G‖² of a layer with n inputs.

    Raises:
        ModelError: the median is 0, such as with a head that starts at zero.
    """
    layers = model.adapter.layers(model.peft_model)
    lengths = torch.zeros(2, len(records), dtype=torch.float64)
    model.write(adapter)
    was_training = model.module.training
    model.module.eval()
    with open_weights(model) as weights:
        for i, record in enumerate(records):
            gradients = torch.autograd.grad(model.losses(model.batch([record])).sum(), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                G = (gradient.T if stored_transposed(layers[name]) else gradient).detach().cpu().double()
                lengths[0, i] += model.adapter.rank / G.shape[1] * G.square().sum()
                lengths[1, i] += (G @ adapter[name]["A"].double().T).square().sum()
    model.module.train(was_training)
    wanted, found = lengths.sqrt().median(dim=1).values.tolist()
    if not (wanted > 0 and found > 0):
        raise ModelError(
            "adapter.alpha cannot be calibrated, because the public phrases have no gradient: set head.start to "
            "'label-words' or 'random', or give adapter.alpha a number"
        )
    return {
        layer: {name: t * (wanted / found) if (layer not in OWN and name == "A") else t for name, t in factors.items()}
        for layer, factors in adapter.items()
    }

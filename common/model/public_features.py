"""Features of public records, kept while all that they follow from stays as it is.

A model's head moves in every round, and in many the adapter rests: the features below it are then those of the round
before. What a process has computed of public text serves whoever needs it there, server or simulated site. No site
keeps features of its own records here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.layers import layers_of
from fedveil.common.messages.tensors import entries
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import choose_batch_tokens
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.featured import of_record

MOST = 2
"""Sets of features that are kept of a model, the latest used."""
_kept: WeakKeyDictionary[FederatedModel, OrderedDict[str, list[Record]]] = WeakKeyDictionary()


def with_features(model: FederatedModel, records: Sequence[Record]) -> list[Record]:
    """Return public records as the model's features of them and their labels; the same list where nothing has changed.

    Features are on the CPU, float32, and to the bit those of ``score_records``, whose batches they are computed in.

    Args:
        model: one with a head, at the adapter that is meant.
        records: of ``prepare``; they stay as they are.
    """
    kept = _kept.setdefault(model, OrderedDict())
    key = f"{adapter_key(model)} {records_key(records)}"
    if key not in kept:
        kept[key] = _computed(model, records)
        while len(kept) > MOST:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def adapter_key(model: FederatedModel) -> str:
    """Return the SHA-256 of all below the head that is ever rewritten: every factor to the bit, and its scale."""
    digest = hashlib.sha256()
    places = parameters_of(model.adapter, model.peft_model).items()
    for layer, name, tensor in entries({layer: dict(factors) for layer, factors in places}):
        digest.update(f"{layer}/{name};".encode())
        digest.update(_bytes(tensor))
    digest.update(repr([dict(layer.scaling) for layer in layers_of(model.peft_model).values()]).encode())
    return digest.hexdigest()


def records_key(records: Sequence[Record]) -> str:
    """Return the SHA-256 of records, in their order."""
    digest = hashlib.sha256()
    for record in records:
        for name in sorted(record):
            value = record[name]
            digest.update(f"{name};".encode())
            digest.update(_bytes(value) if isinstance(value, Tensor) else f"{value!r};".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return f"{plain.dtype}{tuple(plain.shape)};".encode() + plain.view(-1).view(torch.uint8).numpy().tobytes()


def _computed(model: FederatedModel, records: Sequence[Record]) -> list[Record]:
    made: dict[int, Record] = {}
    was_training = model.module.training
    model.module.eval()
    try:
        with model.many_passes():
            groups = length_batches(
                [model.task.size(record) for record in records], choose_batch_tokens(0, model.device)
            )
            for group in groups:
                batch = model.batch([records[i] for i in group])
                vectors = zip(group, model.features(batch).cpu(), batch["labels"].tolist(), strict=True)
                made |= {i: of_record(records[i], vector, label) for i, vector, label in vectors}
    finally:
        model.module.train(was_training)
    return [made[i] for i in range(len(records))]

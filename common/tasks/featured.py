"""A labelled task over features of the frozen base model, for runs that train nothing below the head.

A record's features follow from the record alone and from the frozen base model, so they are computed once, each record
in its own fixed shape, and what is left of the record is that vector and its label. Steps then run on vectors, in one
fixed shape. Records that have no features yet are the inner task's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedveil.common.tasks.base import Batch, Inventor, Record, Sums, Task, owner_of
from fedveil.common.tasks.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.module import TaskModule

FEATURES = "features"
"""What a record and a batch call the features, shape (width,) and (records, width), float32."""
TANGENTS = "tangents"
"""What they call the derivatives of ``common.tasks.tangent``, shape (labels - 1, numbers) and (records, labels - 1,
numbers), float16."""
SCALES = "tangent scales"
"""What they call the powers of two by which tangents are multiplied, shape (labels - 1,) and (records, labels - 1),
float32: float16 alone would lose derivatives that are small or large."""
VECTORS = (FEATURES, TANGENTS, SCALES)
ROWS = 256
"""Vectors of a pass: one a record, or one for each row of its tangents, which are far longer."""


class Featured(Task):
    """The task ``inner``, whose records may be features, ``width`` numbers each.

    Args:
        inner: the task.
        width: of the features.
        tangents: shape of the tangents beside the features (``common.tasks.tangent``); empty: there are none.
    """

    def __init__(self, inner: Task, width: int, tangents: tuple[int, ...] = ()) -> None:
        self.inner, self.width, self.tangents = inner, width, tangents
        # Of this instance: a row of the table has them as its class's.
        vars(self).update(
            name=inner.name, roles=inner.roles, example=inner.example, counted=inner.counted, worded=inner.worded
        )

    def of_phrase(self, phrase: str) -> Example:
        """Return what the inner task makes of a phrase."""
        return self.inner.of_phrase(phrase)

    def of_pair(self, first: str, second: str) -> Example:
        """Return what the inner task makes of two texts."""
        return self.inner.of_pair(first, second)

    def of_text(self, text: str) -> Example:
        """Return what the inner task makes of a text."""
        return self.inner.of_text(text)

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return what the inner task loads."""
        return self.inner.load(name)

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return what decides the inner task's records."""
        return self.inner.processor_parts(processor)

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the inner task's."""
        return self.inner.limit(base, max_length)

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return the inner task's records, without features."""
        return self.inner.prepare(base, examples, limit)

    def size(self, record: Record) -> int:
        """Return 1 for a vector."""
        return 1 if FEATURES in record else self.inner.size(record)

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the base model can take a record, or took it already."""
        return FEATURES in record or self.inner.fits(base, record, limit)

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        """Return the one shape of vectors; whatever a pass of tokens may hold, vectors are small."""
        del base, limit, tokens
        from fedveil.common.model.shapes import Shapes

        rows = ROWS // self.tangents[0] if self.tangents else ROWS
        return Shapes(longest=1, tokens=max(1, rows), most=most, uniform=True)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return ``features``, shape (records, width), and ``labels``, shape (records,); or the inner task's batch.

        Where records have tangents, the batch has them and their scales as well.
        """
        import torch

        if FEATURES not in records[0]:
            return self.inner.collate(base, records, size)
        vectors = [key for key in VECTORS if key in records[0]]
        return {
            **{key: torch.stack([record[key] for record in records]) for key in vectors},
            "labels": torch.tensor([record["labels"] for record in records]),
        }

    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return vectors of zeros."""
        if FEATURES not in like:
            return self.inner.filler(base, like)
        vectors = [key for key in VECTORS if key in like]
        return {**{key: like[key].new_zeros(like[key].shape) for key in vectors}, "labels": 0}

    def inventor(self, base: BaseModel, limit: int) -> Inventor:
        """Return what draws vectors, each of length 1, by their number."""
        del base, limit
        import torch
        import torch.nn.functional as F

        from fedveil.privacy.randomness import stream

        def invent(size: int, number: int, label: int) -> Record:
            drawn = torch.randn(self.width, generator=stream(number, "features", str(size)))
            made: Record = {FEATURES: F.normalize(drawn, dim=0), "labels": label}
            if self.tangents:
                drawn = torch.randn(self.tangents, generator=stream(number, "tangents", str(size)))
                made[TANGENTS], made[SCALES] = F.normalize(drawn, dim=-1).half(), torch.ones(self.tangents[0])
            return made

        return invent

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the inner task's module, whose head takes features as they are."""
        return self.inner.module(encoder, base, classes, feature_scale)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return the inner task's, whose head takes a batch of vectors or of records."""
        return self.inner.sums(module, batch)


def put_features(records: Sequence[Record], batch: Batch, features: Tensor) -> None:
    """Leave in each record its features and its label alone, and whose it is.

    Args:
        records: what ``batch`` was made of, in its order.
        features: shape (records, width).
    """
    for record, vector, label in zip(records, features.detach().cpu(), batch["labels"].tolist(), strict=False):
        whose = owner_of(record)
        record.clear()
        record.update({FEATURES: vector.clone(), "labels": label, **whose})

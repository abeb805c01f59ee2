"""Batches of features of the frozen base model, for runs that train nothing below the head.

A record's features follow from the record alone and from the frozen base model, so they are computed once, each record
in its own fixed shape, and what is left of the record is that vector and its label. Steps then run on vectors, in one
fixed shape. Where the head reads each token (``Task.by_token``) a record has a vector for each, and steps run in the
shapes of the records' lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from fedveil.common.tasks.base import IGNORED, Batch, Inventor, Record, Task, owner_of

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes

FEATURES = "features"
"""What a record and a batch call the features, shape (width,) and (records, width), float32; of tokens (tokens, width)
and (records, tokens, width)."""
TANGENTS = "tangents"
"""What they call the derivatives of ``common.tasks.tangent``, shape (labels - 1, numbers) and (records, labels - 1,
numbers), float16."""
SCALES = "tangent scales"
"""What they call the powers of two by which tangents are multiplied, shape (labels - 1,) and (records, labels - 1),
float32: float16 alone would lose derivatives that are small or large."""
VECTORS = (FEATURES, TANGENTS, SCALES)
ROWS = 256
"""Vectors of a pass: one a record, or one for each row of its tangents, which are far longer."""
OF_TOKENS = 4096
"""The same where each token has one."""


class FeatureCollator:
    """Makes batches of features, or as ``task`` does of records that have none yet.

    Args:
        task: the task.
        width: of the features.
        tangents: shape of the tangents beside the features (``common.tasks.tangent``); empty: there are none.
    """

    def __init__(self, task: Task, width: int, tangents: tuple[int, ...] = ()) -> None:
        self.task, self.width, self.tangents = task, width, tangents

    def size(self, record: Record) -> int:
        """Return 1 for a vector, or the number of a record's."""
        if FEATURES not in record:
            return self.task.size(record)
        return len(record[FEATURES]) if self.task.by_token else 1

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the base model can take a record, or took it already."""
        return FEATURES in record or self.task.fits(base, record, limit)

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        """Return the one shape of vectors; whatever a pass of tokens may hold, vectors are small."""
        del tokens
        from fedveil.common.model.shapes import Shapes

        if self.task.by_token:
            return self.task.shapes(base, limit, OF_TOKENS, most)
        rows = ROWS // self.tangents[0] if self.tangents else ROWS
        return Shapes(longest=1, tokens=max(1, rows), most=most, uniform=True)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return ``features``, shape (records, width), and ``labels``, as the task has them; or the task's batch.

        Where records have tangents, the batch has them and their scales as well.
        """
        import torch

        if FEATURES not in records[0]:
            return self.task.collate(base, records, size)
        if self.task.by_token:
            longest = size or max(map(self.size, records))
            labels = [[*record["labels"], *[IGNORED] * (longest - self.size(record))] for record in records]
            features = records[0][FEATURES].new_zeros(len(records), longest, records[0][FEATURES].shape[1])
            for row, record in zip(features, records, strict=True):
                row[: self.size(record)] = record[FEATURES]
            return {FEATURES: features, "labels": torch.tensor(labels)}
        vectors = [key for key in VECTORS if key in records[0]]
        return {
            **{key: torch.stack([record[key] for record in records]) for key in vectors},
            "labels": torch.tensor([record["labels"] for record in records]),
        }

    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return vectors of zeros."""
        if FEATURES not in like:
            return self.task.filler(base, like)
        if self.task.by_token:
            return {FEATURES: like[FEATURES].new_zeros(1, like[FEATURES].shape[1]), "labels": [IGNORED]}
        vectors = [key for key in VECTORS if key in like]
        labels = [0] * len(like["labels"]) if isinstance(like["labels"], list) else 0
        return {**{key: like[key].new_zeros(like[key].shape) for key in vectors}, "labels": labels}

    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        """Return what draws vectors, each of length 1, by their number."""
        del base, limit, lifelike
        import torch
        import torch.nn.functional as F

        from fedveil.privacy.randomness import stream

        def invent(size: int, number: int, label: int) -> Record:
            many = (size,) if self.task.by_token else ()
            drawn = torch.randn((*many, self.width), generator=stream(number, "features", str(size)))
            made: Record = {FEATURES: F.normalize(drawn, dim=-1), "labels": [label] * size if many else label}
            if self.tangents:
                drawn = torch.randn(self.tangents, generator=stream(number, "tangents", str(size)))
                made[TANGENTS], made[SCALES] = F.normalize(drawn, dim=-1).half(), torch.ones(self.tangents[0])
            return made

        return invent


Collator: TypeAlias = Task | FeatureCollator
"""Makes batches of records, fillers for them, and records that are no one's."""


def put_features(records: Sequence[Record], batch: Batch, features: Tensor) -> None:
    """Leave in each record its features and its label alone, and whose it is.

    Args:
        records: what ``batch`` was made of, in its order.
        features: shape (records, width), or (records, tokens, width).
    """
    for record, vector, label in zip(records, features.detach().cpu(), batch["labels"].tolist(), strict=False):
        whose, vectors = owner_of(record), of_record(record, vector, label)
        record.clear()
        record.update({**vectors, **whose})


def of_record(record: Record, features: Tensor, label: Any) -> Record:
    """Return features and label of a record, of tokens those that are its own and no padding.

    Args:
        record: as its task prepared it.
        features: of its row of a batch, on the CPU.
        label: of that row.
    """
    if features.dim() > 1:
        return {FEATURES: features[: len(record["labels"])].clone(), "labels": record["labels"]}
    return {FEATURES: features.clone(), "labels": label}


def labelled_rows(record: Record) -> Tensor:
    """Return a record's features as a matrix, shape (vectors, width): one vector, or those of its labelled tokens."""
    import torch

    features: Tensor = record[FEATURES]
    return features[None] if features.dim() == 1 else features[torch.tensor(record["labels"]) != IGNORED]

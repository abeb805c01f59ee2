"""What a kind of task must say: how records become tokens, one loss per record, and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.examples import Example

Record = dict[str, list[int]]
"""One tokenised record: ``input_ids`` and what the task needs beside it."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sums:
    """Per-record sums that scores are made of, each of shape (records,), float32."""

    loss: Tensor
    correct: Tensor
    weight: Tensor
    """Units that loss and correct are over: 1 a record, or the completion's tokens."""


class Task(ABC):
    """A kind of task; no state, so one instance serves every model."""

    name: ClassVar[str]
    has_head: ClassVar[bool]

    @abstractmethod
    def tokenise(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Record]:
        """Return one record per example, cut to ``max_length`` tokens."""

    @abstractmethod
    def collate(self, records: Sequence[Record], pad_id: int, length: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right to the longest, or to ``length``."""

    @abstractmethod
    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record that is no one's, of these tokens and with the fields of ``like``."""

    @abstractmethod
    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Run the model and return per-record sums; records never see each other."""

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per record, shape (records,), float32: what each site minimises."""
        sums = self.sums(module, batch)
        return sums.loss / sums.weight


def padded(rows: Sequence[Sequence[int]], value: int, length: int = 0) -> Tensor:
    """Return ``rows`` as one int64 tensor, filled up on the right with ``value`` to the longest, or to ``length``."""
    longest = length or max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])

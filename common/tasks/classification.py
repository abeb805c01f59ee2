"""Sequence classification: encoder, mean over the mask, one linear head.

A mean-pool head keeps its accuracy under DP-SGD where BERT's pooler loses ten points (DATA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import DataError
from common.examples import Example
from common.tasks.base import Batch, Record, Sums, Task, padded


class TextClassifier(nn.Module):
    """``head(pool(encoder(tokens)))``; the pooled features are brought to length ``feature_scale``."""

    def __init__(self, encoder: nn.Module, hidden_size: int, classes: int, feature_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, classes)
        self.feature_scale = feature_scale

    def features(self, batch: Batch) -> Tensor:
        """Return pooled features, shape (records, hidden), float32."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        hidden = self.encoder(**inputs).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        # A record without a token pools to zero instead of dividing by it.
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return F.normalize(pooled, dim=-1) * self.feature_scale if self.feature_scale else pooled

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (records, classes), float32."""
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits


class Classification(Task):
    """One label a record; loss is cross-entropy."""

    name: ClassVar[str] = "classification"
    has_head: ClassVar[bool] = True

    def tokenise(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Record]:
        """Return ``input_ids``, ``attention_mask``, ``token_type_ids`` where the model has them, ``labels``."""
        if not examples:
            return []
        texts = [example.text for example in examples]
        pairs = [example.text_pair or "" for example in examples] if examples[0].text_pair is not None else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        records: list[Record] = []
        for i, example in enumerate(examples):
            if example.label is None:
                raise DataError(f"record {i + 1} has no label; classification needs one for each record")
            records.append({**{k: encoded[k][i] for k in encoded}, "labels": [example.label]})
        return records

    def collate(self, records: Sequence[Record], pad_id: int, length: int = 0) -> Batch:
        """Return tensors of shape (records, tokens) and ``labels`` of shape (records,)."""
        batch = {
            key: padded([record[key] for record in records], pad_id if key == "input_ids" else 0, length)
            for key in records[0]
            if key != "labels"
        }
        return {**batch, "labels": torch.tensor([record["labels"][0] for record in records])}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record of one text, of this label."""
        fill = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens), "labels": [label]}
        return {key: fill.get(key, [0] * len(tokens)) for key in like}

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, one unit a record."""
        logits = module(batch)
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        correct = (logits.argmax(-1) == batch["labels"]).float()
        return Sums(loss, correct, torch.ones_like(loss))

"""Causal language modelling: loss on the completion only, averaged inside each record.

Averaging over the tokens of the batch, as the stock ``outputs.loss`` does, would couple records:
one record's gradient would depend on the lengths of its neighbours, and the clip would no longer
bound what one record can change (PRIVACY: 1.3, pitfall 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import DataError
from common.examples import Example
from common.tasks.base import Batch, Record, Sums, Task, padded

IGNORED = -100


class CompletionModel(nn.Module):
    """A decoder with its own language-model head; a thin shell so that both tasks look alike."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (records, tokens, vocabulary)."""
        output = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits: Tensor = output.logits
        return logits


class CausalLM(Task):
    """Prompt and completion; the loss is the mean negative log-likelihood of the completion's tokens."""

    name: ClassVar[str] = "causal-lm"
    has_head: ClassVar[bool] = False

    def tokenise(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Record]:
        """Return ``input_ids`` of prompt, completion and end mark, and ``labels`` that ignore the prompt.

        A record that is too long loses the beginning of its prompt, never its whole completion.
        """
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        records: list[Record] = []
        for i, example in enumerate(examples):
            if not example.completion:
                raise DataError(f"record {i + 1} has an empty completion; there is nothing to learn from it")
            prompt = tokenizer(example.text)["input_ids"]
            completion = (tokenizer(example.completion, add_special_tokens=False)["input_ids"] + end)[: max_length - 1]
            prompt = prompt[-(max_length - len(completion)) :] or [tokenizer.eos_token_id or 0]
            records.append(
                {
                    "input_ids": prompt + completion,
                    "attention_mask": [1] * (len(prompt) + len(completion)),
                    "labels": [IGNORED] * len(prompt) + completion,
                }
            )
        return records

    def collate(self, records: Sequence[Record], pad_id: int, length: int = 0) -> Batch:
        """Return tensors of shape (records, tokens); padding is never a target."""
        fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
        return {key: padded([record[key] for record in records], fill[key], length) for key in records[0]}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record whose last third is the completion; of one token, it has no target and its loss is 0."""
        prompt = len(tokens) - len(tokens) // 3
        labels = [IGNORED] * prompt + list(tokens[prompt:])
        return {"input_ids": list(tokens), "attention_mask": [1] * len(tokens), "labels": labels}

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return negative log-likelihood and hits, summed over the completion's tokens."""
        logits = module(batch)[:, :-1].float()
        targets = batch["labels"][:, 1:]
        mask = (targets != IGNORED).float()
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        correct = (logits.argmax(-1) == targets).float() * mask
        return Sums((loss * mask).sum(1), correct.sum(1), mask.sum(1).clamp(min=1))

"""Whisper as sites train it, and how it writes down what it hears."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, WhisperForConditionalGeneration

from fedveil.common.tasks.base import IGNORED, Batch
from fedveil.common.tasks.module import TaskModule
from fedveil.contrib.tasks.clips import MEL, READ
from fedveil.contrib.tasks.words import word_errors, words_in


class Transcriber(TaskModule):
    """Whisper with the tokenizer that its words are read by."""

    def __init__(self, whisper: nn.Module, tokenizer: Any) -> None:
        super().__init__(whisper, _logits)
        self.tokenizer = tokenizer

    def written(self, batch: Batch) -> list[str]:
        """Return the words that the model writes for each record, the likeliest token at a time."""
        whisper = next(child for child in self.encoder.modules() if isinstance(child, WhisperForConditionalGeneration))
        marks, end = batch[READ][:, : len(self.tokenizer.prefix_tokens)], self.tokenizer.eos_token_id
        # Whisper's own ``generate`` is about windows of thirty seconds, one after another.
        tokens: Any = GenerationMixin.generate(
            cast(Any, whisper),
            batch[MEL],
            decoder_input_ids=marks,
            max_length=batch[READ].shape[1],
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        rows = [row[: row.index(end)] if end in row else row for row in tokens[:, marks.shape[1] :].tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def right_words(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each record's words less its errors, at least 0, and its words, shape (records,), float32."""
        rows = [[token for token in row if token != IGNORED] for row in batch["labels"].tolist()]
        said = [words_in(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        given = map(words_in, self.written(batch))
        right = [float(max(0, len(a) - word_errors(a, b))) for a, b in zip(said, given, strict=True)]
        return torch.tensor(right), torch.tensor([float(len(words)) for words in said])


def _logits(whisper: nn.Module, batch: Batch) -> Tensor:
    """Return logits, shape (records, tokens, vocabulary)."""
    logits: Tensor = whisper(input_features=batch[MEL], decoder_input_ids=batch[READ], use_cache=False).logits
    return logits

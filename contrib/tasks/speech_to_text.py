"""Speech to text: Whisper as it is, one clip and its words a record.

Loss is the mean negative log-likelihood over the tokens of a record's own words and its end mark. A record has room for
as many tokens as follow from the length of the run's clips; longer words are cut. Tokens that fill it up come last, and
the decoder sees none that come later, so they need no mask. A score decodes greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import DataError
from fedveil.common.tasks.base import IGNORED, Batch, Record, Scored, Sums
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Answer, Export, Finished, Questions
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.text import tokenizer_parts
from fedveil.contrib.tasks.clips import (
    A_SECOND,
    CLIP,
    READ,
    ClipExample,
    ClipTask,
    clip_record,
    whisper_config,
    write_extractor,
)
from fedveil.contrib.tasks.sound import sound_of
from fedveil.contrib.tasks.words import words_in

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule
    from fedveil.contrib.tasks.transcriber import Transcriber

FASTEST, AROUND = 8, 8
"""Tokens that a second of speech has at most, and those around it: marks before the words, the end, a short clip's."""
RIGHT = "right words"
"""What a score calls 1 less the word error rate, in which a clip counts with its own words at most."""


def room(limit: int) -> int:
    """Return the tokens of a record whose clip has ``limit`` positions."""
    return limit // A_SECOND * FASTEST + AROUND


class SpeechExport(Export):
    """Whisper as stock libraries have it, its window as long as the run's clips."""

    hub_task = "automatic-speech-recognition"
    loader = "AutoModelForSpeechSeq2Seq"

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write tokenizer, and the processor's settings for clips of the run's length."""
        model.base.processor.tokenizer.save_pretrained(folder)
        write_extractor(model, folder)

    def code(self, model: Finished, folder: str) -> str:
        """Return code that transcribes a clip with transformers."""
        return (
            "from transformers import pipeline\n\n"
            f"transcribe = pipeline({self.hub_task!r}, model={folder!r})\n"
            'print(transcribe("clip.wav"))\n'
        )


def transcribed(model: Finished, examples: Sequence[Example]) -> list[list[Answer]]:
    """Return the words of each clip."""
    records = model.task.prepare(model.base, examples, model.limit)
    module = cast("Transcriber", model.module)
    return [[Answer(module.written(model.task.collate(model.base, [record]))[0], None)] for record in records]


class SpeechToText(ClipTask):
    """What is said in a clip; the score is on its words."""

    name: ClassVar[str] = "speech-to-text"
    roles: ClassVar[tuple[Role, ...]] = (CLIP, Role("text", "text", "what is said", in_question=False))
    scored: ClassVar[Scored] = Scored(headline=RIGHT)
    questions: ClassVar[Questions | None] = Questions(
        lambda words: ClipExample(sound_of(words[0]), text="words"), transcribed
    )
    export: ClassVar[Export] = SpeechExport()

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return Whisper and its processor."""
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        model = AutoModelForSpeechSeq2Seq.from_pretrained(name, config=whisper_config(name), **OWN_CODE)
        return model, AutoProcessor.from_pretrained(name, **OWN_CODE)

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return the settings of what makes spectrograms, and the tokenizer's rules."""
        return {**super().processor_parts(processor), "tokenizer": tokenizer_parts(processor.tokenizer)}

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return ``input_features``, ``decoder_input_ids`` and ``labels`` of ``room(limit)``, and ``tokens``."""
        records: list[Record] = []
        for i, example in enumerate(cast(Sequence[ClipExample], examples)):
            if not words_in(example.text):
                raise DataError(f"record {i + 1} has no words; there is nothing to learn from it")
            records.append(
                {**clip_record(base, example, limit), **_tokens(base.processor.tokenizer, example.text, limit)}
            )
        return records

    def invented(self, base: BaseModel, mel: Tensor, label: int, limit: int) -> Record:
        """Return a record that is no one's, of a spectrogram and words that have nothing to do with it."""
        return {
            **super().invented(base, mel, label, limit),
            **_tokens(base.processor.tokenizer, "one two three", limit),
        }

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the model as it is: it has a head of its own."""
        from fedveil.contrib.tasks.transcriber import Transcriber

        return Transcriber(encoder, base.processor.tokenizer)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return negative log-likelihood and hits over the tokens of each record's words, and who counts its words."""
        import torch.nn.functional as F

        logits = module(batch).float()
        targets = batch["labels"]
        mask = (targets != IGNORED).float()
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        correct = (logits.argmax(-1) == targets).float() * mask
        units = mask.sum(1).clamp(min=1)
        return Sums(
            loss.sum(1), correct.sum(1), units, ratios=lambda: {RIGHT: cast("Transcriber", module).right_words(batch)}
        )


def _tokens(tokenizer: Any, text: str, limit: int) -> dict[str, list[int]]:
    """Return what the decoder reads and what it is to write at each place, the words cut so that the end mark fits."""
    most, before = room(limit), list(tokenizer.prefix_tokens)
    words = tokenizer.encode(f" {text.strip()}", add_special_tokens=False)[: most - len(before)]
    whole = [*before, *words, tokenizer.eos_token_id]
    targets = [IGNORED] * (len(before) - 1) + whole[len(before) :]
    fill = most - len(whole) + 1
    return {READ: [*whole[:-1], *[tokenizer.eos_token_id] * fill], "labels": [*targets, *[IGNORED] * fill]}


TASK = SpeechToText()

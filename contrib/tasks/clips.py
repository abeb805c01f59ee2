"""Common parts of the tasks on clips: windows of Whisper models, log-mel spectrograms, batches of one shape.

All clips of a run have one length, whole seconds that follow from ``model.max-length`` (50 tokens a second): a shorter
one ends in silence, a longer one is cut. So neither shape nor padding follows from a batch, and no mask is needed. The
model's table of positions is cut to that length. A spectrogram is made once, of its clip alone, by the constants of the
model's own processor; its floor is 8 below the clip's own maximum, and no data set's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.errors import ConfigError
from fedveil.common.tasks.base import Batch, Inventor, Record, Task
from fedveil.common.tasks.cell_files import cell_file, is_labelled_folder, read_labelled_folder
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.tables import Table
from fedveil.contrib.tasks.sound import AUDIO, SUFFIXES, Sound, read_sound, waveform
from fedveil.contrib.tasks.voices import made_up_voice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.finished import Finished

MEL, READ, TOKENS = "input_features", "decoder_input_ids", "tokens"
A_SECOND = 50
"""Positions of Whisper's encoder for a second of sound."""
FRAMES = 2
"""Frames of a spectrogram for each of them."""
CHANCE = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
"""Settings of a model by which it leaves something out by chance: all off."""
CLIP = Role(AUDIO, AUDIO, "the clip: its WAV file's bytes or path", read=read_sound, file=cell_file)


@dataclass(frozen=True, slots=True)
class ClipExample(Example):
    """One clip, and what is said in it where the task asks for that."""

    audio: Sound
    text: str = ""

    def canonical(self, label: str | None) -> str:
        """Return the hash of the samples, the words and the label; how the clip was stored does not count."""
        return f"audio:{self.audio.samples}:" + json.dumps([self.text, label])

    def likeness(self) -> str:
        """Return what is said, so that no sentence is in both parts of a split; without words the samples' hash."""
        return " ".join(self.text.split()).casefold() or self.audio.samples


def whisper_config(name: str) -> Any:
    """Return the configuration of a Whisper model, with nothing left to chance.

    Raises:
        ValueError: the model is of another kind.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **OWN_CODE)
    if config.model_type != "whisper":
        raise ValueError(f"it is of the kind {config.model_type!r}, and only Whisper's windows can be cut")
    config.apply_spec_augment = False
    for key in CHANCE:
        setattr(config, key, 0.0)
    return config


def encoder_in(module: nn.Module) -> Any:
    """Return Whisper's encoder, whatever is around it."""
    return next(child for child in module.modules() if type(child).__name__ == "WhisperEncoder")


def extractor_of(base: BaseModel) -> Any:
    """Return what makes spectrograms: the processor itself, or its half beside a tokenizer."""
    return getattr(base.processor, "feature_extractor", base.processor)


def cut_window(module: nn.Module, positions: int) -> None:
    """Cut the model's window to ``positions``, at most as many as it has."""
    from torch.nn import Embedding

    encoder = encoder_in(module)
    table = encoder.embed_positions.weight
    if positions < len(table):
        encoder.embed_positions = Embedding.from_pretrained(table[:positions].clone(), freeze=True)
    encoder.config.max_source_positions = encoder.max_source_positions = positions


class ClipTask(Task):
    """Clips of one length."""

    example: ClassVar[type[Example]] = ClipExample

    def read_source(self, source: Path) -> Table | None:
        """Return the clips of a folder with one sub-folder a label; None where the task has no labels."""
        labelled = self.labelled and is_labelled_folder(source)
        return read_labelled_folder(source, AUDIO, SUFFIXES) if labelled else None

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return the settings of what makes spectrograms."""
        settings = getattr(processor, "feature_extractor", processor).to_dict()
        return {"feature-extractor": {k: v for k, v in sorted(settings.items()) if not k.startswith("_")}}

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the positions of every clip, whole seconds; the model's window is that long from then on."""
        seconds = min(max_length, len(encoder_in(base.module).embed_positions.weight)) // A_SECOND
        if seconds < 1:
            raise ConfigError(f"model.max-length is {max_length}: set it to {A_SECOND} or more, a second of sound")
        cut_window(base.module, seconds * A_SECOND)
        return seconds * A_SECOND

    def size(self, record: Record) -> int:
        """Return the positions of a clip: the same of every record."""
        return int(record[TOKENS])

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the spectrogram is of the run's length and finite."""
        shape = (extractor_of(base).feature_size, FRAMES * limit)
        return tuple(record[MEL].shape) == shape and self.size(record) == limit and bool(record[MEL].isfinite().all())

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        """Return one shape for all, without padding."""
        from fedveil.common.model.shapes import Shapes

        return Shapes(limit, tokens, most, uniform=True)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return ``input_features`` of shape (records, bins, frames), float32, and what else records have, stacked."""
        import torch

        others = {
            key: torch.tensor([record[key] for record in records]) for key in records[0] if key not in (MEL, TOKENS)
        }
        return {MEL: torch.stack([record[MEL] for record in records]), **others}

    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return a spectrogram of zeros."""
        return {**like, MEL: like[MEL].new_zeros(like[MEL].shape)}

    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        """Return what draws every number of a spectrogram, or a voice if ``lifelike``; all sizes are one."""
        import torch

        shape = (extractor_of(base).feature_size, FRAMES * limit)

        def invent(size: int, number: int, label: int) -> Record:
            if lifelike:
                voice = made_up_voice(number, limit // A_SECOND, extractor_of(base).sampling_rate)
                return self.invented(base, spectrogram(base, voice, limit), label, limit)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            return self.invented(base, 0.5 * drawn, label, limit)

        return invent

    def invented(self, base: BaseModel, mel: Tensor, label: int, limit: int) -> Record:
        """Return a record that is no one's, of this spectrogram."""
        return {MEL: mel, "labels": label, TOKENS: limit}


def clip_record(base: BaseModel, example: ClipExample, limit: int) -> Record:
    """Return ``input_features`` of a clip, shape (bins, frames), float32, and the number of ``tokens``."""
    rate = extractor_of(base).sampling_rate
    return {MEL: spectrogram(base, waveform(example.audio, rate, limit // A_SECOND), limit), TOKENS: limit}


def spectrogram(base: BaseModel, samples: Any, limit: int) -> Tensor:
    """Return the log-mel spectrogram of one clip, shape (bins, frames), float32.

    Args:
        base: its processor has all constants.
        samples: at the processor's rate, from -1 to 1.
        limit: positions that it is cut to, or filled up to with silence.
    """
    extractor = extractor_of(base)
    made = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        max_length=limit // A_SECOND * extractor.sampling_rate,
        return_tensors="pt",
    )
    mel: Tensor = made[MEL][0].contiguous()
    return mel


def write_extractor(model: Finished, folder: Path) -> None:
    """Write the settings of what makes spectrograms, for clips of the run's length."""
    extractor = extractor_of(model.base)
    window = {"chunk_length": model.limit // A_SECOND}
    type(extractor)(**{**extractor.to_dict(), **window}).save_pretrained(folder)

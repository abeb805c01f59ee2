"""Audio classification: Whisper's encoder, the mean of its positions, one linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import DataError
from fedveil.common.tasks.base import Batch, Record, Sums, classified
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Export, Finished, Questions
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import LABEL, Role
from fedveil.common.tasks.stock import check_stock, head_of, write_apart
from fedveil.contrib.tasks.clips import (
    CLIP,
    MEL,
    ClipExample,
    ClipTask,
    clip_record,
    encoder_in,
    whisper_config,
    write_extractor,
)
from fedveil.contrib.tasks.sound import sound_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule

_CODE = """\
from transformers import pipeline

classify = pipeline("audio-classification", model={folder!r}, top_k={labels})
print(classify("clip.wav"))
"""
_LOGITS_CODE = """\
import json
import wave
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

folder = {folder!r}
with open(folder + "/labels.json", encoding="utf-8") as file:
    labels = json.load(file)
model = AutoModelForAudioClassification.from_pretrained(folder + "/encoder")
head = load_file(folder + "/head.safetensors")
extractor = AutoFeatureExtractor.from_pretrained(folder + "/encoder")
with wave.open("clip.wav") as file:  # one channel, 16 bits, at the extractor's rate
    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15
features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
with torch.no_grad():
    pooled = model.encoder(features).last_hidden_state.mean(1)
pooled = {scale} * torch.nn.functional.normalize(pooled, dim=-1)
probabilities = (pooled @ head["weight"].T + head["bias"]).softmax(-1)
print(dict(zip(labels, probabilities[0].tolist())))
"""


class AudioExport(Export):
    """Whisper's stock classifier with an identity for a projector; else encoder and head apart."""

    hub_task = "audio-classification"
    loader = "AutoModelForAudioClassification"

    def write(self, model: Finished, folder: Path) -> None:
        """Write the stock classifier, or encoder and head apart where features have one length (``head.safetensors``).

        Raises:
            ModelError: what the stock class computes is not what the run's model does.
        """
        import torch

        if not self.pipeline(model):
            write_apart(super().write, model, folder)
            return
        stock: Any = model.module.encoder
        names = dict(enumerate(model.labels))
        stock.config.id2label, stock.config.label2id = names, {name: i for i, name in names.items()}
        stock.classifier = torch.nn.Linear(stock.config.classifier_proj_size, len(names))
        stock.classifier.load_state_dict(head_of(model))
        check_stock(model, stock)
        super().write(model, folder)

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write the processor's settings for clips of the run's length."""
        write_extractor(model, folder)

    def pipeline(self, model: Finished) -> str:
        """Return the task's own where the stock class computes the run's head."""
        return "" if model.module.feature_scale else self.hub_task

    def code(self, model: Finished, folder: str) -> str:
        """Return code that classifies a clip with transformers, and the head's two tensors where they lie apart."""
        if self.pipeline(model):
            return _CODE.format(folder=folder, labels=len(model.labels))
        return _LOGITS_CODE.format(folder=folder, scale=model.module.feature_scale)


class AudioClassification(ClipTask):
    """One label a clip; loss is cross-entropy."""

    name: ClassVar[str] = "audio-classification"
    roles: ClassVar[tuple[Role, ...]] = (CLIP, LABEL)
    counted: ClassVar[bool] = True
    questions: ClassVar[Questions | None] = Questions(lambda words: ClipExample(sound_of(words[0]), label=0))
    export: ClassVar[Export] = AudioExport()

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return Whisper's stock classifier, which has no decoder; its projector is the identity, its head zero."""
        import torch
        from transformers import AutoModel, WhisperFeatureExtractor, WhisperForAudioClassification

        config = whisper_config(name)
        config.classifier_proj_size, config.use_weighted_layer_sum = config.d_model, False
        with torch.random.fork_rng():  # of numbers that are all replaced
            module: Any = WhisperForAudioClassification(config)
        whole = AutoModel.from_pretrained(name, config=config, **OWN_CODE)
        module.encoder.load_state_dict(encoder_in(whole).state_dict())
        with torch.no_grad():
            module.projector.weight.copy_(torch.eye(config.d_model))
            for tensor in (module.projector.bias, *module.classifier.parameters()):
                tensor.zero_()
        return module, WhisperFeatureExtractor.from_pretrained(name)

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return ``input_features`` of shape (bins, frames), float32, ``labels`` and the number of ``tokens``."""
        missing = next((i for i, example in enumerate(examples) if example.label is None), None)
        if missing is not None:
            raise DataError(f"record {missing + 1} has no label; classification needs one for each record")
        clips = cast(Sequence[ClipExample], examples)
        return [{**clip_record(base, example, limit), "labels": example.label} for example in clips]

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on the mean of its positions."""
        from fedveil.common.tasks.module import TaskModule

        return TaskModule(encoder, _mean, base.hidden_size, classes, feature_scale)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, one unit a record."""
        return classified(module, batch)


def _mean(whisper: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of the last hidden states, silence included, shape (records, width), float32."""
    hidden: Tensor = encoder_in(whisper)(batch[MEL]).last_hidden_state
    return hidden.float().mean(1)


TASK = AudioClassification()

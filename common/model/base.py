"""The frozen Hugging Face base model, its processor and its fingerprint.

Where its files lie is ``common.model.files``. The result is the stock model: nothing of ours is in it yet.

Transformers takes seconds to import, so only a function that loads a model does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.common.adapters.low_bits import quantise
from fedveil.common.errors import ModelNotLoaded
from fedveil.common.files import expanded
from fedveil.common.model.files import files_of, model_folder
from fedveil.common.model.named import NAMED_MODELS
from fedveil.common.tasks import TASKS, Task
from fedveil.common.tasks.loading import UNCOUNTED


@dataclass(frozen=True)
class BaseModel:
    """A stock model as loaded: float32 or in low bits, on the CPU, in eval mode."""

    name: str
    module: nn.Module
    processor: Any
    """What turns a record into the model's input: a tokenizer, an image processor."""
    fingerprint: str
    """SHA-256 of what the model computes: weights, configuration and processor, see ``model_fingerprint``."""
    files: str = ""
    """SHA-256 of the files that it was loaded from (``common.model.files``); empty: it was loaded from none."""

    @property
    def pin(self) -> str:
        """What a policy's ``models`` has of it beside its name: FINGERPRINT+FILES."""
        return f"{self.fingerprint}+{self.files}"

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.module.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def positions(self) -> int:
        """Most tokens that the model has positions for; without a limit of its own, as many as anyone asks for."""
        known = getattr(self.module.config, "max_position_embeddings", None)
        limits = [int(known)] if isinstance(known, int) and known > 0 else []
        for name, child in self.module.named_modules():
            if name.rpartition(".")[2] == "position_embeddings" and isinstance(child, nn.Embedding):
                # RoBERTa counts from behind the padding's own position.
                limits.append(child.num_embeddings - (0 if child.padding_idx is None else child.padding_idx + 1))
        return min(limits, default=sys.maxsize)


def weights_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights, in hexadecimal; equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def model_fingerprint(module: nn.Module, processor: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that decides what a model makes of a record, in hexadecimal.

    Weights alone do not: with another configuration, such as one that scales positions by the longest
    record of a batch, or with another tokenizer, the same weights are another function. Where the files lie, by
    which version of transformers they were written and in which precision does not count.

    Args:
        module: the stock model.
        processor: what a task says of the processor (``Task.processor_parts``).
    """
    settings = module.config.to_diff_dict()  # type: ignore[union-attr,operator]
    parts = {
        "weights": weights_fingerprint(module),
        "class": type(module).__name__,
        "config": {key: value for key, value in settings.items() if key not in UNCOUNTED and not key.startswith("_")},
        **processor,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def turn_dropout_off(module: nn.Module) -> None:
    """Set every dropout to 0: in train mode, which per-record gradients need, it would add noise to a frozen base."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        for child in module.modules():
            if hasattr(getattr(child, "config", None), name):
                setattr(child.config, name, 0.0)
            if isinstance(getattr(child, "attention_dropout", None), float):
                child.attention_dropout = 0.0  # type: ignore[assignment]


def _load(name: str, folder: Path, kind: Task) -> tuple[nn.Module, Any]:
    """Return what a task takes of the model in a folder, which is called ``name`` or by its path."""
    try:
        module, processor = kind.load(str(folder))
    except Exception as error:  # whatever a strange file makes a loader raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelNotLoaded(
            f"cannot load the base model {name!r}: it is none that model.task {kind.name!r} takes ({reason})"
        ) from error
    if folder != expanded(name):
        # A copy is in another folder every time, and gone; one of the hub is known by its repository.
        for part in (module, module.config, processor):
            if hasattr(part, "name_or_path"):
                part.name_or_path = "" if name in NAMED_MODELS else name
    return module, processor


def load_base_model(name: str, task: str | Task, pool: str = "mean", bits: str = "none", files: str = "") -> BaseModel:
    """Load a base model and its processor.

    Args:
        name: a key of NAMED_MODELS, a folder, or a hub id.
        task: kind of task, which knows what to load (``Task.load``); by its name, with its options as they are usual.
        pool: what the head reads of it (``head.pool``).
        bits: of its frozen linear layers (``model.quantise``). They count in the fingerprint.
        files: hash of its files (``files_of``), without which none is opened; empty: whatever they are.

    Raises:
        ModelError: bitsandbytes is not installed, or the model has no linear layers for it.
        ModelNotLoaded: the model cannot be found or read, is of a kind that the task does not take, or has other files.
        DataError: the package that carries a named model is missing or altered.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each model and file would stand between the lines that people read
    kind, files = (TASKS[task] if isinstance(task, str) else task).with_pool(pool), files or files_of(name)
    with model_folder(name, files) as folder:
        module, processor = _load(name, folder, kind)
    if name not in NAMED_MODELS and folder == expanded(name):
        name = str(folder)
    module = module.float().eval().requires_grad_(False)
    kind.check_model(module, name)
    if bits != "none":
        quantise(module, bits, name)
    return BaseModel(name, module, processor, model_fingerprint(module, kind.processor_parts(processor)), files)

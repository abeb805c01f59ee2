"""A trained adapter in the files that stock PEFT loads."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedveil.common.adapters.layers import ADAPTER_NAME, PEFT_PREFIX, layers_of
from fedveil.common.config.fields import TARGET_KINDS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from torch import Tensor

    from fedveil.common.adapters.base import Adapter


def write_stock(
    adapter: Adapter,
    model: PeftModel,
    layers: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    base_name: str,
    *,
    shared: Mapping[str, Tensor] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Write a stock PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors`` (float32).

    Args:
        adapter: of the configuration.
        model: with an adapter in it.
        layers: for each layer that is exported, its tensors by their names in PEFT.
        folder: made if it is missing.
        base_name: of the base model.
        shared: tensors that all layers use, by their names in PEFT.
        ranks: of LoRA's layers, where they differ from the adapter's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PEFT_PREFIX}{layer}.{suffix}": tensor.float().contiguous()
        for layer, parts in layers.items()
        for suffix, tensor in parts.items()
    }
    for suffix, tensor in (shared or {}).items():
        # PEFT writes what layers share beside each of them as well, and warns where a copy is missing.
        for owner in ("base_model", *(f"{PEFT_PREFIX}{name}" for name in layers_of(model))):
            tensors[f"{owner}.{suffix}"] = tensor.float().clone()
    config = _config(adapter, model, layers)
    config.base_model_name_or_path = base_name
    if ranks:
        lora = cast("LoraConfig", config)
        # PEFT takes the keys for regular expressions.
        lora.rank_pattern = {re.escape(name): rank for name, rank in ranks.items()}
        lora.alpha_pattern = {re.escape(name): alpha_at(adapter, rank) for name, rank in ranks.items()}
    config.save_pretrained(str(folder))
    from safetensors.torch import save_file

    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def write_injected(model: PeftModel, folder: Path, base_name: str) -> None:
    """Write the adapter that is in a model, as PEFT has it there, in the same two files."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in held.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, config.inference_mode = base_name, True
    config.save_pretrained(str(folder))


def _config(adapter: Adapter, model: PeftModel, layers: Collection[str]) -> PeftConfig:
    """Return the configuration of an export, which names the layers as a stock model has them."""
    injected = model.peft_config[ADAPTER_NAME]
    if len(layers) < len(layers_of(model)):
        # PEFT refuses a layer of rank 0, so the others are named in full.
        adapter = replace(adapter, target_modules=tuple(sorted(layers)))
    elif adapter.target_modules[0] in TARGET_KINDS:
        # A stock reader gets the names that a word such as ``auto`` stood for.
        targets = sorted(cast("LoraConfig", injected).target_modules or ())
        adapter = replace(adapter, target_modules=tuple(targets))
    config = adapter.peft_config(fan_in_fan_out=getattr(injected, "fan_in_fan_out", False))
    config.inference_mode, config.task_type = True, injected.task_type
    return config


def alpha_at(adapter: Adapter, rank: int) -> float:
    """Return the alpha at which an adapter of another rank has the same factor in front of the product."""
    return adapter.scaling * (math.sqrt(rank) if adapter.scale == "sqrt-rank" else rank)

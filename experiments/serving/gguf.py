"""The adapter of a run as llama.cpp reads it: one GGUF file with LoRA factors under the names of its own layers.

llama.cpp's ``convert_lora_to_gguf.py`` makes the same of PEFT's folder. Here the adapter is read with its scale,
whatever it is called there (rsLoRA, ranks of single layers), and GPT-2's transposed layers come out right.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from fedveil.common.adapters.layers import PEFT_PREFIX
from fedveil.common.errors import DataError, ModelError
from fedveil.common.model.files import check_files, model_folder
from fedveil.common.run_lines import AdapterFile
from fedveil.common.tensor_file import read_tensors
from fedveil.experiments.evaluate import about_of, read_peft_config


@dataclass(frozen=True)
class Kind:
    """What llama.cpp makes of a kind of model."""

    arch: str
    """Its name there."""
    turned: tuple[str, ...] = ()
    """Layers whose outputs it orders otherwise: halves of each attention head's rotation in turn."""


KINDS = {
    "llama": Kind("llama", ("q_proj", "k_proj")),
    "mistral": Kind("llama", ("q_proj", "k_proj")),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3"),
    "gpt2": Kind("gpt2"),
}
"""By transformers' ``model_type``."""


Factors = Mapping[str, tuple[Tensor, Tensor, float]]
"""A, B and the factor in front of their product, by layer."""


def export_gguf(run: Path, file: Path) -> int:
    """Write a run's adapter as a GGUF file for llama.cpp, float32; return how many layers it changes.

    Args:
        run: a run's folder.
        file: a file that does not exist yet.

    Raises:
        DataError: the adapter is missing or damaged, the package gguf is missing, or the file exists or cannot be
            written.
        ModelError: the run's model is missing or of an unknown kind, its adapter is no plain LoRA, or it has a head.
    """
    if file.exists():
        raise DataError(f"{file} exists already, and nothing is written over: name a new file")
    try:
        import gguf
    except ImportError as error:
        raise DataError("--gguf needs the package gguf, which is not installed: pip install 'fedveil[gguf]'") from error
    factors = _read(run / "adapter")
    base = _config_of(about_of(run / "adapter"))
    if base.model_type not in KINDS:
        raise ModelError(
            f"the run's base model is of kind {base.model_type!r}, and a GGUF adapter is made for {', '.join(KINDS)}: "
            "merge it with 'fedveil merge' and convert the whole model"
        )
    # llama.cpp multiplies by one alpha over each layer's rank. Where alphas differ they go into B, and it is 1.
    alphas = {scale * len(A) for A, _, scale in factors.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    partial = file.absolute().with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(partial, KINDS[base.model_type].arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(f"FedVeil run {run.name}")
        _add_layers(writer, factors, base, alpha)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, file)
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): check permissions and space") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(factors)


def _add_layers(writer: Any, factors: Factors, base: Any, alpha: float) -> None:
    """Add A and B of each layer to a file; ModelError if llama.cpp has no name for one."""
    import gguf

    kind = KINDS[base.model_type]
    (known,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.arch)
    names = gguf.get_tensor_name_map(known, base.num_hidden_layers)
    for layer, (A, B, scale) in factors.items():
        place = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if place is None:
            raise ModelError(f"llama.cpp has no name for the layer {layer!r}: name others in adapter.targets")
        if layer.rpartition(".")[2] in kind.turned:
            heads = base.num_attention_heads if layer.endswith("q_proj") else base.num_key_value_heads
            B = turned(B, heads)
        left = scale * len(A) / alpha
        writer.add_tensor(f"{place}.lora_a", A.float().contiguous().numpy())
        writer.add_tensor(f"{place}.lora_b", (B.double() * left).float().contiguous().numpy())


def turned(rows: Tensor, heads: int) -> Tensor:
    """Return outputs of a rotated projection in llama.cpp's order, shape as given: (out, anything).

    Transformers rotates number i of a head with number i + d / 2, llama.cpp number 2 i with 2 i + 1.

    >>> import torch
    >>> turned(torch.arange(8)[:, None], heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _config_of(about: AdapterFile) -> Any:
    """Return the configuration of a run's base model; ModelError if it cannot be read, or lies in other files."""
    from transformers import AutoConfig

    from fedveil.common.tasks.loading import OWN_CODE

    check_files(about.base_model, about.base_files)
    with model_folder(about.base_model, about.base_files) as folder:
        try:
            return AutoConfig.from_pretrained(folder, **OWN_CODE)
        except (OSError, ValueError) as error:  # of a kind that transformers does not know
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"the run's base model {about.base_model!r} cannot be read ({reason})") from error


def _read(adapter: Path) -> Factors:
    """Return A, B and the factor in front of their product, by layer.

    Raises:
        DataError, ModelError: as ``export_gguf``.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise DataError(f"{adapter} holds no adapter: give the folder of a finished run that has one")
    config = read_peft_config(adapter / "adapter_config.json")
    if (adapter / "head.safetensors").exists():
        raise ModelError(
            "the run has a classification head, which an adapter of llama.cpp has no place for: use the run's adapter "
            "folder as it is, with PEFT and head.safetensors"
        )
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [name for name in tensors if not name.endswith(ends)]
    if config.get("peft_type") != "LORA" or config.get("use_dora") or strange:
        raise ModelError(
            "the run's adapter is no plain LoRA, which is all that llama.cpp reads: merge it with 'fedveil merge' and "
            "convert the whole model"
        )
    found = {}
    for name in sorted(tensors):
        if not name.endswith(ends[0]):
            continue
        layer = name.removeprefix(PEFT_PREFIX).removesuffix(ends[0])
        A, B = tensors[name], tensors[name.removesuffix(ends[0]) + ends[1]]
        alphas: dict[str, float] = config.get("alpha_pattern") or {}
        alpha = float(alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"]))
        found[layer] = (A, B, alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A)))
    return found

"""LoRA pairs of saved adapters, in stock PEFT's files, and what two of them have in common.

The change of a layer is ``s B A``, with A of shape (rank, in) and B of shape (out, rank). Norms and overlaps of changes
follow from products of rank × rank matrices: ⟨B_i A_i, B_j A_j⟩ = tr((B_iᵀ B_j)(A_j A_iᵀ)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedveil.common.adapters.layers import PEFT_PREFIX
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.run_lines import read_json
from fedveil.common.tensor_file import read_tensors

PLAIN: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": False, "bias": "none"}
"""What PEFT's configuration of a pair has, whose change is ``s B A`` and nothing more."""
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


@dataclass(frozen=True)
class Pairs:
    """A saved adapter: float64, ``scaling`` in B."""

    layers: AdapterState
    """``A``, shape (rank, in), and ``B``, shape (out, rank), by layer."""
    config: Mapping[str, Any]
    """PEFT's."""

    @property
    def basis(self) -> str:
        """Fingerprint of every layer's A."""
        return basis_of(self.layers)

    @property
    def fingerprint(self) -> str:
        """Of both factors of all layers."""
        return fingerprint(self.layers)


def basis_of(layers: AdapterState) -> str:
    """Return the fingerprint of every layer's A."""
    return fingerprint({layer: {"A": factors["A"]} for layer, factors in layers.items()})


def read_pairs(adapter: Path) -> Pairs:
    """Return the pairs of a saved adapter.

    Raises:
        DataError: it cannot be read, is damaged, or is no plain LoRA.
    """
    config = read_json(adapter / "adapter_config.json")
    for key, plain in PLAIN.items():
        if config.get(key, plain) != plain:
            raise DataError(f"{adapter} has {key} {config[key]!r} and is no plain LoRA pair: take another adapter")
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    layers: AdapterState = {}
    for name, tensor in tensors.items():
        factor = next((factor for factor, suffix in SUFFIXES.items() if name.endswith(suffix)), "")
        if not factor or not name.startswith(PEFT_PREFIX) or not bool(tensor.isfinite().all()):
            raise DataError(f"{adapter} has the tensor {name!r}, which is none of a LoRA pair or not finite")
        layers.setdefault(name[len(PEFT_PREFIX) : -len(SUFFIXES[factor])], {})[factor] = tensor.double()
    for layer, factors in layers.items():
        if len(factors) != 2 or len(factors["A"]) != factors["B"].shape[1]:
            raise DataError(f"{adapter} has no pair of one rank in {layer}: copy the run's folder again")
        factors["B"] = factors["B"] * _scaling(config, layer, len(factors["A"]))
    return Pairs(dict(sorted(layers.items())), config)


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = float((config.get("alpha_pattern") or {}).get(re.escape(layer), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def inner(left: AdapterState, right: AdapterState, layer: str) -> float:
    """Return ⟨B_i A_i, B_j A_j⟩ of a layer; 0 where one has no such layer."""
    if layer not in left or layer not in right:
        return 0.0
    one, other = left[layer], right[layer]
    return float(((one["B"].T @ other["B"]) * (one["A"] @ other["A"].T)).sum())


def norms(pairs: AdapterState) -> dict[str, float]:
    """Return the Frobenius norm of each layer's change."""
    return {layer: math.sqrt(max(0.0, inner(pairs, pairs, layer))) for layer in pairs}


def overlap(left: AdapterState, right: AdapterState) -> float:
    """Return the cosine of two adapters' changes over all layers together, -1 to 1; 0 where one changes nothing."""
    lengths = [math.hypot(*norms(pairs).values()) for pairs in (left, right)]
    together = sum(inner(left, right, layer) for layer in left)
    return together / math.prod(lengths) if all(lengths) else 0.0


def equal_norms(adapters: Sequence[AdapterState]) -> list[AdapterState]:
    """Return the adapters with each layer's change as long as the geometric mean of theirs (LiON-LoRA's condition).

    A layer that one of them does not change stays as it is in all.
    """
    lengths = [norms(pairs) for pairs in adapters]
    made: list[AdapterState] = [dict(pairs) for pairs in adapters]
    for layer in {layer for pairs in adapters for layer in pairs}:
        own = [length.get(layer, 0.0) for length in lengths]
        if not all(own):
            continue
        wanted = math.exp(math.fsum(map(math.log, own)) / len(own))
        for pairs, length in zip(made, own, strict=True):
            pairs[layer] = {"A": pairs[layer]["A"], "B": pairs[layer]["B"] * (wanted / length)}
    return made


def same_layers(adapters: Sequence[AdapterState], names: Sequence[str]) -> list[str]:
    """Return the layers that any of the adapters changes, in order.

    Raises:
        ConfigError: a layer has another shape in one of them than in another.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for pairs, name in zip(adapters, names, strict=True):
        for layer, factors in pairs.items():
            own = (factors["B"].shape[0], factors["A"].shape[1])
            if shapes.setdefault(layer, own) != own:
                raise ConfigError(f"{name} changes {layer} as {own}, another one as {shapes[layer]}: name like ones")
    return sorted(shapes)


def filled(pairs: AdapterState, like: AdapterState) -> AdapterState:
    """Return the pairs with a change of 0 in each layer that ``like`` has and they have not."""
    return {**{layer: {"A": f["A"], "B": torch.zeros_like(f["B"])} for layer, f in like.items()}, **pairs}


def stacked(adapters: Sequence[AdapterState], layer: str) -> Tensor:
    """Return a layer's B of all adapters, shape (adapters, out, rank)."""
    return torch.stack([pairs[layer]["B"] for pairs in adapters])

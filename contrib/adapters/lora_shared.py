"""S2-LoRA: W = W0 + s Q diag(z) P, with one pair Q, P for all layers of one shape, and a z of each layer.

The paper's equation was not to be read here. This form follows from the number of its trained parameters: summaries
give 0.02 % of Whisper-small, which is 2 × 768 × 32, one pair of rank 32, while coefficients alone would be 0.001 %. So
the pair is trained, and z, whose sparsity the paper is named after, beside it. Here A is P and B is Q.

The first layer of a shape has the pair, and the others use it: a record's gradient of the pair is the sum over them,
and clip, noise and bytes are those of one pair. Of MiniLM at rank 8 that is 2 × 384 × 8 + 12 × 8 numbers in place of
12 × 384 × 8. The weights are trilinear; ``strategy = "s2-lora"`` trains z, P and Q in turn, so that each round's
average is exact. Exported as LoRA, with z folded into B of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.export import write_stock
from fedveil.common.adapters.layers import ADAPTER_NAME, base_weight, layer_shape, layers_of
from fedveil.common.adapters.low_rank import lora_modules
from fedveil.common.later import nn
from fedveil.common.messages.state import OWN, AdapterState, Factors
from fedveil.contrib.adapters.lora_diagonal import Diagonal, LoRADiagonal, _DiagonalThenB

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class _DiagonalThenShared(_DiagonalThenB):
    """z, then the B of another layer."""


@dataclass(frozen=True)
class LoRAShared(LoRADiagonal):
    """``z`` (rank,) of every layer, from 0; ``A`` (rank, in) and ``B`` (out, rank) of the first of each shape."""

    name: ClassVar[str] = "lora-shared"
    trained: ClassVar[tuple[str, ...]] = ("z", "A", "B")
    frozen: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="in turns s B diag(x_z) A, s B diag(z) x_A and s x_B diag(z) A",
        free_scale="trains A and B, so that a length given to them does not last",
        shared=("A", "B"),
    )

    def prepare(self, model: PeftModel) -> None:
        """Put z between A and B, which all layers of one shape have from the first of them."""
        first: dict[tuple[int, int], tuple[nn.Module, nn.Linear]] = {}
        for layer in layers_of(model).values():
            own = lora_modules(layer)
            A, B = first.setdefault(layer_shape(layer), (own["A"], cast(nn.Linear, own["B"])))
            kind = _DiagonalThenB if B is own["B"] else _DiagonalThenShared
            layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME] = A, kind(Diagonal(B), B)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return z, and of the first layer of its shape A and B."""
        found = super().factor_modules(layer)
        return {"z": found["z"]} if isinstance(layer.lora_B[ADAPTER_NAME], _DiagonalThenShared) else found

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A and B of the layer that has them; z begins at 0, also in a start that moves the weights."""
        return {name: given[name] for name in ("A", "B") if name in given and name in factors}

    def whole(self, state: AdapterState, shapes: Mapping[str, tuple[int, int]]) -> AdapterState:
        """Return the state with A and B in every layer, given the layers' shapes (out, in)."""
        pairs: dict[tuple[int, int], Factors] = {}
        for layer, factors in state.items():
            if layer not in OWN and "A" in factors:
                pairs[shapes[layer]] = {name: factors[name] for name in ("A", "B")}
        # Copies, for a file of tensors holds none twice.
        pair = {layer: {name: t.clone() for name, t in pairs[shape].items()} for layer, shape in shapes.items()}
        return {layer: {**pair[layer], "z": state[layer]["z"]} for layer in shapes}

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write a plain LoRA pair of each layer."""
        adapted = layers_of(model)
        whole = self.whole(state, {name: layer_shape(layer) for name, layer in adapted.items()})
        layers = {name: self.exported(whole[name], base_weight(layer).float().cpu()) for name, layer in adapted.items()}
        write_stock(self, model, layers, folder, base_name)

"""The layers that PEFT has put an adapter into: by name, shape and base weight."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from fedveil.common.later import nn

if TYPE_CHECKING:  # PEFT takes seconds to import, and to check settings nobody needs it.
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

PEFT_PREFIX = "base_model.model."
ADAPTER_NAME = "default"


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers of a model by their name in the stock base model; none without an adapter."""
    if "peft" not in sys.modules:  # it takes seconds to import
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        name.split(PEFT_PREFIX, 1)[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def stored_transposed(layer: LoraLayer) -> bool:
    """Return whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does."""
    return bool(getattr(layer, "fan_in_fan_out", False))


def base_weight(layer: LoraLayer) -> Tensor:
    """Return W0 of an adapted layer as (out, in), whichever way it is stored: the live weight, detached."""
    weight = cast("Tensor", layer.get_base_layer().weight).detach()
    return weight.T if stored_transposed(layer) else weight


def layer_shape(layer: LoraLayer) -> tuple[int, int]:
    """Return (out, in) of an adapted layer, whichever way its weight is stored."""
    return cast(int, layer.out_features), cast(int, layer.in_features)

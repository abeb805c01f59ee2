"""Parameterisations of a layer's change: one adapter a file, and ``ADAPTERS``, the table of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedveil.common.adapters.base import Adapter, Origin, Place
from fedveil.common.adapters.lora import LoRA
from fedveil.common.adapters.lora_frozen_a import LoRAFrozenA
from fedveil.common.adapters.lora_metric import LoRAMetric
from fedveil.common.adapters.lora_sb import LoRASB
from fedveil.common.adapters.none import NoAdapter
from fedveil.common.errors import ConfigError
from fedveil.common.rows import Table

if TYPE_CHECKING:
    from fedveil.common.config.sections import AdapterConfig

ADAPTERS: Table[type[Adapter]] = Table("adapters", (LoRA, LoRAFrozenA, LoRAMetric, LoRASB, NoAdapter))
ALIASES = {"ffa-lora": "lora-frozen-a"}
"""Other names that ``adapter.name`` takes, and the adapter that each means."""


def build_adapter(name: str, config: AdapterConfig, origin: Origin) -> Adapter:
    """Return the adapter called ``name`` with the run's rank, alpha, scale and targets, and this start.

    An alpha that is left open is what makes the scale 1.

    Raises:
        ConfigError: the adapter knows no such scale; or alpha is left open, and the adapter is not one whose scale a
            start may choose.
    """
    traits = ADAPTERS[name].traits
    if config.scale not in traits.scales:
        raise ConfigError(
            f"adapter.scale {config.scale!r} has no effect on {name!r}, which has a scale of its own: "
            f"leave it at {traits.scales[0]!r}"
        )
    if not config.alpha and isinstance(traits.free_scale, str):
        raise ConfigError(f"adapter.alpha is 0, to be calibrated, but {name!r} {traits.free_scale}: give it a number")
    of_scale_1 = math.sqrt(config.rank) if config.scale == "sqrt-rank" else float(config.rank)
    return ADAPTERS[name](config.rank, config.alpha or of_scale_1, config.target_modules, origin, config.scale)


__all__ = [
    "ADAPTERS",
    "ALIASES",
    "Adapter",
    "LoRA",
    "LoRAFrozenA",
    "LoRAMetric",
    "LoRASB",
    "NoAdapter",
    "Origin",
    "Place",
    "build_adapter",
]

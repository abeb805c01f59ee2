"""One parameterisation per file; ``ADAPTERS`` is the table of them."""

from __future__ import annotations

from common.adapters.base import Adapter, Origin, Place
from common.adapters.lora import LoRA
from common.adapters.lora_frozen_a import LoRAFrozenA
from common.adapters.lora_sb import LoRASB
from common.config.sections import AdapterConfig
from common.errors import ConfigError

ADAPTERS: dict[str, type[Adapter]] = {adapter.name: adapter for adapter in (LoRA, LoRAFrozenA, LoRASB)}
ALIASES = {"ffa-lora": "lora-frozen-a"}
"""Other names that ``adapter.name`` takes, and the adapter that each stands for."""


def build_adapter(name: str, config: AdapterConfig, origin: Origin) -> Adapter:
    """Return the adapter called ``name`` with the run's rank, alpha and targets, and this start.

    An alpha that is left open is the rank, so that the scale is 1.

    Raises:
        ConfigError: alpha is left open, and the adapter is not one whose scale a start may choose.
    """
    if not config.alpha and not ADAPTERS[name].free_scale:
        free = ", ".join(repr(other) for other, adapter in ADAPTERS.items() if adapter.free_scale)
        raise ConfigError(f"adapter.alpha is 0, to be calibrated, which only {free} can be: give {name!r} a number")
    return ADAPTERS[name](config.rank, config.alpha or float(config.rank), config.target_modules, origin)


__all__ = ["ADAPTERS", "ALIASES", "Adapter", "LoRA", "LoRAFrozenA", "LoRASB", "Origin", "Place", "build_adapter"]

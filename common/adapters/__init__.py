"""One parameterisation per file; ``ADAPTERS`` is the table of them."""

from __future__ import annotations

from common.adapters.base import Adapter
from common.adapters.dora import DoRA
from common.adapters.lora import LoRA
from common.adapters.lora_frozen_a import LoRAFrozenA
from common.adapters.lora_sb import LoRASB
from common.check import one_of
from common.config.sections import AdapterConfig
from common.errors import ConfigError

ADAPTERS: dict[str, type[Adapter]] = {adapter.name: adapter for adapter in (LoRA, LoRAFrozenA, LoRASB, DoRA)}
ALIASES = {"ffa-lora": "lora-frozen-a"}
"""Other names that ``adapter.name`` takes, and the adapter that each stands for."""


def build_adapter(name: str, config: AdapterConfig, init: str) -> Adapter:
    """Return the adapter called ``name`` with the run's rank, alpha, scale and targets, and this start.

    Raises:
        ConfigError: the adapter knows no such start, or no such scale.
    """
    one_of(ADAPTERS[name].inits, adapter__init=init)
    if config.scale not in ADAPTERS[name].scales:
        raise ConfigError(
            f"adapter.scale {config.scale!r} has no effect on {name!r}, which has a scale of its own: "
            f"leave it at {ADAPTERS[name].scales[0]!r}"
        )
    return ADAPTERS[name](config.rank, config.alpha, config.target_modules, init, config.scale)


__all__ = ["ADAPTERS", "ALIASES", "Adapter", "DoRA", "LoRA", "LoRAFrozenA", "LoRASB", "build_adapter"]

"""One low-rank parameterisation per file; ``ADAPTERS`` is the table of them."""

from __future__ import annotations

from common.adapters.base import Adapter
from common.adapters.ffa_lora import FFALoRA
from common.adapters.lora import LoRA
from common.adapters.lora_sb import LoRASB
from common.config import AdapterConfig

ADAPTERS: dict[str, type[Adapter]] = {adapter.name: adapter for adapter in (LoRA, FFALoRA, LoRASB)}


def build_adapter(name: str, config: AdapterConfig, init: str) -> Adapter:
    """Return the adapter called ``name`` with the run's rank, alpha and targets, and this start."""
    return ADAPTERS[name](config.rank, config.alpha, config.target_modules, init)


__all__ = ["ADAPTERS", "Adapter", "FFALoRA", "LoRA", "LoRASB", "build_adapter"]

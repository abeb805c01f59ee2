"""Server rules around the optimiser, one per file; ``RULES`` is the table of them.

A new one is one file and one row. Its options are the fields of its dataclass, and are set in the run
configuration under its name: ``allora.eta = 2.0``.
"""

from __future__ import annotations

from strategies.rules.align_guard import AlignGuard
from strategies.rules.allora import ALLoRA
from strategies.rules.base import ServerRule
from strategies.rules.lora_pro import LoRAPro
from strategies.rules.none import NoRule
from strategies.rules.soft_threshold import SoftThreshold

RULES: dict[str, type[ServerRule]] = {rule.name: rule for rule in (NoRule, LoRAPro, ALLoRA, AlignGuard, SoftThreshold)}

__all__ = ["RULES", "NoRule", "ServerRule"]

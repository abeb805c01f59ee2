"""Settings and strategies of other programs that no run here can have, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_PACKED = (
    "packing puts several records into one sequence, so that they share a gradient and no clip bounds what one of them "
    "changes; every record is a sequence of its own here, and those of like length are batched together"
)
REFUSED: Mapping[str, str] = dict.fromkeys(("packing", "neat-packing", "sample-packing"), _PACKED)
"""Last part of a setting's name in TRL, LLaMA-Factory or axolotl, and why no run here can have it."""

REFUSED_STRATEGIES: Mapping[str, str] = {
    "fedsa-lora": "FedSA-LoRA leaves B at each site, where training without noise lets one record move it and with it "
    "the gradient of every other record in A, so that no clip bounds what a record changes; and it ends in a model for "
    "each site, where a run here ends in one: freeze one factor for all ('ffa-lora', or 'fedavg-lora' with "
    "adapter.name 'lora-frozen-b'), or train them in turn ('rolora')",
}
"""Published strategies that are no row, and why a run cannot have them."""

"""Systems of the field that are other rows put together: what to write for each.

Their names are not rows, so a run that names one as its adapter is refused with its settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.common.config.sections import Scalar

SYSTEMS: Mapping[str, Mapping[str, Scalar]] = {
    "rslora": {"adapter.scale": "sqrt-rank"},
    "pissa": {
        "strategy": "fedavg-lora",
        "adapter.name": "lora-increments",
        "adapter.start": "svd-of-weights",
        "start.singular-values": True,
    },
    "eva": {"adapter.start": "eva"},
    "miss": {"adapter.name": "lora-frozen-a", "adapter.start": "shards"},
    "bone": {"adapter.name": "lora-frozen-a", "adapter.start": "shards"},
    "flylora": {"strategy": "flylora", "adapter.start": "sparse"},
    "inttune": {"strategy": "fed-sb", "adapter.start": "nystrom"},
    "loldu": {"strategy": "fedavg-lora", "adapter.name": "lora-diagonal", "adapter.start": "lu-of-weights"},
    "s2-lora": {"strategy": "fedavg-lora", "adapter.name": "lora-diagonal", "adapter.start": "shared"},
}
"""Settings by the system's name; a page of docs says what differs from its paper."""
BLOCK_LORA = (
    "n blocks are LoRA of n times less rank, whose scale is √n times as large, and would send n times the numbers: "
    "divide adapter.rank by n and adapter.alpha by √n"
)


def written(settings: Mapping[str, Scalar]) -> str:
    """Return settings as they are written in a command.

    >>> written({"adapter.start": "eva", "start.singular-values": True})
    'adapter.start="eva" start.singular-values=true'
    """
    return " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={str(value).lower()}"
        for key, value in settings.items()
    )


def settings_instead(name: str) -> str:
    """Return what to write for a system that is no row of its own; empty: it is not known here.

    >>> settings_instead("block-lora").startswith("n blocks are LoRA"), settings_instead("nothing")
    (True, '')
    """
    if name == "block-lora":
        return BLOCK_LORA
    return f"it is other rows put together: set {written(SYSTEMS[name])}" if name in SYSTEMS else ""

"""Settings that have another name now, and still work; and those of other programs that no run here can have."""

from __future__ import annotations

from collections.abc import Mapping

from common.config.sections import Scalar
from common.errors import ConfigError
from strategies import ROWS

RENAMED: Mapping[str, str] = {
    "adapter.init": "adapter.start",
    "fed-sb.init": "adapter.start",
    "fed-sb.init-step": "start.step",
    "fed-sb.init-data": "start.data",
    "fed-sb.init-records": "start.records",
    "fed-sb.init-sample-rate": "start.sample-rate",
    "fed-sb.init-noise-multiplier": "start.noise-multiplier",
    "fed-sb.init-clip-norm": "start.clip-norm",
    "server.epsilon": "server.adam-tau",
    "training.schedule": "schedule",
    "training.head-rate": "head-rate",
}
"""Each old name with its successor, whose default it shares."""
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


def by_new_names(values: Mapping[str, Scalar], known: Mapping[str, Scalar]) -> tuple[dict[str, Scalar], dict[str, str]]:
    """Return flat settings by their present names, and each old name that says something with its successor.

    An old name that is left at its default says nothing. One of a strategy that is not run never did.

    Args:
        values: settings as given.
        known: every setting that exists, with its default.

    Raises:
        ConfigError: a setting is given by both names, and they differ.
    """
    settings = {key: value for key, value in values.items() if key not in RENAMED}
    strategy, used = values.get("strategy", known["strategy"]), {}
    for old, new in RENAMED.items():
        value, default = values.get(old, known[old]), known[old]
        owner = old.split(".")[0]
        if value == default or (owner in ROWS and owner != strategy):
            continue
        if settings.get(new, default) not in (default, value):
            raise ConfigError(f"{old} is another name of {new}, and they differ: give {new} alone")
        settings[new] = value
        used[old] = new
    return settings, used

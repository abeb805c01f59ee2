"""Settings of runs along a public metric, and rounds 0 of those whose start is a probe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from audits.tiny_site import OneSite
from fedveil.common.messages.round import Reply


def metric_run(toy: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a toy run's settings with plain steps along a public metric's directions, and ``more`` of them."""
    own = {
        "strategy": "fedavg-lora",
        "adapter.name": "lora-metric",
        "adapter.start": "public-metric",
        "adapter.rank": 2,
        "server.optimizer": "momentum",
        "server.learning-rate": 0.5,
        "training.optimizer": "sgd",
        "training.learning-rate": 1.0,
        "training.local-steps": 1,
        "start.records": 16,
    }
    return {**toy, **own, **{key.replace("__", ".").replace("_", "-"): value for key, value in more.items()}}


def settings(toy: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {"adapter__start": "probe", "start__steps": 5, "start__sample_rate": 0.5, "start__noise_multiplier": 4.0}
    return metric_run(toy, **{**own, **more})


def ask(site: OneSite) -> Reply:
    return site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))

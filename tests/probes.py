"""Rounds 0 of runs whose start is a probe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from audits.tiny_site import OneSite
from fedveil.common.messages.round import Reply


def settings(toy: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {
        "strategy": "fedavg-lora",
        "adapter.name": "lora-metric",
        "adapter.start": "probe",
        "adapter.rank": 2,
        "server.optimizer": "momentum",
        "server.learning-rate": 0.5,
        "training.optimizer": "sgd",
        "training.learning-rate": 1.0,
        "training.local-steps": 1,
        "start.records": 16,
        "start.steps": 5,
        "start.sample-rate": 0.5,
        "start.noise-multiplier": 4.0,
    }
    return {**toy, **own, **{key.replace("__", ".").replace("_", "-"): value for key, value in more.items()}}


def ask(site: OneSite) -> Reply:
    return site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))

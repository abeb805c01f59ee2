"""Libraries of drawn adapters for a run's settings, as nobody trained them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedveil.common.derived import DerivedFile, Source, derived
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.strict_json import to_json
from fedveil.contrib.library.pairs import basis_of, read_pairs
from fedveil.contrib.library.shelf import Basis, Library, Member
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

UNIT = "one training record of one site"
NAMES = ("letters", "notes", "reports")


def drawn_states(start: AdapterState, count: int = len(NAMES), size: float = 0.3) -> list[AdapterState]:
    """Return so many states, each with B's of its own over the A of ``start``."""
    draw = torch.Generator().manual_seed(8)
    return [
        {
            layer: {"A": factors["A"], "B": size * torch.randn(factors["B"].shape, generator=draw)}
            for layer, factors in start.items()
            if layer not in OWN
        }
        for _ in range(count)
    ]


def drawn_library(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Write a library that a run of these settings can begin at, and return the settings that name it."""
    own = {key: value for key, value in settings.items() if not key.startswith("start.")}
    plain = {"adapter.name": "lora-frozen-a", "adapter.start": "orthonormal", "privacy.mode": "none"}
    usual = {key: value for key, value in own.items() if not key.startswith("privacy.")}
    job = configure({**usual, **plain, "strategy": "ffa-lora"})
    server = ServerModel(job, scores=False)
    members = []
    for name, state in zip(NAMES, drawn_states(server.start), strict=True):
        job.adapter.export(server.model.peft_model, state, folder / name / "adapter", "base")
        pairs = read_pairs(folder / name / "adapter")
        source = Source(f"drawn-{name}", "ffa-lora", "", {}, "It is private.", 1.0, 1e-5, UNIT, "Its terms.")
        content = json.dumps(to_json(derived("library add", "base", [source])))
        (folder / name / DerivedFile.NAME).write_text(content, encoding="utf-8")
        members.append(Member(name, f"{name} of a clinic", job.config.model.task, pairs.fingerprint))
    own_layers = {layer: {"A": factors["A"]} for layer, factors in server.start.items() if layer not in OWN}
    config = job.config
    basis = Basis(
        config.model.name,
        server.model.base.fingerprint,
        config.adapter.targets,
        config.adapter.rank,
        config.seed,
        basis_of(own_layers),
    )
    library = Library(folder, basis, members)
    library.write()
    return {"start.library": str(folder), "start.adapters": library.setting}

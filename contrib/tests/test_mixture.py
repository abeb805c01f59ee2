"""A mixture of a library's adapters: each of them to the bit, and what a run of it sends and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import NAMES, drawn_library
from torch import Tensor

from fedveil.common.messages.state import OWN
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.contrib.library.pairs import read_pairs
from fedveil.contrib.starts.of_library import state_of
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

Settings = dict[str, Any]


@pytest.fixture
def world(toy_generation: Settings, tmp_path: Path) -> Settings:
    """Return settings of a run that mixes three drawn adapters."""
    own = {"adapter.start": "library", "adapter.name": "lora-mixture", "strategy": "fedavg-lora"}
    return {**toy_generation, **drawn_library(tmp_path / "library", toy_generation), **own}


def losses(model: FederatedModel, server: ServerModel) -> Tensor:
    with torch.no_grad():
        model.module.eval()
        return torch.cat([model.losses(batch) for batch in model.fixed_batches(server.records[:6])])


def test_with_one_weight_of_1_the_model_is_that_adapter_to_the_bit(world: Settings) -> None:
    mixed, plain = (ServerModel(configure({**world, "adapter.name": name})) for name in ("lora-mixture", "lora"))
    shown = mixed.job.origin.shown(mixed.model.adapter, mixed.start)
    found = []
    for number in range(len(NAMES)):
        seen = []
        for server, is_mixed in ((mixed, True), (plain, False)):
            server.model.write(server.start)
            server.model.write(state_of(shown, number, mixed=is_mixed))
            seen.append(losses(server.model, server))
        assert torch.equal(*seen), f"adapter {number} alone is not itself"
        found.append(seen[0])
    assert not torch.equal(found[0], found[1])


def test_a_run_sends_a_number_for_each_adapter_and_layer_and_saves_one_plain_pair(world: Settings) -> None:
    own = {**world, "start.begin-at": "mean", "training.learning-rate": 0.05}
    folder = run_in_process({**own, "rounds": 2}, 2)
    rounds = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in rounds)
    server = ServerModel(configure(own), scores=False)
    layers = [layer for layer in server.start if layer not in OWN]
    sites = 2
    assert rounds[1].bytes_up == rounds[2].bytes_up == sites * 4 * len(NAMES) * len(layers)
    assert rounds[1].bytes_down > 10 * rounds[2].bytes_down, "the adapters travel once"
    assert evaluate_run(folder).loss == pytest.approx(rounds[-1].loss, rel=1e-4)
    saved = read_pairs(folder / "adapter").layers
    assert {len(factors["A"]) for factors in saved.values()} == {own["adapter.rank"]}
    read = [read_pairs(Path(world["start.library"]) / name / "adapter").layers for name in NAMES]
    for layer, factors in saved.items():
        span = torch.stack([pairs[layer]["B"].flatten() for pairs in read])
        inside = torch.linalg.lstsq(span.T, factors["B"].flatten()[:, None]).solution
        assert float((span.T @ inside - factors["B"].flatten()[:, None]).abs().max()) < 1e-5, (
            "it left the adapters' span"
        )

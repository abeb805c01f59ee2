"""Noise where it matters: the norm that one private step puts on a layer's weights is the one predicted.

A site without a record sends nothing but noise. Its plain step of rate 1 moves what it trains by
x ~ N(0, (σC/b)²), and from there each strategy has its own way into the weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.local_training import train_round
from client.site import Site
from common.messages.round import TrainTask
from common.messages.state import HEAD
from common.messages.tensors import fingerprint, merge, start_fingerprint
from common.privacy import dpsgd
from common.tasks.examples import Dataset
from strategies import STRATEGIES, Contribution, Strategy
from strategies.ffa_lora import FFALoRA
from strategies.job import configure

ROUNDS = 60
Layer = dict[str, Tensor]


def lora(layer: Layer, std: float, scaling: float) -> float:
    """E‖s((B + x_B)(A + x_A) - BA)‖² with B (m, r), A (r, n)."""
    (m, r), n = layer["B"].shape, layer["A"].shape[1]
    linear = m * layer["A"].square().sum() + n * layer["B"].square().sum()
    return float(scaling**2 * (std**2 * linear + std**4 * m * r * n))


def frozen_a(layer: Layer, std: float, scaling: float) -> float:
    """E‖s x_B A‖² = s² (σC/b)² m ‖A‖²."""
    return float((scaling * std) ** 2 * layer["B"].shape[0] * layer["A"].square().sum())


def square(layer: Layer, std: float, _: float) -> float:
    """E‖B x_R A‖² = (σC/b)² r², B and A having orthonormal columns and rows."""
    return float((std * layer["R"].shape[0]) ** 2)


PREDICTED: dict[str, tuple[dict[str, Any], Callable[[Layer, float, float], float]]] = {
    "fedavg-lora": ({}, lora),
    "ffa-lora": ({}, frozen_a),
    "ffa-lora, orthonormal": ({"adapter.start": "orthonormal"}, frozen_a),
    "fed-svd": ({}, frozen_a),
    "fed-sb": ({}, square),
}
ALIKE = ("heterogeneous-ranks", "flexlora", "increlora", "diffora", "switchlora", "dylora", "flylora")
"""Strategies by columns of B, whose noise C5 in ``tests/test_columns.py`` measures, and one whose sites do what those
of FFA-LoRA do where they have no record."""
BOTH = ("fedex-lora", "flora", "rolora")
"""Strategies whose sites do what those of FedAvg-LoRA do, with both factors or one of them."""


def mean_ratio(name: str, settings: dict[str, Any], folder: Path) -> float:
    """Return measured over predicted squared norm of the weights' noise, averaged over layers and rounds."""
    extra, predicted = PREDICTED[name]
    job = configure(
        {
            **settings,
            **extra,
            "strategy": name.split(",", maxsplit=1)[0],
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
            "schedule": "constant",
            "training.local-steps": 1,
            "privacy.clip-norm": 0.5,
            "privacy.noise-multiplier": 3.0,
            "privacy.epsilon": 50.0,
        }
    )
    config = job.config
    model = job.model(("bad", "good"))
    state = job.start(model.start)
    # From a B that is not 0, and for FedSVD from factors that it has turned.
    moved = {
        layer: {
            n: model.start[layer][n] + 0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(5))
            for n, t in f.items()
        }
        for layer, f in model.trained().items()
    }
    state = job.strategy.server_update(state, [Contribution("s", 1.0, moved)])
    basis = job.basis(state)
    task = TrainTask(
        run="1",
        round_number=2,
        state=job.strategy.downlink(state),
        basis=basis,
        basis_fingerprint=fingerprint(basis) if basis else "",
        base_fingerprint=model.base.fingerprint,
        start_fingerprint=start_fingerprint(model.start),
    )
    std = 3.0 * 0.5 / (config.training.sample_rate * 100)
    ratios = []
    for number in range(ROUNDS):
        site = Site("idle", Dataset("idle", (), ("bad", "good")), "idle", 100, folder / f"{number}" / "ledger.sqlite")
        result = train_round(site, job, model, [], task)
        shutil.rmtree(folder / f"{number}")
        after = merge(state.adapter, result.contribution)
        for layer in (layer for layer in after if layer != HEAD):
            change = job.adapter.delta(after[layer]).double() - job.adapter.delta(state.adapter[layer]).double()
            wanted = predicted(state.adapter[layer], std, config.adapter.alpha / config.adapter.rank)
            ratios.append(float(change.square().sum()) / wanted)
    return math.fsum(ratios) / len(ratios)


def test_every_strategy_has_a_prediction() -> None:
    predicted = {name.split(",")[0] for name in PREDICTED}
    said = predicted | set(ALIKE) | set(BOTH)
    assert said == set(STRATEGIES), f"nobody says what noise does under {said ^ set(STRATEGIES)}"
    for name in ALIKE:
        kind = STRATEGIES[name]
        assert kind.by_columns or kind.nested or kind.routed
        assert (kind.uplink, kind.correct, kind.adapter) == (Strategy.uplink, Strategy.correct, FFALoRA.adapter)
    for name in BOTH:
        kind = STRATEGIES[name]
        assert (kind.uplink, kind.correct, kind.trains) == (Strategy.uplink, Strategy.correct, ("A", "B"))


@pytest.mark.parametrize("name", PREDICTED)
def test_the_noise_in_a_layers_weights_has_the_predicted_norm(
    name: str, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The squared norm of r² normal numbers, r = 3, over 4 layers and 60 rounds: relative deviation 0.47 / √240 = 3 %.
    band = 0.15
    ratio = mean_ratio(name, toy_settings, tmp_path)
    assert abs(ratio - 1) < band, f"{name}: the weights carry {ratio:.2f} times the predicted noise (squared norm)"

    noised = dpsgd.add_private_noise
    for factor in (0.5, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(dpsgd, "add_private_noise", lambda total, std, factor=factor: noised(total, factor * std))
            planted = mean_ratio(name, toy_settings, tmp_path)
        assert abs(planted - 1) > 2 * band, f"{factor} times the noise went unnoticed ({planted:.2f})"

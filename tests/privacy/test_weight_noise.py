"""Noise where it matters: the norm that one private step puts on a layer's weights is the one predicted.

A site without a record sends nothing but noise. Its plain step of rate 1 moves what it trains by
x ~ N(0, (σC/b)²), and from there each strategy has its own way into the weights. What a row of the table of adapters
makes of x is held to its formula by exact second moments, in float64 and on layers that are not square.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_layers import ALPHA, RANK, STD, Layer

from fedveil.client.local_training import train_round
from fedveil.client.site import Site
from fedveil.common.adapters import ADAPTERS, Adapter, LoRAMetric
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import fingerprint, merge, start_fingerprint
from fedveil.common.tasks.examples import Dataset
from fedveil.contrib.adapters.lora_frozen_b import LoRAFrozenB
from fedveil.contrib.adapters.lora_increments import LoRAIncrements
from fedveil.contrib.adapters.lora_merged import LoRAMerged
from fedveil.privacy import dpsgd
from fedveil.strategies import STRATEGIES, Contribution
from fedveil.strategies.base import chooses
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure

ROUNDS, FEW = 30, 4
"""Rounds that the noise is measured in, and those that show a planted one: twice the noise is four times the norm."""


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
ALIKE = ("heterogeneous-ranks", "flexlora", "increlora", "diffora", "switchlora", "dylora", "flylora", "eva-ranks")
"""Strategies by columns of B, whose noise C5 in ``test_columns`` measures, and one whose sites do what those
of FFA-LoRA do where they have no record."""
BOTH = ("fedex-lora", "flora", "rolora")
"""Strategies whose sites do what those of FedAvg-LoRA do, with both factors or one of them."""


def mean_ratio(name: str, settings: dict[str, Any], folder: Path, rounds: int = ROUNDS) -> float:
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
    for number in range(rounds):
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
    turned = {name for name, kind in STRATEGIES.items() if kind.adapters.default in IN_TURN}
    said = predicted | set(ALIKE) | set(BOTH) | turned
    assert said == set(STRATEGIES), f"name {said ^ set(STRATEGIES)} in PREDICTED, ALIKE or BOTH"
    for name in ALIKE:
        kind = STRATEGIES[name]
        assert chooses(kind) or kind.adapters.default in ("lora-nested", "lora-routed")
        assert issubclass(ADAPTERS[kind.adapters.default], ADAPTERS[FFALoRA.adapters.default])
    for name in BOTH:
        kind = STRATEGIES[name]
        assert kind.adapters.trains == ("A", "B")


@pytest.mark.parametrize("name", PREDICTED)
def test_the_noise_in_a_layers_weights_has_the_predicted_norm(
    name: str, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The squared norm of r² normal numbers, r = 3, over 10 layers and 30 rounds: relative deviation 0.47 / √300 = 3 %.
    band = 0.15
    ratio = mean_ratio(name, toy_settings, tmp_path)
    assert abs(ratio - 1) < band, f"{name}: the weights carry {ratio:.2f} times the predicted noise (squared norm)"

    noised = dpsgd.add_private_noise
    for factor in (0.5, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(dpsgd, "add_private_noise", lambda total, std, factor=factor: noised(total, factor * std))
            planted = mean_ratio(name, toy_settings, tmp_path, FEW)
        assert abs(planted - 1) > 2 * band, f"{factor} times the noise went unnoticed ({planted:.2f})"


# --- each row's formula -----------------------------------------------------------------------------------------------

Formula = Callable[[Adapter, Layer], float]


def both(adapter: Adapter, B: Tensor, A: Tensor) -> float:
    """E‖s(B x_A + x_B A + x_B x_A)‖² = s² (τ² (n‖B‖² + m‖A‖²) + τ⁴ m n r), with B (m, r), A (r, n) and τ = σC/b."""
    (m, r), n = B.shape, A.shape[1]
    return float(adapter.scaling**2 * (STD**2 * (n * B.square().sum() + m * A.square().sum()) + STD**4 * m * n * r))


def increments(adapter: Adapter, f: Layer) -> float:
    """That of the factors where they stand, start and way together, at the scale that is a factor."""
    return float(f["s"]) ** 2 * both(adapter, f["B"] + f["dB"], f["A"] + f["dA"])


def merged(adapter: Adapter, f: Layer) -> float:
    """That of the pair: D is a constant."""
    return both(adapter, f["B"], f["A"])


def frozen_b(adapter: Adapter, f: Layer) -> float:
    """E‖s B x_A‖² = s² τ² n‖B‖²."""
    return float((adapter.scaling * STD) ** 2 * f["A"].shape[1] * f["B"].square().sum())


def metric(adapter: Adapter, f: Layer) -> float:
    """E‖s B x_A (I - VᵀV)‖² = s² τ² ‖B‖² ‖I - VᵀV‖²."""
    shrinking = torch.eye(f["A"].shape[1], dtype=torch.float64) - f["V"].T @ f["V"]
    return float((adapter.scaling * STD) ** 2 * f["B"].square().sum() * shrinking.square().sum())


FORMULAS: dict[str, Formula] = {
    "lora-increments": increments,
    "lora-frozen-b": frozen_b,
    "lora-merged": merged,
    "lora-metric": metric,
}
IN_TURN: dict[str, dict[str, Callable[[Adapter, Layer, Tensor], float]]] = {
    "lora-gated": {
        "B": lambda a, f, _: a.scaling**2 * float(f["g"]) ** 2 * len(f["B"]) * _square(f["A"]),
        "g": lambda a, f, _: a.scaling**2 * _square(f["B"] @ f["A"]),
    },
    "lora-shared": {
        "z": lambda a, f, _: a.scaling**2 * float((f["B"].square().sum(0) * f["A"].square().sum(1)).sum()),
        "A": lambda a, f, _: a.scaling**2 * f["A"].shape[1] * _square(f["B"] * f["z"]),
        "B": lambda a, f, _: a.scaling**2 * len(f["B"]) * _square(f["z"][:, None] * f["A"]),
    },
    "lora-mixture": {"w": lambda a, f, _: a.scaling**2 * _square(f["stack"] @ f["A"])},
    "bone": {"D": lambda _, f, weight: f["D"].shape[-1] * _square(_blocks(weight, f["D"].shape[-1]))},
}
"""Rows that train one factor a round, or one alone: what noise on each does, over τ²."""


def _square(values: Tensor) -> float:
    return float(values.square().sum())


def _blocks(weight: Tensor, size: int) -> Tensor:
    """Return W0_ij + I of each block, shape (out / size, into / size, size, size)."""
    return weight.unfold(0, size, size).unfold(1, size, size) + torch.eye(size, dtype=weight.dtype)


IN_ROUNDS = ("lora", "lora-frozen-a", "lora-sb")
"""Rows whose formula the rounds above are held to."""
ELSEWHERE = (
    "lora-nested",
    "lora-routed",
    "lora-diagonal",
    "dora-magnitude",
    "dora-frozen-norm",
    "randlora",
    "salt",
    "dora",
)
"""Rows that ``contrib/tests/test_exact_adapters.py`` and those beside it hold to theirs."""


class HalfTheWay(LoRAIncrements):
    """The fault: the way of A meets that of B nowhere."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        return super().delta(factors) - factors["s"] * factors["dB"] @ factors["dA"]


class WithoutScale(LoRAFrozenB):
    """The fault: the product has no factor in front."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        return super().delta(factors) / self.scaling


class ThroughD(LoRAMerged):
    """The fault: what was merged passes through the trained B as well."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        return super().delta(factors) + factors["B"] @ factors["D"][: self.rank]


class TwiceShrunk(LoRAMetric):
    """The fault: the metric acts twice, as in a gradient that is led back to the weights."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        V = factors["V"]
        change = super().delta(factors, base_weight)
        return change - (change @ V.T) @ V


FAULTS: dict[str, type[Adapter]] = {
    "lora-increments": HalfTheWay,
    "lora-frozen-b": WithoutScale,
    "lora-merged": ThroughD,
    "lora-metric": TwiceShrunk,
}


def drawn_factors(adapter: Adapter, out: int, into: int) -> Layer:
    """Return factors that are nowhere zero, of no special form, in float64."""
    draw = torch.Generator().manual_seed(7)
    return {
        name: 0.6 * torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in adapter.shapes(out, into).items()
    }


def second_moment(adapter: Adapter, factors: Layer, base_weight: Tensor, turn: str = "") -> float:
    """Return E‖delta(θ + x) - delta(θ)‖² for x ~ N(0, STD²) on what is trained, by differences along unit vectors.

    A map of degree 1 in each trained factor is Σ_i l_i x_i + Σ_{i<j} q_ij x_i x_j, and what is of odd degree in x
    has the mean 0: so it is STD² Σ‖l_i‖² + STD⁴ Σ‖q_ij‖². That no x_i comes in a square is checked.
    """
    units = []
    for name in (turn,) if turn else adapter.trained:
        for i in range(factors[name].numel()):
            unit = torch.zeros_like(factors[name]).flatten()
            unit[i] = 1.0
            units.append({name: unit.view_as(factors[name])})

    def at(*steps: Layer) -> Tensor:
        moved = dict(factors)
        for step in steps:
            moved |= {name: moved[name] + move for name, move in step.items()}
        return adapter.delta(moved, base_weight)

    still = at()
    linear = [at(unit) - still for unit in units]
    total = 0.0
    for i, unit in enumerate(units):
        assert float((at(unit, unit) - still - 2 * linear[i]).abs().max()) < 1e-12, "a number comes in with its square"
        total += STD**2 * float(linear[i].square().sum())
        for j in range(i):
            mixed = at(unit, units[j]) - still - linear[i] - linear[j]
            total += STD**4 * float(mixed.square().sum())
    return total


def test_every_adapter_has_a_formula() -> None:
    said = {*FORMULAS, *IN_TURN, *IN_ROUNDS, *ELSEWHERE}
    trained = {name for name, adapter in ADAPTERS.items() if adapter.trained}
    assert said == trained, f"nobody says what noise does in the weights of {said ^ trained}"


@pytest.mark.parametrize(("out", "into"), [(9, 5), (4, 8)], ids=["tall", "wide"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_noise_in_a_layers_weights_has_the_second_moment_of_the_rows_formula(
    name: str, out: int, into: int
) -> None:
    adapter, base_weight = ADAPTERS[name](RANK, ALPHA, ()), torch.zeros(out, into, dtype=torch.float64)
    factors = drawn_factors(adapter, out, into)
    wanted = FORMULAS[name](adapter, factors)
    assert second_moment(adapter, factors, base_weight) == pytest.approx(wanted, rel=1e-10)
    planted = second_moment(FAULTS[name](RANK, ALPHA, ()), factors, base_weight)
    assert planted != pytest.approx(wanted, rel=0.02), "the planted fault goes unnoticed"


@pytest.mark.parametrize(("out", "into"), [(9, 5), (4, 8)], ids=["tall", "wide"])
@pytest.mark.parametrize(("name", "turn"), [(name, turn) for name, turns in IN_TURN.items() for turn in turns])
def test_the_noise_of_each_turn_has_the_second_moment_of_its_formula(name: str, turn: str, out: int, into: int) -> None:
    adapter = ADAPTERS[name](RANK, ALPHA, ())
    factors = drawn_factors(adapter, out, into)
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    wanted = STD**2 * IN_TURN[name][turn](adapter, factors, weight)
    assert second_moment(adapter, factors, weight, turn) == pytest.approx(wanted, rel=1e-10)
    other = {key: tensor if key == turn else 1.1 * tensor for key, tensor in factors.items()}
    planted = second_moment(adapter, other, 1.1 * weight, turn)
    assert planted != pytest.approx(wanted, rel=0.02), "other factors go unnoticed"

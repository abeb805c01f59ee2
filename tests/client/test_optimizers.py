"""Optimisers and learning rates: what the configuration says is what a site uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import spent
from torch import Tensor, nn
from torch.optim import Optimizer

from audits.tiny_models import write_reviews
from audits.tiny_site import clinic
from fedveil.client import local_training
from fedveil.client.optimizers import build_optimizer, set_learning_rate
from fedveil.common.config.schedule import learning_rate
from fedveil.common.config.sections import OPTIMIZERS, SCHEDULES, TrainingConfig
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import entries
from fedveil.common.run_lines import BaselineFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.entropy import Source
from fedveil.strategies import STRATEGIES
from fedveil.strategies.base import chooses
from fedveil.strategies.job import configure
from fedveil.strategies.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices, pytest.mark.one_length]

fast = settings(max_examples=25, deadline=None)
SETTINGS = TrainingConfig(
    local_steps=1,
    sample_rate=0.1,
    optimizer="sgd",
    learning_rate=1.0,
    weight_decay=0.1,
)
TRAINED = {
    "encoder.0": {"A": nn.Parameter(torch.ones(2, 3)), "B": nn.Parameter(torch.ones(4, 2))},
    HEAD: {"weight": nn.Parameter(torch.ones(2, 4)), "bias": nn.Parameter(torch.ones(2))},
}
WANTED: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0, "nesterov": False}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": False}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "decoupled_weight_decay": False, "amsgrad": False}),
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "amsgrad": False}),
}


def test_every_optimizer_of_the_configuration_is_tested() -> None:
    assert set(WANTED) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_of_its_class_with_the_runs_settings(name: str) -> None:
    optimizer = build_optimizer(TRAINED, replace(SETTINGS, optimizer=name, learning_rate=0.03), 5.0)
    kind, wanted = WANTED[name]
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        for key, value in {"weight_decay": 0.1, "maximize": False, **wanted}.items():
            assert group[key] == value, f"{name}: {key} is {group[key]!r}, not {value!r}"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rate", [None, 0.03, 0.001, 0.0])
def test_the_head_alone_learns_at_a_multiple_of_the_rate(name: str, rate: float | None) -> None:
    optimizer = build_optimizer(TRAINED, replace(SETTINGS, optimizer=name, learning_rate=0.03), 5.0)
    if rate is not None:
        set_learning_rate(optimizer, rate)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    peak = 0.03 if rate is None else rate
    wanted = {id(p): peak * (5.0 if layer == HEAD else 1.0) for layer in TRAINED for p in TRAINED[layer].values()}
    assert rates == wanted, "another set of tensors is trained, or at other rates"


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_a_round_of_a_site_is_the_same_whether_or_not_it_trained_the_round_before(
    name: str,
    mode: str,
    toy_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace_entropy: Callable[[Source], None],
) -> None:
    # Noise and batches that are the same at every call, so that only what a round leaves behind can differ.
    fixed = np.random.default_rng(5).integers(0, 2**64, 20_000, dtype=np.uint64)
    replace_entropy(lambda count: fixed[:count])
    site = clinic({**toy_settings, "privacy.mode": mode, "training.optimizer": name}, tmp_path)
    site.rule(allow_no_privacy=mode == "none")
    model = site.model()

    runs = map(str, count(1))

    def last_of(*rounds: int) -> Tensor:
        """Return what the site sends in the last of these rounds of a new run."""
        run = next(runs)
        sent = [site.train(number, run).contribution for number in rounds][-1]
        return torch.cat([tensor.flatten() for _, _, tensor in entries(sent)])

    alone = last_of(2)
    assert site.model() is model, "the site builds its model anew, so nothing could be left in it"
    assert torch.equal(last_of(1, 2), alone), f"{name}: something of round 1 is left in round 2"

    made: list[Optimizer] = []

    def keeping(trained: Any, config: TrainingConfig, head_rate: float) -> Optimizer:
        optimizer = build_optimizer(trained, config, head_rate)
        if made:
            optimizer.load_state_dict(made[-1].state_dict())
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(local_training, "build_optimizer", keeping)
    assert (last_of(1, 2) - alone).abs().max() > 1e-4, f"{name}: moments that cross a round would go unnoticed"


def test_the_private_default_lowers_the_loss_with_every_strategy(
    toy_settings: dict[str, Any], tmp_path: Path, replace_entropy: Callable[[Source], None]
) -> None:
    # Noise and batches follow a seed, so that a loss that rises is never chance.
    draws = np.random.default_rng(3)
    replace_entropy(lambda count: draws.integers(0, 2**64, count, dtype=np.uint64))
    own = {key: value for key, value in toy_settings.items() if not key.startswith(("training.", "server."))}
    data = {"data.name": str(write_reviews(tmp_path / "many.csv", 900)), "data.test-size": 200}
    noise = {"privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0}
    # Those by columns of B train a part of what FFA-LoRA does.
    for strategy, kind in STRATEGIES.items():
        if chooses(kind) and kind.adapters.trains == ("B",):
            continue
        chosen = {**own, **data, **noise, "strategy": strategy, "rounds": 6}
        config = configure(chosen).config
        assert config.privacy.mechanism.claims, "privacy is off by default"
        optimizers = ("none", "adam") if kind.facts.requires else ("adam", "sgd")
        assert (config.server.optimizer, config.training.optimizer) == optimizers
        assert config.training.local_steps == 1
        folder = run_in_process(chosen, 2, "default")
        before = read_file(BaselineFile, folder).loss
        after = read_lines(RoundLine, folder)[-1].loss
        assert after < before - 0.01, f"{strategy}: the private default takes the loss from {before:.3f} to {after:.3f}"
        assert spent(read_lines(PrivacyLine, folder)[-1]).event.noise_multiplier == 1.0


def by_hand(name: str, value: float, gradients: list[float]) -> float:
    """Run an optimiser on one number, from the formulas of its paper."""
    rate, b1, b2, decay = 0.03, 0.9, 0.999, 0.1
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        g = g if name == "adamw" else g + decay * value
        if name == "adamw":
            value -= rate * decay * value
        if name == "sgd":
            value -= rate * g
        elif name == "momentum":
            m = b1 * m + g
            value -= rate * m
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            value -= rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + 1e-8)
    return value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_steps_as_its_paper_says(name: str) -> None:
    gradients, ends = [1.0, -0.5, 2.0, 0.1], {other: by_hand(other, 0.7, [1.0, -0.5, 2.0, 0.1]) for other in OPTIMIZERS}
    parameter = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = build_optimizer({"l": {"B": parameter}}, replace(SETTINGS, optimizer=name, learning_rate=0.03))
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    end = float(parameter.detach())
    assert end == pytest.approx(ends[name], abs=1e-12)
    assert all(abs(end - ends[other]) > 1e-4 for other in OPTIMIZERS if other != name), "two optimisers do the same"


@fast
@given(total=st.integers(1, 300), peak=st.floats(1e-5, 10))
def test_slanted_rates_rise_to_the_peak_in_a_tenth_of_the_steps_and_fall_to_the_end(total: int, peak: float) -> None:
    course = [learning_rate("slanted", peak, step, total) for step in range(total)]
    top = course.index(max(course))
    assert max(course) <= peak * (1 + 1e-12), "it is above the peak"
    # Where the tenth is no whole number of steps, the peak lies between two of them.
    assert max(course) >= peak * (1 - 1 / (1 + total / 10)), f"it ends its rise at {max(course) / peak} of the peak"
    assert top <= max(0.0, total / 10 - 1) + 1, f"it rises for {top + 1} of {total} steps"
    assert all(later > earlier for earlier, later in pairwise(course[: top + 1])), "the rise has a step that falls"
    assert all(later < earlier for earlier, later in pairwise(course[top:])), "it rises again"
    assert course[-1] > 0, "it wastes its last step at a rate of 0"
    assert course[0] == (peak if total <= 10 else pytest.approx(peak * 10 / total)), "the rise begins elsewhere"


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule != "slanted"])
@fast
@given(total=st.integers(2, 300), peak=st.floats(1e-5, 10))
def test_a_schedule_starts_at_the_peak_and_never_rises(schedule: str, total: int, peak: float) -> None:
    course = [learning_rate(schedule, peak, step, total) for step in range(total)]
    assert course[0] == peak, f"{schedule} starts at {course[0] / peak} of the peak"
    assert all(later <= earlier for earlier, later in pairwise(course)), f"{schedule} rises"
    assert course[-1] > 0, f"{schedule} wastes its last step at a rate of 0"


def test_the_schedules_end_where_they_should() -> None:
    total, end = 200, {s: learning_rate(s, 2.0, 199, 200) for s in SCHEDULES}
    middle = {s: learning_rate(s, 2.0, 50, total) for s in SCHEDULES}
    assert end == pytest.approx(
        {"constant": 2.0, "linear": 2.0 / 200, "cosine": 1 + math.cos(math.pi * 199 / 200), "slanted": 2 / 181}
    )
    assert middle == pytest.approx(
        {"constant": 2.0, "linear": 1.5, "cosine": 1 + math.sqrt(0.5), "slanted": 2 * 150 / 181}
    )


def test_a_run_without_a_step_has_a_rate_all_the_same() -> None:
    assert all(learning_rate(s, 0.02, 0, 0) == 0.02 for s in SCHEDULES)


def test_schedule_and_head_rate_are_applied_once_by_the_optimiser_that_moves_the_model() -> None:
    settings = {"schedule": "cosine", "head-rate": 3.0}
    config = resolve({**settings, "server.optimizer": "adam"}).config
    assert (config.schedule, config.head_rate) == ("cosine", 3.0), "nobody would apply them"
    assert (config.moved_at_sites, config.site_head_rate) == (False, 1.0), "a site would apply them again"
    config = resolve({**settings, "server.optimizer": "none"}).config
    assert (config.moved_at_sites, config.site_head_rate) == (True, 3.0), "nobody would apply them"

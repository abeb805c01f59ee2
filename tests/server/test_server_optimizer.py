"""The server's Adam: what it does to an average, and that sites with one plain step make it centralised Adam."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import HEAD, METRIC, AdapterState
from fedveil.common.messages.tensors import apply, entries, merge
from fedveil.common.model.score import Score
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedveil.server.optimizer import BETA2, server_step, usual_change
from fedveil.strategies import STRATEGIES, Contribution, Moments, ServerState
from fedveil.strategies.base import chooses
from fedveil.strategies.fed_svd import FedSVD
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure
from fedveil.strategies.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices, pytest.mark.one_length]

CONFIG = resolve(
    {
        "recipe": "plain",
        "rounds": 6,
        "schedule": "linear",
        "head-rate": 3.0,
        "server.optimizer": "adam",
        "server.learning-rate": 0.05,
        "server.adam-tau": 1e-3,
    }
).config


def start(seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"layer": {"A": normal(2, 5), "B": normal(7, 2)}, HEAD: {"weight": normal(3, 4), "bias": normal(3)}}


def gradient_at(state: AdapterState, site: int) -> AdapterState:
    """The gradient of a site's own quadratic bowl, so that it depends on where the model stands."""
    centre = start(100 + site)
    trained = {"layer": ("B",), HEAD: ("weight", "bias")}
    return {layer: {n: state[layer][n] - centre[layer][n] for n in names} for layer, names in trained.items()}


def test_one_plain_step_at_unequal_sites_makes_the_servers_adam_centralised_adam() -> None:
    weights, rate = [5.0, 1.0, 2.0], 0.3
    state = ServerState(0, start(), ("B",))
    reference = {(k, n): t.clone().requires_grad_(n != "A") for k, f in start().items() for n, t in f.items()}
    trained = [t for t in reference.values() if t.requires_grad]
    shares = [3.0 if k == HEAD else 1.0 for (k, n), t in reference.items() if t.requires_grad]
    adam = torch.optim.Adam([{"params": [t]} for t in trained], 1.0, eps=1e-3)
    for done in range(CONFIG.rounds):
        contributions, total = [], {key: torch.zeros_like(t) for key, t in reference.items()}
        for site, weight in enumerate(weights):
            gradient = gradient_at(state.adapter, site)
            contributions.append(
                Contribution(
                    f"site-{site}",
                    weight,
                    {k: {n: state.adapter[k][n] - rate * g for n, g in f.items()} for k, f in gradient.items()},
                )
            )
            for k, f in gradient.items():
                for n, g in f.items():
                    total[k, n] += weight / sum(weights) * g
        state = server_step(CONFIG, state, FFALoRA().server_update(state, contributions))
        for group, share in zip(adam.param_groups, shares, strict=True):
            group["lr"] = 0.05 * share * (1 - done / CONFIG.rounds)
        for key, tensor in reference.items():
            tensor.grad = rate * total[key] if tensor.requires_grad else None
        adam.step()
    for (layer, name), tensor in reference.items():
        assert torch.allclose(state.adapter[layer][name], tensor.detach(), rtol=1e-9, atol=1e-9), f"{layer}/{name}"
    assert torch.equal(state.adapter["layer"]["A"], start()["layer"]["A"]), "a frozen factor moved"
    assert state.round_number == CONFIG.rounds


def test_without_an_optimiser_the_average_is_the_new_model() -> None:
    averaged = ServerState(1, start(1), ("B",))
    config = replace(CONFIG, server=replace(CONFIG.server, optimizer="none"))
    assert server_step(config, ServerState(0, start(), ("B",)), averaged) is averaged


def test_the_adapter_keeps_its_dtype_and_the_moments_are_float64() -> None:
    single = {layer: {n: t.float() for n, t in f.items()} for layer, f in start().items()}
    other = {layer: {n: t.float() for n, t in f.items()} for layer, f in start(1).items()}
    state = server_step(CONFIG, ServerState(0, single, ("B",)), ServerState(1, other, ("B",)))
    assert {t.dtype for f in state.adapter.values() for t in f.values()} == {torch.float32}
    moments = [t for held in (state.optimizer.first, state.optimizer.second) for f in held.values() for t in f.values()]
    assert len(moments) == 2 * 3, "what is not trained has moments"
    assert {t.dtype for t in moments} == {torch.float64}


def test_the_first_step_has_the_learning_rates_length_in_every_moved_coordinate() -> None:
    before, after = start(), start(1)
    state = server_step(CONFIG, ServerState(0, before, ("B",)), ServerState(1, after, ("B",)))
    moved = (state.adapter["layer"]["B"] - before["layer"]["B"]).abs()
    change = (before["layer"]["B"] - after["layer"]["B"]).abs()
    assert torch.allclose(moved, 0.05 * change / (change + 1e-3)), "Adam's first step is nearly the sign of the change"
    head = (state.adapter[HEAD]["bias"] - before[HEAD]["bias"]).abs()
    change = (before[HEAD]["bias"] - after[HEAD]["bias"]).abs()
    assert torch.allclose(head, 0.15 * change / (change + 1e-3)), "the head steps at head-rate times the rate"


def test_v8_moments_are_dropped_when_fed_svd_turns_the_basis_and_the_next_step_is_a_first_one() -> None:
    strategy, settle = FedSVD(period=2), []

    def site(seed: int) -> Contribution:
        return Contribution("s", 1.0, {"layer": {"B": start(seed)["layer"]["B"]}, HEAD: start(seed)[HEAD]})

    def step(before: ServerState, averaged: ServerState) -> ServerState:
        settle.append(server_step(CONFIG, before, averaged))
        return settle[-1]

    begun = strategy.start(start(), ("B",))
    first = strategy.server_update(begun, [site(1)], step)
    for held in (first.optimizer.first, first.optimizer.second, first.optimizer.steps):
        assert "layer" in held, "nothing turned, and moments are gone"
    second = strategy.server_update(first, [site(2)], step)
    assert not torch.allclose(second.adapter["layer"]["A"], first.adapter["layer"]["A"]), "A did not turn"
    for held in (second.optimizer.first, second.optimizer.second, second.optimizer.steps):
        assert set(held) == {HEAD}, "moments of the old coordinates are kept, or the head's are gone"
    assert second.optimizer.steps[HEAD] == 2
    strategy.server_update(second, [site(3)], step)
    averaged = strategy.combine(second, [site(3)])
    fresh = server_step(CONFIG, replace(second, optimizer=Moments()), averaged)
    assert torch.equal(settle[-1].adapter["layer"]["B"], fresh.adapter["layer"]["B"]), "the step is not a first one"
    old = server_step(CONFIG, replace(second, optimizer=settle[1].optimizer), averaged)
    assert not torch.allclose(old.adapter["layer"]["B"], fresh.adapter["layer"]["B"]), "keeping them changes nothing"


HEAVY_BALL = replace(CONFIG, server=replace(CONFIG.server, optimizer="momentum", momentum=0.8))


def test_momentum_on_averages_is_that_of_torch_on_what_they_change() -> None:
    state = ServerState(0, start(), ("B",))
    reference = {(k, n): t.clone().requires_grad_() for k, f in start().items() for n, t in f.items()}
    ball = torch.optim.SGD([{"params": [t]} for t in reference.values()], 1.0, momentum=0.8)
    for done in range(CONFIG.rounds):
        sent = start(done + 1)
        site = Contribution("s", 1.0, {"layer": {"B": sent["layer"]["B"]}, HEAD: sent[HEAD]})
        averaged = FFALoRA().combine(state, [site])
        for group, (key, tensor) in zip(ball.param_groups, reference.items(), strict=True):
            layer, name = key
            tensor.grad = state.adapter[layer][name] - averaged.adapter[layer][name]
            group["lr"] = 0.05 * (3.0 if layer == HEAD else 1.0) * (1 - done / CONFIG.rounds)
        state = server_step(HEAVY_BALL, state, averaged)
        ball.step()
    for (layer, name), tensor in reference.items():
        assert torch.allclose(state.adapter[layer][name], tensor.detach(), rtol=1e-9, atol=1e-9), f"{layer}/{name}"
    assert torch.equal(state.adapter["layer"]["A"], start()["layer"]["A"]), "a frozen factor moved"


def test_the_velocity_of_a_layer_that_fed_svd_turns_begins_anew() -> None:
    strategy, seen = FedSVD(), []

    def step(before: ServerState, averaged: ServerState) -> ServerState:
        seen.append((averaged, server_step(HEAVY_BALL, before, averaged)))
        return seen[-1][1]

    state = strategy.start(start(), ("B",))
    for seed in (1, 2):
        began = state
        site = Contribution("s", 1.0, {"layer": {"B": start(seed)["layer"]["B"]}, HEAD: start(seed)[HEAD]})
        state = strategy.server_update(state, [site], step)
        assert set(state.optimizer.first) == set(state.optimizer.steps) == {HEAD}
        assert state.optimizer.steps[HEAD] == seed
    averaged, stepped = seen[-1]
    fresh = server_step(HEAVY_BALL, replace(began, optimizer=Moments()), averaged)
    assert torch.equal(stepped.adapter["layer"]["B"], fresh.adapter["layer"]["B"]), "the step is not a first one"
    assert not torch.allclose(stepped.adapter[HEAD]["weight"], fresh.adapter[HEAD]["weight"]), "the head's is lost"


def test_the_optimiser_and_the_strategy_keep_their_own_apart() -> None:
    memory = {"own": {"x": torch.zeros(1)}}
    state = ServerState(0, start(), ("B",), memory)
    for seed in (1, 2):
        site = Contribution("s", 1.0, {"layer": {"B": start(seed)["layer"]["B"]}, HEAD: start(seed)[HEAD]})
        state = FFALoRA().server_update(state, [site], lambda a, b: server_step(CONFIG, a, b))
    assert state.memory == memory
    assert state.optimizer.steps == {"layer": 2, HEAD: 2}
    assert state.trained == ("B",)


def with_metric(seed: int) -> AdapterState:
    """Return a start with a public map of the head's features, the same for every seed."""
    return {**start(seed), METRIC: {"centre": torch.ones(4), "map": torch.eye(4)}}


@pytest.mark.parametrize("config", [CONFIG, HEAVY_BALL], ids=["adam", "momentum"])
def test_what_sites_do_not_train_has_no_moments_and_those_of_an_older_checkpoint_change_nothing(
    config: RunConfig, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    def averaged(state: ServerState, seed: int) -> ServerState:
        sent = {"layer": {"B": start(seed)["layer"]["B"]}, HEAD: start(seed)[HEAD]}
        return FFALoRA().combine(state, [Contribution("s", 1.0, sent)])

    begun = ServerState(0, with_metric(0), ("B",))
    first = server_step(config, begun, averaged(begun, 1))
    moments = [held for held in (first.optimizer.first, first.optimizer.second) if held]
    for held in moments:
        assert {layer: set(factors) for layer, factors in held.items()} == {"layer": {"B"}, HEAD: {"weight", "bias"}}
    assert first.optimizer.steps == {"layer": 1, HEAD: 1}
    assert set(first.adapter) == set(begun.adapter)
    for layer, name in ((METRIC, "centre"), (METRIC, "map"), ("layer", "A")):
        assert torch.equal(first.adapter[layer][name], begun.adapter[layer][name])

    # As they were kept before: zeros of every tensor, and steps of every layer.
    def filled(held: AdapterState) -> AdapterState:
        zeros = apply(lambda tensor: torch.zeros_like(tensor, dtype=torch.float64), first.adapter)
        return merge(zeros, held) if held else {}

    steps = dict.fromkeys(first.adapter, 1)
    older = replace(first, optimizer=Moments(filled(first.optimizer.first), filled(first.optimizer.second), steps))
    score = Score(0.5, 1.0)
    job = configure({**toy_settings, "output": str(tmp_path)})
    save_checkpoint(tmp_path, Checkpoint("1", job.settings(), older, {}, score, score, {}))
    read = load_checkpoint(tmp_path, job, "1").state
    assert set(read.optimizer.first) == set(first.adapter)
    ours, theirs = (server_step(config, state, averaged(state, 2)) for state in (first, read))
    for layer, name, tensor in entries(ours.adapter):
        assert torch.equal(tensor, theirs.adapter[layer][name]), f"{layer}/{name}"
    mine, held = ([list(entries(part)) for part in (o.first, o.second)] for o in (ours.optimizer, theirs.optimizer))
    assert str(mine) == str(held), "what an older checkpoint keeps for nothing is kept on"
    assert ours.optimizer.steps == theirs.optimizer.steps


def test_the_usual_change_is_the_root_of_the_mean_squared_length_of_the_changes() -> None:
    state, squares = ServerState(0, start(), ("B",)), 0.0
    assert usual_change(state) == 0.0, "nothing is usual before the first step"
    weights = [BETA2**2, BETA2, 1.0]  # of the oldest change first, as Adam forgets
    for seed, weight in zip((1, 2, 3), weights, strict=True):
        other = start(seed)
        sent = {"layer": {"B": other["layer"]["B"]}, HEAD: other[HEAD]}
        averaged = FFALoRA().combine(state, [Contribution("s", 1.0, sent)])
        trained = [("layer", "B"), (HEAD, "weight"), (HEAD, "bias")]
        changes = [state.adapter[k][n] - averaged.adapter[k][n] for k, n in trained]
        squares += weight * sum(float(change.square().sum()) for change in changes)
        state = server_step(CONFIG, state, averaged)
    assert usual_change(state) == pytest.approx(math.sqrt(squares / sum(weights)), rel=1e-12)
    without = replace(state, optimizer=state.optimizer.without({"layer", HEAD}))
    assert usual_change(without) == 0.0, "moments that were dropped are no memory"


def test_a_restarted_adam_forgets_the_adapters_moments_and_keeps_the_heads() -> None:
    """It is the control of FedSVD, which drops its layers' moments whenever it turns their factors."""
    restarted = replace(CONFIG, server=replace(CONFIG.server, optimizer="adam-restarted"))
    state = ServerState(0, start(), ("B",))
    for seed in (1, 2):
        other = start(seed)
        sent = {"layer": {"B": other["layer"]["B"]}, HEAD: other[HEAD]}
        averaged = FFALoRA().combine(state, [Contribution("s", 1.0, sent)])
        dropped = replace(state, optimizer=state.optimizer.without({"layer"}))
        wanted, found = server_step(CONFIG, dropped, averaged), server_step(restarted, state, averaged)
        for layer, name, tensor in entries(wanted.adapter):
            assert torch.equal(tensor, found.adapter[layer][name]), f"{layer}/{name}"
        assert (found.optimizer.steps["layer"], found.optimizer.steps[HEAD]) == (1, seed)
        if seed == 2:
            kept = server_step(CONFIG, state, averaged)
            assert not torch.equal(kept.adapter["layer"]["B"], found.adapter["layer"]["B"]), "no moment was dropped"
        state = found


def test_every_strategy_lowers_the_loss_under_the_servers_adam(toy_settings: dict[str, Any]) -> None:
    """Through the whole federation; without privacy, so that the loss falls for certain."""
    for name, kind in STRATEGIES.items():
        if chooses(kind) and kind.adapters.trains == ("B",):
            continue
        settings = {
            **toy_settings,
            "strategy": name,
            "rounds": 6,
            "privacy.mode": "none",
            "server.optimizer": "adam",
            "server.learning-rate": 0.02,
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
            "training.local-steps": 1,
        }
        if kind.facts.requires:
            with pytest.raises(ConfigError, match=r"set server\.optimizer to 'none', or"):
                configure(settings)
            continue
        folder = run_in_process(settings, 3, f"adam-{name}")
        first, *_, last = (line.loss for line in read_lines(RoundLine, folder))
        assert first is not None
        assert last is not None
        assert last < first, f"{name}: the loss went from {first} up"

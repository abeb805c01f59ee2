"""Composition of saved adapters: exact where it says so, and what becomes of the claims of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_runs import fedveil
from torch import Tensor

from fedveil.common.derived import DerivedFile
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import AdapterState
from fedveil.common.run_lines import read_file
from fedveil.contrib.library.compose import RULES, Recipe, composed
from fedveil.contrib.library.pairs import equal_norms, norms, read_pairs
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process

SHAPES = {"query": (9, 7), "dense": (5, 9)}


def drawn(count: int, *, own: bool = False, ranks: tuple[int, ...] = (3, 3, 3)) -> list[AdapterState]:
    """Return adapters of layers that are not square, on one basis or each on its own."""
    draw = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A = {layer: random(ranks[0], into) for layer, (_, into) in SHAPES.items()}
    return [
        {
            layer: {
                "A": random(ranks[number], into) if own else A[layer],
                "B": random(out, ranks[number] if own else ranks[0]),
            }
            for layer, (out, into) in SHAPES.items()
        }
        for number in range(count)
    ]


def change(pairs: AdapterState, layer: str) -> Tensor:
    return pairs[layer]["B"] @ pairs[layer]["A"]


def furthest(made: AdapterState, wanted: dict[str, Tensor]) -> float:
    return max(float((change(made, layer) - wanted[layer]).abs().max()) for layer in SHAPES)


def summed(adapters: list[AdapterState], weights: tuple[float, ...]) -> dict[str, Tensor]:
    return {
        layer: sum((w * change(pairs, layer) for w, pairs in zip(weights, adapters, strict=True)), torch.zeros(()))
        for layer in SHAPES
    }


WEIGHTS = (0.6, -0.3, 1.2)


def test_on_one_basis_a_weighted_sum_is_exact_at_the_same_rank() -> None:
    adapters = drawn(3)
    made, lost = composed(adapters, Recipe("linear", WEIGHTS))
    assert furthest(made, summed(adapters, WEIGHTS)) < 1e-12
    assert {len(factors["A"]) for factors in made.values()} == {3}
    assert lost == 0.0
    mean, _ = composed(adapters, Recipe("linear"))
    assert furthest(mean, summed(adapters, (1 / 3, 1 / 3, 1 / 3))) < 1e-12


def test_on_bases_of_their_own_cat_is_exact_at_the_sum_of_ranks_and_svd_is_the_nearest_of_its_rank() -> None:
    adapters = drawn(3, own=True, ranks=(2, 3, 1))
    wanted = summed(adapters, WEIGHTS)
    made, _ = composed(adapters, Recipe("cat", WEIGHTS))
    assert furthest(made, wanted) < 1e-12
    assert {len(factors["A"]) for factors in made.values()} == {6}
    cut, lost = composed(adapters, Recipe("svd", WEIGHTS, rank=2))
    whole = kept = 0.0
    for layer, target in wanted.items():
        values = torch.linalg.svdvals(target)
        gap = float((change(cut, layer) - target).norm())
        assert gap == pytest.approx(float(values[2:].norm()), rel=1e-9), "another matrix of the rank is nearer"
        whole, kept = whole + float(values.square().sum()), kept + float(values[:2].square().sum())
    assert lost == pytest.approx(1 - kept / whole)
    for rule in ("linear", "ties", "dare"):
        with pytest.raises(ConfigError, match="for adapters on one basis"):
            composed(adapters, Recipe(rule))


def test_factors_added_apart_leave_cross_terms() -> None:
    """The fault of PEFT's own ``linear``, and of averages of both factors: what ``cat`` is for."""
    adapters = drawn(2, own=True)
    apart: AdapterState = {
        layer: {name: adapters[0][layer][name] + adapters[1][layer][name] for name in ("A", "B")} for layer in SHAPES
    }
    wanted = summed(adapters, (1.0, 1.0))
    assert furthest(apart, wanted) > 0.1
    assert furthest(composed(adapters, Recipe("cat", (1.0, 1.0)))[0], wanted) < 1e-12


def test_ties_and_dare_act_on_b_as_written_down() -> None:
    adapters, density = drawn(3), 0.4
    for given in ((), (1.0, 1.0, 1.0), (2.0, 0.5, -1.0)):
        made, _ = composed(adapters, Recipe("ties", given, density=density))
        weights = torch.tensor(given or (1 / 3,) * 3, dtype=torch.float64)[:, None]
        for layer in SHAPES:
            flat = torch.stack([pairs[layer]["B"].flatten() for pairs in adapters])
            least = flat.abs().sort(descending=True).values[:, int(density * flat.shape[1]) - 1, None]
            votes = weights * torch.where(flat.abs() >= least, flat, 0.0)
            own = votes * torch.where(votes.sum(0) >= 0, 1.0, -1.0) > 0
            mean = (votes * own).sum(0) / (weights.abs() * own).sum(0).where(own.any(0), 1.0)
            assert (made[layer]["B"].flatten() - mean * weights.abs().sum()).abs().max() < 1e-12, layer
    twice, once = (composed(adapters[:1] * n, Recipe("ties", density=0.99))[0] for n in (2, 1))
    assert furthest(twice, {layer: change(once, layer) for layer in SHAPES}) < 1e-12, "agreement shrinks"
    many = [composed(adapters, Recipe("dare", WEIGHTS, density=density, seed=seed))[0] for seed in range(2000)]
    wanted = summed(adapters, WEIGHTS)
    mean = {layer: torch.stack([change(one, layer) for one in many]).mean(0) for layer in SHAPES}
    assert max(float((mean[layer] - wanted[layer]).abs().max()) for layer in SHAPES) < 0.6, "DARE keeps no mean"
    again = composed(adapters, Recipe("dare", WEIGHTS, density=density, seed=0))[0]
    assert all(torch.equal(again[layer]["B"], many[0][layer]["B"]) for layer in SHAPES)


def test_equal_norms_are_the_geometric_mean_of_each_layer() -> None:
    adapters = drawn(3)
    made = equal_norms(adapters)
    for layer in SHAPES:
        own = [norms(pairs)[layer] for pairs in adapters]
        wanted = math.prod(own) ** (1 / 3)
        assert [norms(pairs)[layer] for pairs in made] == pytest.approx([wanted] * 3)
        for before, after in zip(adapters, made, strict=True):
            assert torch.equal(before[layer]["A"], after[layer]["A"])
    whole, _ = composed(adapters, Recipe("linear", WEIGHTS, equal_norms=True))
    assert furthest(whole, summed(made, WEIGHTS)) < 1e-12


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("mean"), "--rule is 'mean'"),
        (Recipe(weights=(1.0,)), "--weights has 1 numbers for 2 adapters"),
        (Recipe(weights=(0.0, 0.0)), "not all 0"),
        (Recipe(density=1.0), "--density is 1"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_nothing_is_refused(recipe: Recipe, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        composed(drawn(2), recipe)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(toy_generation: dict[str, Any]) -> list[Path]:
    private = {"privacy.noise-multiplier": 1.0, "privacy.epsilon": 30.0}
    return [run_in_process({**toy_generation, "rounds": rounds, **private}, 2) for rounds in (1, 2)]


def whole(module: Any) -> dict[str, Tensor]:
    merged = module.encoder.merge_and_unload()
    return {name: p.detach().double() for name, p in merged.named_parameters()}


@pytest.mark.parametrize("rule", RULES)
def test_a_composed_adapter_loads_in_stock_peft_and_claims_what_its_runs_do(
    rule: str, runs: list[Path], tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    target = tmp_path / "composed"
    code, said = fedveil("compose", *runs, "--rule", rule, "--weights", "0.25,0.5", "--out", target)
    assert code == 0, said
    made = read_file(DerivedFile, target)
    assert made.operation == f"compose {rule}"
    assert [source.weight for source in made.sources] == [0.25, 0.5]
    assert made.epsilon == pytest.approx(math.fsum(source.epsilon or 0.0 for source in made.sources))
    assert made.delta == pytest.approx(2e-3)
    card = (target / "adapter" / "README.md").read_text(encoding="utf-8")
    assert all(source.run in card for source in made.sources)
    assert bool(made.notes) == (rule == "ties")
    read = [read_pairs(run / "adapter").layers for run in runs]
    pairs, _ = composed(read, Recipe(rule, (0.25, 0.5)))
    base = {name: p.detach().double() for name, p in load_result(target / "adapter").base.module.named_parameters()}
    got = whole(load_result(target / "adapter").module)
    moved = 0
    for layer, factors in pairs.items():
        name = next(n for n in got if n.endswith(f"{layer}.weight"))
        plain = next(p for n, p in base.items() if n.replace(".base_layer", "").endswith(f"{layer}.weight"))
        assert (got[name] - plain - factors["B"] @ factors["A"]).abs().max() < 1e-5
        moved += 1
    assert moved
    # What is derived can be derived from again, and a run that came twice is there once.
    assert fedveil("compose", target, runs[0], "--rule", "cat", "--out", tmp_path / "again")[0] == 0
    again = read_file(DerivedFile, tmp_path / "again")
    assert [source.run for source in again.sources] == [source.run for source in made.sources]


def test_one_adapter_or_unlike_ones_are_refused(runs: list[Path], tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    other = run_in_process({**toy_settings, "rounds": 1, "privacy.mode": "none"}, 2)
    for folders, words in (((runs[0],), "name two or more"), ((runs[0], other), "than")):
        code, said = fedveil("compose", *folders, "--out", tmp_path / "none")
        assert code == 1
        assert words in said
    assert fedveil("compose", *runs, "--weights", "a,b", "--out", tmp_path / "none")[0] == 1

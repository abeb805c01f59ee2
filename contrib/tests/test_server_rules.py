"""Rules around the server's optimiser: their algebra in float64, what noise does to them, and what is refused."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from rule_states import INTO, OUT, RANK, draw, published
from safetensors.torch import load_file
from torch import Tensor

from fedveil.client.ledger.ledger import Ledger
from fedveil.common.adapters import LoRAFrozenA, lora_frozen_a
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.adapters.layers import layers_of
from fedveil.common.errors import ConfigError, DataError, ModelError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.contrib.nulls import LEVEL, edge_behind, noise_edge
from fedveil.contrib.rules.align_guard import AlignGuard, guarded
from fedveil.contrib.rules.soft_threshold import entries_shrunk, product_shrunk
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.server.optimizer import server_step
from fedveil.server.ruled import ruled_step
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.job import configure
from fedveil.strategies.rules import RULES, ServerRule
from fedveil.strategies.rules.base import Known

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]


# --- AlignGuard -------------------------------------------------------------------------------------------------------
def flat(state: AdapterState) -> Tensor:
    return torch.cat([state[layer]["B"].flatten() for layer in ("one", "two")])


def two_layers(pulls: Tensor) -> AdapterState:
    """Return rows of numbers, or one, as those of two layers that are not square."""
    first, second = pulls.split([OUT * RANK, 12], dim=-1)
    return {
        "one": {"B": first.reshape(*pulls.shape[:-1], OUT, RANK)},
        "two": {"B": second.reshape(*pulls.shape[:-1], 4, 3)},
    }


def test_invariant_j1_both_parts_of_a_guarded_change_are_orthogonal_so_that_the_geodesic_term_is_zero() -> None:
    numbers, rule = OUT * RANK + 12, AlignGuard(strength=1e14, directions=4)
    pulls = guarded(draw(20, numbers, seed=1), rule.directions, rule.strength)
    for seed in (5, 6):
        b = draw(numbers, seed=seed)
        rest = flat(rule.step({}, two_layers(b), two_layers(pulls), Known()))
        guard = b - rest
        assert float(guard.norm()) > 0.1, "nothing is guarded: nothing is proved"
        assert abs(float(guard @ rest)) < 1e-12
        assert float((guard * rest).abs().sum()) > 1, "the other collision term depends on coordinates, and is not zero"
        # Planted: onto the same directions, but not at right angles.
        skew = pulls + 0.5 * draw(4, numbers, seed=seed + 10)
        oblique = pulls.T @ torch.linalg.solve(skew @ pulls.T, skew @ b)
        assert abs(float(oblique @ (b - oblique))) > 1e-2


def test_invariant_j1_of_a_mask_of_coordinates_both_collision_terms_are_zero_and_of_turned_ones_one() -> None:
    """Gradients in single coordinates make the rule's projector a mask of these."""
    numbers, guards = OUT * RANK + 12, 5
    b, lengths = draw(numbers), torch.linspace(1.0, 0.8, guards, dtype=torch.float64)
    along = torch.zeros(guards, numbers, dtype=torch.float64)
    along[range(guards), range(0, 3 * guards, 3)] = lengths

    def parts(gradients: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Return what the rule takes of a change, and what it leaves."""
        rule = AlignGuard(strength=strength, directions=guards)
        pulls = two_layers(guarded(gradients, guards, strength))
        rest = flat(rule.step({}, two_layers(b), pulls, Known()))
        return b - rest, rest

    taken, rest = parts(along, 1e14)
    assert float(taken.norm()) > 0.1, "nothing is guarded: nothing is proved"
    assert bool((taken[along.sum(0) == 0] == 0).all()), "it is no mask"
    assert float((taken * rest).abs().max()) < 1e-12
    assert abs(float(taken @ rest)) < 1e-12
    turn = torch.linalg.qr(draw(numbers, numbers, seed=2))[0]
    taken, rest = parts(along @ turn.T, 1e14)
    assert abs(float(taken @ rest)) < 1e-12
    assert float((taken * rest).abs().max()) > 1e-2
    # Planted: a pull that leaves half, which is no projector: both parts have the same coordinates.
    taken, rest = parts(along, 1.0)
    assert float((taken * rest).abs().max()) > 1e-2
    assert abs(float(taken @ rest)) > 1e-2


def test_invariant_j2_what_the_rule_takes_is_the_gradient_of_the_fisher_term_where_it_leads() -> None:
    """By central differences of strength / 2 xᵀ P F P x / λ₁, for F of per-record gradients without full rank."""
    numbers, rule = OUT * RANK + 12, AlignGuard(strength=0.7, directions=5)
    g = draw(20, numbers, seed=3)
    b = draw(numbers, seed=4)
    moved = flat(rule.step({}, two_layers(b), two_layers(guarded(g, 5, 0.7)), Known()))
    F = g.T @ g / len(g)
    values, vectors = torch.linalg.eigh(F)
    P = vectors[:, -5:] @ vectors[:, -5:].T

    def term(x: Tensor) -> float:
        return 0.7 / 2 * float(x @ P @ F @ P @ x / values[-1])

    def differences(x: Tensor) -> Tensor:
        units = 1e-4 * torch.eye(numbers, dtype=torch.float64)
        return torch.tensor([(term(x + unit) - term(x - unit)) / 2e-4 for unit in units], dtype=torch.float64)

    taken = b - moved
    assert (taken - 0.7 * P @ F @ P @ moved / values[-1]).abs().max() < 1e-12
    assert (taken - differences(moved)).abs().max() < 1e-6
    # Planted: the gradient where the step began, and a pull by eigenvalues' roots.
    assert (taken - differences(b)).abs().max() > 1e-2
    roots = torch.linalg.svd(g, full_matrices=False)
    c = 0.7 * roots.S[:5] / roots.S[0]
    planted = b - (c / (1 + c) * (roots.Vh[:5] @ b)) @ roots.Vh[:5]
    assert (b - planted - differences(planted)).abs().max() > 1e-3


def test_invariant_j3_the_shift_is_the_proximal_map_and_is_the_same_at_the_sites() -> None:
    rule, g = AlignGuard(strength=3.0, directions=5), draw(20, OUT * RANK + 12, seed=3)
    measured = two_layers(guarded(g, rule.directions, rule.strength))

    def shifted(state: AdapterState) -> AdapterState:
        return rule.step(state, state, measured, Known())

    state = {"one": {"B": draw(OUT, RANK, seed=5)}, "two": {"B": draw(4, 3, seed=6)}}
    moved, b = flat(shifted(state)), flat(state)
    _, values, Vt = torch.linalg.svd(g, full_matrices=False)
    U, c = Vt[:5].T, 3.0 * (values[:5] / values[0]).square()
    # Optimal: x - b + U diag(c) Uᵀ x = 0, and never longer.
    assert (moved - b + U @ (c * (U.T @ moved))).abs().max() < 1e-12
    assert float(moved.norm()) <= float(b.norm())
    assert float(U[:, 0] @ moved) == pytest.approx(float(U[:, 0] @ b) / 4)
    sites = [{k: {"B": f["B"] + draw(*f["B"].shape, seed=20 + i)} for k, f in state.items()} for i in range(3)]
    weights = (0.5, 0.3, 0.2)
    there = sum(w * flat(shifted(site)) for w, site in zip(weights, sites, strict=True))
    mean = {k: {"B": sum(w * s[k]["B"] for w, s in zip(weights, sites, strict=True))} for k in state}
    assert (flat(shifted(mean)) - there).abs().max() < 1e-12  # type: ignore[arg-type]


def test_invariant_j4_the_fisher_matrix_is_of_public_text_and_nothing_is_charged_for_it(
    toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    own = {"strategy": "ffa-lora", "server.rule": "align-guard", "align-guard.records": 6, "rounds": 2}
    folder = run_in_process({**toy_generation, **own}, 2)
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        assert {entry.purpose for entry in ledger.entries()} == {"training"}
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [1, 2]
    # Private text is refused: a file that holds a record of the run's.
    prompts = Path(toy_generation["data.name"]).read_text(encoding="utf-8").splitlines()[1].split(",")[0]
    private = tmp_path / "private.txt"
    private.write_text(f"{prompts}\n", encoding="utf-8")
    digest = hashlib.sha256(private.read_bytes()).hexdigest()
    named = {**own, "align-guard.text": str(private), "align-guard.text-sha256": digest}
    job = configure({**toy_generation, **named})
    server_model = ServerModel(job)
    with pytest.raises(DataError, match="not public to this run"):
        server_model.rule_statistic(job.start(server_model.start))
    with pytest.raises(ConfigError, match="guards what a language model answers"):
        configure({"strategy": "ffa-lora", "server.rule": "align-guard"})
    with pytest.raises(ConfigError, match="which strategy 'fed-svd' turns"):
        configure({**toy_generation, "server.rule": "align-guard", "strategy": "fed-svd"})
    with pytest.raises(ConfigError, match="trained from 0"):
        configure({**toy_generation, "server.rule": "align-guard", "strategy": "fedavg-lora"})
    with pytest.raises(ModelError, match="has no gradient"):
        guarded(torch.zeros(3, 7), 2, 1.0)


# --- a threshold of singular values -----------------------------------------------------------------------------------
PLAIN: dict[str, Any] = {
    "strategy": "ffa-lora",
    "server.rule": "soft-threshold",
    "server.optimizer": "momentum",
    "server.momentum": 0.0,
    "server.learning-rate": 0.5,
    "schedule": "constant",
}


def slow(B: Tensor, A: Tensor, threshold: float) -> Tensor:
    """Return the weight whose singular values are those of B A, less a threshold: of the whole product."""
    U, values, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    return U @ torch.diag((values - threshold).clamp(min=0)) @ Vt


def of_columns(B: Tensor, threshold: float) -> Tensor:
    norms = B.norm(dim=0)
    return B * ((norms - threshold).clamp(min=0) / norms)


@pytest.mark.parametrize(("out", "into", "rank"), [(13, 9, 3), (7, 21, 5), (4, 30, 6), (20, 3, 5)])
def test_invariant_t1_the_products_singular_values_shrink_whatever_the_shapes_and_ranks(
    out: int, into: int, rank: int
) -> None:
    A, B = draw(rank, into, seed=1), draw(out, rank, seed=2)
    cases = [(B, A), (torch.cat([B[:, :1]] * rank, dim=1), A), (B, torch.cat([A[:1], A[:-1]])), (0 * B, A)]
    for left, right in cases:
        for threshold in (0.0, 0.7, 3.0, 1e3):
            found = product_shrunk(left, right, threshold) @ right
            assert float((found - slow(left, right, threshold)).abs().max()) < 1e-9
    # It is the proximal map: (B A - P) / ξ is a subgradient of the nuclear norm at P.
    P, threshold = product_shrunk(B, A, 2.0) @ A, 2.0
    U, kept, Vt = torch.linalg.svd(P, full_matrices=False)
    gradient, on = (B @ A - P) / threshold, kept > 1e-9
    assert float(torch.linalg.svdvals(gradient)[0]) <= 1 + 1e-10
    assert float(((U[:, on].T @ gradient @ Vt[on].T) - torch.eye(int(on.sum()))).abs().max()) < 1e-9
    # Planted: of B alone, whose singular values are not the product's under an A that is not orthonormal.
    planted = product_shrunk(B, torch.eye(rank, dtype=torch.float64), threshold) @ A
    assert float((planted - slow(B, A, threshold)).abs().max()) > 1e-2


def test_invariant_t1_the_published_operator_drops_twice_as_much() -> None:
    """Exactly: the proximal map leaves 0 up to λ, the published one below 2 λ; of numbers that binary floats hold."""
    z, threshold = torch.arange(-128, 129, dtype=torch.float64) / 64, 0.25
    found, theirs = entries_shrunk(z, threshold), published(z, threshold)
    assert torch.equal(found == 0, z.abs() <= threshold)
    assert torch.equal(theirs == 0, z.abs() < 2 * threshold)

    def subgradient(of: Tensor) -> Tensor:
        return (z - of) / threshold

    # Optimal: (z - x) / λ is a subgradient of the L1 norm at x, the sign where x is not 0 and else at most 1.
    assert torch.equal(subgradient(found)[found != 0], found.sign()[found != 0])
    assert float(subgradient(found).abs().max()) == 1
    assert float(subgradient(theirs).abs().max()) == 2 - 1 / 16, "the published operator is a proximal map as well"
    z = draw(1000, seed=2)
    assert float((entries_shrunk(z, 0.3) - torch.nn.functional.softshrink(z, 0.3)).abs().max()) < 1e-15
    assert torch.equal(published(z, 0.3) == 0, z.abs() < 0.6)


def test_invariant_t2_it_does_not_depend_on_the_basis_and_a_gate_on_columns_does() -> None:
    B, A = draw(OUT, RANK, seed=1), draw(RANK, INTO, seed=2)
    T = draw(RANK, RANK, seed=3)
    turned = product_shrunk(B @ torch.linalg.inv(T), T @ A, 2.0) @ T @ A
    assert float((turned - slow(B, A, 2.0)).abs().max()) < 1e-9
    turn = torch.linalg.qr(T)[0]
    assert float((of_columns(B @ turn.T, 2.0) @ turn - of_columns(B, 2.0)).abs().max()) > 1e-2


def soft_round(
    job: Any, sites: list[AdapterState], weights: list[float], adapter: AdapterState, noise: float
) -> Tensor:
    before = ServerState(0, adapter, job.adapter.trained)
    parts = [Contribution(str(k), w, s) for k, (w, s) in enumerate(zip(weights, sites, strict=True))]
    averaged = job.strategy.combine(before, parts)
    return ruled_step(job, job.config, {}, before, averaged, noise).adapter["layer"][job.adapter.trained[0]]


def test_a_round_is_the_slow_threshold_of_the_weighed_mean_and_no_mean_of_thresholds() -> None:
    """Unequal weights, a server's rate, an A that is not orthonormal, a B that had a value: against whole products."""
    job = configure(PLAIN)
    adapter: AdapterState = {"layer": {"A": draw(RANK, INTO, seed=1), "B": draw(OUT, RANK, seed=2)}}
    weights, noise, rate = [100.0, 300.0, 50.0], 0.3, 0.5
    sites: list[AdapterState] = [{"layer": {"B": draw(OUT, RANK, seed=5 + k)}} for k in range(3)]
    found = soft_round(job, sites, weights, adapter, noise)
    mean = sum(w / 450 * s["layer"]["B"] for w, s in zip(weights, sites, strict=True))
    A, B = adapter["layer"]["A"], adapter["layer"]["B"]
    moved = B - rate * (B - mean)
    xi = rate * noise * edge_behind(OUT, torch.linalg.svdvals(A).tolist(), LEVEL)
    assert xi > 0.1 * float(torch.linalg.svdvals(moved @ A)[-1]), "nothing shrinks: nothing is proved"
    assert float((found @ A - slow(moved, A, xi)).abs().max()) < 1e-10
    # Planted: the threshold at the sites; that of a round at rate 1; of B alone.
    at_sites = sum(w / 450 * product_shrunk(s["layer"]["B"], A, xi) for w, s in zip(weights, sites, strict=True))
    for wrong in (B - rate * (B - at_sites), product_shrunk(moved, A, xi / rate)):
        assert float((found @ A - wrong @ A).abs().max()) > 1e-3


def test_noise_alone_stays_at_zero_and_a_smaller_edge_lets_it_through() -> None:
    """In 200 rounds of pure noise about one in twenty moves anything, in any of four layers; signal stays."""
    job = configure({**PLAIN, "server.optimizer": "none", "training.optimizer": "sgd", "training.local-steps": 1})
    gains = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64)
    A = torch.diag(gains) @ torch.linalg.qr(draw(INTO, RANK, seed=1))[0].T
    weights, noises = (0.5, 0.3, 0.2), (0.1, 0.2, 0.4)
    tau = sum((w * n) ** 2 for w, n in zip(weights, noises, strict=True)) ** 0.5
    layers = [f"layer{k}" for k in range(4)]
    before = {layer: {"B": torch.zeros(OUT, RANK).double()} for layer in layers}
    frozen: AdapterState = {layer: {"A": A} for layer in layers}
    moved, let_through = 0, 0
    for trial in range(200):
        noise = {
            layer: {
                "B": sum(
                    w * n * draw(OUT, RANK, seed=1 + 1000 * trial + 10 * k + j)
                    for j, (w, n) in enumerate(zip(weights, noises, strict=True))
                )
            }
            for k, layer in enumerate(layers)
        }
        kept = job.rule.step(before, noise, {}, Known(frozen, tau))  # type: ignore[arg-type]
        moved += any(bool(f["B"].abs().max() > 1e-12) for f in kept.values())
        lax = job.rule.step(before, noise, {}, Known(frozen, 0.7 * tau))  # type: ignore[arg-type]
        let_through += any(bool(f["B"].abs().max() > 1e-12) for f in lax.values())
    assert moved <= 20, f"{moved} of 200 rounds of noise alone moved the model"
    assert let_through > 100, "the planted edge of less noise is not told apart"
    strong = {layer: {"B": 40 * tau * draw(OUT, 1, seed=3) @ draw(1, RANK, seed=4)} for layer in layers}
    assert float(job.rule.step(before, strong, {}, Known(frozen, tau))["layer0"]["B"].norm()) > 10 * tau


def test_no_rule_moves_an_adapter_in_the_rounds_in_which_it_rests() -> None:
    job = configure({**PLAIN, "rounds": 3, "phases": "2 adapter+head on examples, 1 head on features"})
    held: AdapterState = {"layer": {"A": draw(RANK, INTO, seed=1), "B": draw(OUT, RANK, seed=2)}}
    mean: AdapterState = {"layer": {**held["layer"], "B": draw(OUT, RANK, seed=3)}}
    for done, rests in ((1, False), (2, True)):
        before = ServerState(done, held, ("B",))
        after = ruled_step(job, job.config, {}, before, replace(before, adapter=mean), 0.3).adapter["layer"]
        assert torch.equal(after["B"], held["layer"]["B"]) == rests


def test_the_level_of_a_threshold_is_divided_among_all_layers_of_a_round() -> None:
    job, layers = configure(PLAIN), [f"layer{k}" for k in range(3)]
    after: AdapterState = {layer: {"B": draw(OUT, RANK, seed=20 + k)} for k, layer in enumerate(layers)}
    frozen: AdapterState = {layer: {"A": draw(RANK, INTO, seed=30 + k)} for k, layer in enumerate(layers)}
    found = job.rule.step(after, after, {}, Known(frozen, 0.1))
    for layer in layers:
        A, B = frozen[layer]["A"], after[layer]["B"]
        xi = 0.1 * edge_behind(OUT, torch.linalg.svdvals(A).tolist(), LEVEL / 3)
        assert float((found[layer]["B"] @ A - slow(B, A, xi)).abs().max()) < 1e-10
    diagonals: AdapterState = {layer: {"z": draw(50, seed=40 + k)} for k, layer in enumerate(layers)}
    edge = 0.1 * NormalDist().inv_cdf(1 - LEVEL / (2 * 3 * 50))
    for layer, made in job.rule.step(diagonals, diagonals, {}, Known({}, 0.1)).items():
        assert torch.allclose(made["z"], torch.nn.functional.softshrink(diagonals[layer]["z"], edge))


def test_the_edge_behind_a_matrix_is_that_of_draws() -> None:
    for rows, gains in ((13, (1.0, 0.8, 0.3)), (3, (2.0, 1.0, 1.0, 0.5, 0.1)), (40, (5.0, 0.0))):
        drawn = torch.linalg.svdvals(draw(20_000, rows, len(gains), seed=8) * torch.tensor(gains).double())[:, 0]
        assert float((drawn > edge_behind(rows, gains, 0.05)).double().mean()) == pytest.approx(0.05, abs=0.02)
    assert edge_behind(13, (2.0, 2.0), 0.05) == pytest.approx(2 * noise_edge(13, 2, 0.05))


def test_the_edges_of_many_uneven_layers_are_passed_by_chance_as_often_as_they_say() -> None:
    layers, rank, passed = 100, 4, 0.0
    for layer in range(layers):
        gains = (0.3 + 0.7 * torch.rand(rank, generator=torch.Generator().manual_seed(layer)).double()).tolist()
        drawn = draw(6_000, rank, rank, seed=layer) * torch.tensor(gains).double()
        largest = torch.linalg.eigvalsh(drawn.mT @ drawn)[:, -1].sqrt()
        passed += float((largest > edge_behind(rank, gains, LEVEL / layers)).double().mean())
    assert passed == pytest.approx(LEVEL, rel=0.25)


def test_a_threshold_is_refused_where_it_means_nothing() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "fedavg-lora"}, r"shrinks all of B over a frozen A, or a diagonal"),
        ({"strategy": "fed-sb"}, r"shrinks all of B over a frozen A, or a diagonal"),
        ({"server.optimizer": "adam"}, r"needs a plain step of the server, and server\.optimizer 'adam'"),
        ({"server.momentum": 0.5}, r"needs a plain step of the server, and server\.optimizer 'momentum'"),
        ({"privacy.mode": "none"}, r"privacy\.mode 'none' has none: set soft-threshold\.threshold"),
        ({"training.local-steps": 4}, r"the noise of one plain step, and 4 local steps of sgd"),
        ({"server.optimizer": "none"}, r"the noise of one plain step, and 1 local steps of adam"),
        ({"strategy": "increlora"}, r"would move what rests"),
    ]
    for more, why in refused:
        with pytest.raises(ConfigError, match=why):
            configure({**PLAIN, **more})
    configure({**PLAIN, "privacy.mode": "none", "soft-threshold.threshold": 0.005})
    trusted = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 200, "privacy.delta": 1e-3}
    assert configure({**PLAIN, **trusted}).rule.name == "soft-threshold"
    with pytest.raises(ModelError, match=r"does not follow .* set soft-threshold\.threshold"):
        configure(PLAIN).rule.step({}, {"layer": {"B": draw(OUT, RANK)}}, {}, Known())
    job = configure({**PLAIN, "strategy": "fedavg-lora", "adapter.name": "lora-diagonal"})
    z = draw(50, seed=3)
    found = job.rule.step({}, {"layer": {"z": z}}, {}, Known({}, 0.1))["layer"]["z"]
    assert torch.allclose(found, torch.nn.functional.softshrink(z, 0.1 * NormalDist().inv_cdf(1 - LEVEL / 100)))


def test_t4_of_a_diagonal_noise_alone_is_kept_as_seldom_as_the_level_says() -> None:
    job = configure({**PLAIN, "strategy": "fedavg-lora", "adapter.name": "lora-diagonal"})
    draws = 0.1 * draw(4000, 50, seed=4)
    kept = [job.rule.step({}, {"layer": {"z": z}}, {}, Known({}, 0.1))["layer"]["z"].any() for z in draws]
    share = float(torch.stack(kept).double().mean())
    assert abs(share - LEVEL) < 4 * math.sqrt(LEVEL / 4000), f"{share:.3f} of noise is kept"


def test_a_threshold_runs_privately_and_what_noise_explains_does_not_move(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # By its own level noise moves something in one of twenty rounds.
    monkeypatch.setattr("fedveil.contrib.rules.soft_threshold.LEVEL", 1e-6)
    loud = {**toy_settings, **PLAIN, "rounds": 2, "privacy.noise-multiplier": 40.0, "adapter.start": "orthonormal"}
    loud |= {"training.local-steps": 1, "training.optimizer": "sgd"}
    folder = run_in_process(loud, 2)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    moved = [name for name, tensor in adapter.items() if "lora_B" in name and bool(tensor.any())]
    assert not moved, "what moved is noise"
    plain = load_file(run_in_process({**loud, "server.rule": "none"}, 2, "plain") / "adapter/adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in plain.items() if "lora_B" in name)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_rank_that_the_threshold_cuts_is_cut_in_the_export(
    kept: int, model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = LoRAFrozenA(RANK, 6.0, ("query", "intermediate.dense"), STARTS["orthonormal"]())

    def stock() -> Any:
        return load_base_model(model_folder("bert"), "classification").module

    model = attach(adapter, stock(), 1)
    state, first = read_factors(adapter, model), next(iter(layers_of(model)))
    for number, (layer, factors) in enumerate(state.items()):
        A, B = factors["A"].double(), draw(*factors["B"].shape, seed=number)
        values = torch.linalg.svdvals(B @ A)
        cut = float(values[kept - 1] + values[kept]) / 2 if layer == first else 0.0
        factors["B"] = product_shrunk(B, A, cut).float()
    assert bool(state[first]["B"].ne(0).all()), "no column is 0, and still the rank is lower"
    adapter.export(model, state, tmp_path / "cut", "base")
    ranks = PeftConfig.from_pretrained(tmp_path / "cut").rank_pattern  # type: ignore[attr-defined]
    assert {name.replace("\\", ""): rank for name, rank in ranks.items()} == {
        layer: kept if layer == first else RANK for layer in state
    }
    loaded = PeftModel.from_pretrained(stock(), tmp_path / "cut")
    for layer, held in layers_of(loaded).items():
        assert held.lora_A["default"].weight.shape[0] == (kept if layer == first else RANK)
        wanted = adapter.delta({name: t.double() for name, t in state[layer].items()})
        assert torch.allclose(held.get_delta_weight("default").double(), wanted, atol=1e-5)
    monkeypatch.setattr(lora_frozen_a, "in_own_basis", lambda factors: factors)
    adapter.export(model, state, tmp_path / "whole", "base")
    assert not PeftConfig.from_pretrained(tmp_path / "whole").rank_pattern  # type: ignore[attr-defined]


# --- all rules --------------------------------------------------------------------------------------------------------
FITTING: dict[str, dict[str, Any]] = {
    "none": {"strategy": "ffa-lora"},
    "lora-pro": {"strategy": "fedavg-lora"},
    "allora": {"strategy": "ffa-lora"},
    "align-guard": {"strategy": "ffa-lora", "model.task": "causal-lm", "head.policy": "frozen"},
    "soft-threshold": {**PLAIN, "soft-threshold.threshold": 0.1},
    "loraprune": {"strategy": "ffa-lora", "training.local-steps": 1, "training.optimizer": "sgd"},
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_leaves_head_and_frozen_factors_and_comes_back_from_its_settings(name: str) -> None:
    job = configure({**FITTING[name], "server.rule": name})
    assert configure(job.settings()) == job
    trained = job.adapter.trained
    adapter = {"layer": {"A": draw(RANK, INTO), "B": draw(OUT, RANK, seed=1)}, HEAD: {"weight": draw(2, 5)}}
    before = ServerState(0, adapter, trained)
    moved = {
        "layer": {n: t - 0.1 * draw(*t.shape, seed=5) if n in trained else t for n, t in adapter["layer"].items()},
        HEAD: {"weight": adapter[HEAD]["weight"] + 1},
    }
    averaged = replace(before, adapter=moved, round_number=1)
    pulls = guarded(draw(4, OUT * RANK), 2, 1.0).reshape(-1, OUT, RANK)
    measured = {"layer": {"B": pulls}} if name == "align-guard" else {}
    plain, after = server_step(job.config, before, averaged), ruled_step(job, job.config, measured, before, averaged)
    assert torch.equal(plain.adapter[HEAD]["weight"], after.adapter[HEAD]["weight"])
    same = [torch.equal(plain.adapter["layer"][n], after.adapter["layer"][n]) for n in ("A", "B")]
    assert same == [name != "lora-pro", name in ("none", "loraprune")]
    assert after.round_number == 1


def test_what_takes_turns_or_lets_columns_rest_is_refused_where_a_rule_would_move_it() -> None:
    with pytest.raises(ConfigError, match="trains them in turns"):
        configure({"strategy": "rolora", "server.rule": "lora-pro"})
    words = {"model.task": "causal-lm", "head.policy": "frozen"}
    with pytest.raises(ConfigError, match="columns that strategy 'increlora' lets rest are to stay"):
        configure({"strategy": "increlora", "server.rule": "align-guard", **words})
    with pytest.raises(ConfigError, match="would move what rests"):
        configure({"strategy": "increlora", "server.rule": "allora"})


def test_a_bound_on_noise_and_a_rule_that_lengthens_it_do_not_go_together() -> None:
    bound = {"server.optimizer": "momentum", "server.most-noise": 0.1}
    with pytest.raises(ConfigError, match=r"server\.most-noise bounds what noise does through a plain step"):
        configure({"strategy": "ffa-lora", "server.rule": "allora", **bound})


def test_options_of_another_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"allora\.eta cannot be set: .* set server\.rule to 'allora', or leave"):
        configure({"strategy": "ffa-lora", "allora.eta": 3.0})
    with pytest.raises(ConfigError, match=r"server\.rule is 'lora-por'; choose one of none, lora-pro"):
        configure({"server.rule": "lora-por"})


def test_a_row_more_is_all_that_a_rule_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(ServerRule):
        """Nothing moves."""

        name, paper = "still", "nobody"

        def step(self, before: AdapterState, after: AdapterState, measured: AdapterState, known: Known) -> AdapterState:
            return before

    monkeypatch.setitem(RULES, Still.name, Still)
    job = configure({"strategy": "ffa-lora", "server.rule": "still"})
    adapter = {"layer": {"A": draw(RANK, INTO), "B": draw(OUT, RANK, seed=1)}}
    before = ServerState(0, adapter, ("B",))
    averaged = replace(before, adapter={"layer": {**adapter["layer"], "B": draw(OUT, RANK, seed=2)}})
    assert torch.equal(ruled_step(job, job.config, {}, before, averaged).adapter["layer"]["B"], adapter["layer"]["B"])
    make: Callable[[], ServerRule] = Still
    assert make().name == "still"

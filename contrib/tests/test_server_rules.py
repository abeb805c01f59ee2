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
from safetensors.torch import load_file
from torch import Tensor, nn

from fedveil.client.ledger.ledger import Ledger
from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.errors import ConfigError, DataError, ModelError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.nulls import LEVEL, edge_behind, noise_edge
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.contrib.rules.align_guard import AlignGuard, guarded
from fedveil.contrib.rules.allora import row_factors
from fedveil.contrib.rules.lora_pro import LoRAPro, tangent_step
from fedveil.contrib.rules.soft_threshold import entries_shrunk, product_shrunk
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.server.model import ServerModel
from fedveil.server.optimizer import server_step
from fedveil.server.ruled import ruled_step
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.job import configure
from fedveil.strategies.rules import RULES, ServerRule
from fedveil.strategies.rules.base import Known

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

OUT, INTO, RANK = 13, 9, 3
S = 1.7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projected(G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return P_B G + (I - P_B) G P_A."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + G @ P_A - P_B @ G @ P_A


@pytest.fixture
def factors() -> tuple[Tensor, Tensor, Tensor]:
    return draw(OUT, INTO, seed=1), draw(RANK, INTO, seed=2), draw(OUT, RANK, seed=3)


def lora_pro(G: Tensor, A: Tensor, B: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return tangent_step(S * B.T @ G, S * G @ A.T, A, B, S, damping)


# --- LoRA-Pro ---------------------------------------------------------------------------------------------------------


def test_invariant_37_the_equivalent_gradient_is_the_tangent_projection_for_any_x(
    factors: tuple[Tensor, Tensor, Tensor],
) -> None:
    G, A, B = factors
    a, b, D = lora_pro(G, A, B)
    assert (D - projected(G, A, B)).abs().max() < 1e-10
    for seed in (7, 17):
        X = draw(RANK, RANK, seed=seed)
        assert (S * (B @ (a + X @ A) + (b - B @ X) @ A) - D).abs().max() < 1e-10
    # The pair is the authors' own, at the X under which a moves nothing that A reaches.
    g_a, g_b = S * B.T @ G, S * G @ A.T
    first = torch.linalg.solve(B.T @ B, g_a) / S**2
    second = (g_b - B @ torch.linalg.pinv(B) @ g_b) @ torch.linalg.inv(A @ A.T) / S**2
    X = -first @ torch.linalg.pinv(A)
    assert (first + X @ A - a).abs().max() < 1e-10
    assert (second - B @ X - b).abs().max() < 1e-10
    # Whatever basis the product is written in.
    T = draw(RANK, RANK, seed=8)
    assert (lora_pro(G, T @ A, B @ torch.linalg.inv(T))[2] - D).abs().max() < 1e-8
    # Planted: X of another sign in one factor, and the plain gradients as they are.
    assert (S * (B @ (a + X @ A) + (b + B @ X) @ A) - D).abs().max() > 1e-2
    assert (S * (B @ g_a + g_b @ A) - D).abs().max() > 1e-2


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_invariant_37_x_solves_its_sylvester_equation_and_is_the_minimiser_with_noise_too(
    noise: float, damping: float, factors: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Of ``‖a - g_A‖² + ‖b - g_B‖²`` over X; with noise g_A Aᵀ differs from Bᵀ g_B, and the right side has both."""
    G, A, B = factors
    g_a = S * B.T @ G + noise * draw(RANK, INTO, seed=4)
    g_b = S * G @ A.T + noise * draw(OUT, RANK, seed=5)
    a, b, D = tangent_step(g_a, g_b, A, B, S, damping)
    left, right = B.T @ B, A @ A.T
    eye = torch.eye(RANK, dtype=torch.float64)
    operator = torch.kron(left.contiguous(), eye) + torch.kron(eye, right.T.contiguous())

    def solved(wanted: Tensor) -> Tensor:
        """Return X of Bᵀ B X + X A Aᵀ = ``wanted``."""
        return torch.linalg.solve(operator, wanted.flatten()).reshape(RANK, RANK)

    def cost(X: Tensor) -> Tensor:
        return (a + X @ A - g_a).square().sum() + (b - B @ X - g_b).square().sum()

    X = solved(B.T @ b - a @ A.T + (g_a @ A.T - B.T @ g_b)).requires_grad_(True)
    (slope,) = torch.autograd.grad(cost(X), [X])
    assert slope.abs().max() < 1e-8
    X = X.detach()
    assert (S * (B @ (a + X @ A) + (b - B @ X) @ A) - D).abs().max() < 1e-8
    assert float(cost(X)) <= float(cost(torch.zeros_like(X)))
    without = solved(B.T @ b - a @ A.T)
    assert (float(cost(without) - cost(X)) > 1e-3) == bool(noise), "the extra term is not told apart"
    if not noise and not damping:  # as published: Bᵀ B X + X A Aᵀ = -s⁻² (Bᵀ B)⁻¹ g_A Aᵀ
        first = torch.linalg.solve(left, g_a) / S**2
        assert (first + solved(-first @ A.T) @ A - a - X @ A).abs().max() < 1e-8


def test_invariant_38_clean_and_undamped_it_is_the_tangent_projection_and_its_factors_reproduce_it(
    factors: tuple[Tensor, Tensor, Tensor],
) -> None:
    G, A, B = factors
    a, b, D = lora_pro(G, A, B)
    assert (D - projected(G, A, B)).abs().max() < 1e-8
    assert (S * (B @ a + b @ A) - D).abs().max() < 1e-8
    # Of deficient rank what no factor reaches stays where it is.
    deficient = B @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    a, b, D = lora_pro(G, A, deficient)
    assert (D - projected(G, A, deficient)).abs().max() < 1e-8
    assert (S * (deficient @ a + b @ A) - D).abs().max() < 1e-8
    Q, _ = torch.linalg.qr(draw(RANK, RANK, seed=9))
    turned = lora_pro(G, Q @ A, B @ Q.T, damping=0.3)
    kept = lora_pro(G, A, B, damping=0.3)
    assert (turned[2] - kept[2]).abs().max() < 1e-8, "it depends on the factors' basis"
    assert (Q.T @ turned[0] - kept[0]).abs().max() < 1e-8
    assert (turned[1] @ Q - kept[1]).abs().max() < 1e-8


def test_invariant_38_at_b_zero_noise_is_damped_lora_fa_and_finite(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    _, A, B = factors
    g_a, g_b = draw(RANK, INTO, seed=11), draw(OUT, RANK, seed=12)
    damping = 0.3
    wanted = g_b @ torch.linalg.inv(A @ A.T + damping * torch.eye(RANK, dtype=torch.float64)) @ A / S
    a, b, D = tangent_step(g_a, g_b, A, torch.zeros_like(B), S, damping)
    assert (D - wanted).abs().max() < 1e-8
    assert (S * b @ A - D).abs().max() < 1e-8
    assert a.abs().max() <= g_a.abs().max() * RANK / (S**2 * damping)
    near = tangent_step(g_a, g_b, A, 1e-9 * B, S, damping)
    assert (near[2] - D).abs().max() < 1e-6
    assert near[0].abs().max() <= g_a.abs().max() * RANK / (S**2 * damping)
    # The authors' form, planted: what it makes of the noise of A alone is beyond all bounds.
    published = torch.linalg.solve(B.T @ B * 1e-18 + 1e-8 * torch.eye(RANK, dtype=torch.float64), g_a) / S**2
    assert published.abs().max() > 1e6


def posterior(g_a: Tensor, g_b: Tensor, A: Tensor, B: Tensor, spread: float, noise: float) -> Tensor:
    """Return the mean of G given both gradients, if its numbers are independent and normal: by one dense inverse."""
    rows, columns = torch.eye(OUT, dtype=torch.float64), torch.eye(INTO, dtype=torch.float64)
    views = S * torch.cat([torch.kron(B.T.contiguous(), columns), torch.kron(rows, A)])
    seen = torch.cat([g_a.flatten(), g_b.flatten()])
    covariance = spread**2 * views @ views.T + noise**2 * torch.eye(len(seen), dtype=torch.float64)
    return (spread**2 * views.T @ torch.linalg.solve(covariance, seen)).reshape(OUT, INTO)


@pytest.mark.parametrize("lacking", ["none", "B", "A", "all of A"])
def test_invariant_38_the_damping_of_a_private_run_is_that_of_the_best_guess_of_a_normal_gradient(
    lacking: str, factors: tuple[Tensor, Tensor, Tensor]
) -> None:
    G, A, B = factors
    if lacking == "B":
        B[:, 2] = 2 * B[:, 0]
    if lacking == "A":
        A[2] = 2 * A[0]
    if lacking == "all of A":
        A.zero_()
    noise, rule = 0.4, LoRAPro(signal=0.7)
    held, clean = {"A": A, "B": B}, {"A": S * B.T @ G, "B": S * G @ A.T}
    noised = {"A": clean["A"] + noise * draw(RANK, INTO, seed=4), "B": clean["B"] + noise * draw(OUT, RANK, seed=5)}

    def moved(change: dict[str, Tensor]) -> Tensor:
        return S * (B @ change["A"] + change["B"] @ A)

    wanted = posterior(noised["A"], noised["B"], A, B, 0.7 * noise, noise)
    assert (moved(rule.change(noised, held, S, noised=True)) - wanted).abs().max() < 1e-8
    assert (moved(rule.change(clean, held, S, noised=False)) - projected(G, A, B)).abs().max() < 1e-8
    # Planted: a damping without the scale, of the root, and of the inverse ratio.
    for wrong in (0.7**-2, 1 / (S * 0.7), (0.7 / S) ** 2):
        assert (tangent_step(noised["A"], noised["B"], A, B, S, wrong)[2] - wanted).abs().max() > 1e-3


def test_lora_pro_has_less_error_than_the_projection_where_b_is_small() -> None:
    """Mean squared error of the tangent gradient over 40 draws of noise, B times 1, 0.1 and 0.001."""
    A, B0 = draw(RANK, INTO, seed=2), draw(OUT, RANK, seed=3)
    for times in (1.0, 0.1, 0.001):
        B, errors = times * B0, torch.zeros(2)
        for k in range(40):
            G = draw(OUT, INTO, seed=100 + k)
            g_a, g_b = S * B.T @ G + draw(RANK, INTO, seed=200 + k), S * G @ A.T + draw(OUT, RANK, seed=300 + k)
            for i, damping in enumerate((1 / S**2, 0.0)):
                D = tangent_step(g_a, g_b, A, B, S, damping)[2]
                errors[i] += float((D - projected(G, A, B)).square().sum()) / 40
        assert errors[0] < errors[1]
        assert times == 1.0 or errors[1] > 3 * errors[0]


def test_invariant_39_with_a_frozen_orthonormal_a_it_would_be_a_constant_factor_and_is_refused(
    factors: tuple[Tensor, Tensor, Tensor],
) -> None:
    G, A, _ = factors
    A = torch.linalg.qr(A.T)[0].T
    g_b = S * G @ A.T
    damped = tangent_step(torch.zeros(RANK, INTO, dtype=torch.float64), g_b, A, torch.zeros(OUT, RANK).double(), S, 0.5)
    assert (damped[1] - g_b / (S**2 * 1.5)).abs().max() < 1e-12
    for strategy in ("ffa-lora", "fed-svd", "fed-sb"):
        with pytest.raises(ConfigError, match=r"joins the gradients of A and B.*a rate alone"):
            configure({"strategy": strategy, "server.rule": "lora-pro"})
    with pytest.raises(ConfigError, match=r"takes a change for a gradient.*16 local steps of adam"):
        configure({"strategy": "fedavg-lora", "server.rule": "lora-pro", "privacy.mode": "none"})
    assert configure({"strategy": "fedavg-lora", "server.rule": "lora-pro"}).rule.name == "lora-pro"


# --- ALLoRA -----------------------------------------------------------------------------------------------------------


def noised_sum(x: Tensor, y: Tensor, A: Tensor, clip: float, patch: pytest.MonkeyPatch) -> Tensor:
    """Return what the mechanism adds noise to, in a step on a B of zeros behind A."""
    seen: list[Tensor] = []

    def noised(total: Tensor, std: float) -> Tensor:
        del std
        seen.append(total.double().clone())
        return total.double()

    layer = nn.Linear(RANK, OUT, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    patch.setattr(dpsgd, "add_private_noise", noised)
    plan = gaussian_plan(clip, 1.0, 1.0, 1.0, 1e-5, 50.0)
    with PrivateSteps(layer, torch.optim.SGD([layer.weight], 0.0), plan) as steps:
        steps.step([{"x": x, "y": y}], lambda batch: (layer(batch["x"] @ A.T) - batch["y"]).square().sum(1))
    return seen[0]


def test_invariant_40_a_record_moves_what_is_noised_by_one_clip_and_a_build_that_scales_first_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A, x, y, clip, eta = draw(RANK, INTO), draw(6, INTO, seed=2), 9 * draw(6, OUT, seed=3), 0.7, 2.0

    def moved() -> float:
        whole, rest = (noised_sum(x[:count], y[:count], A, clip, monkeypatch) for count in (6, 5))
        return float((whole - rest).norm())

    assert moved() == pytest.approx(clip, rel=1e-5), "the record is longer than the clip, so the bound is attained"
    real = dpsgd.ClipAndNoise.noised

    def scaled(self: Any, parameter: Any, *own: Any) -> Tensor:
        parameter.summed_grad = row_factors(parameter.detach().double(), eta)[:, None] * parameter.summed_grad
        return real(self, parameter, *own)

    monkeypatch.setattr(dpsgd.ClipAndNoise, "noised", scaled)
    assert moved() == pytest.approx(clip * eta, rel=1e-5), "between clip and noise the factor goes unnoticed"


def test_invariant_40_rows_step_by_their_own_length_behind_the_servers_adam_and_nothing_else_does() -> None:
    adam = {"server.optimizer": "adam", "server.learning-rate": 0.05, "server.adam-tau": 1e-9}
    job = configure({"strategy": "ffa-lora", "server.rule": "allora", "allora.eta": 1.6, **adam})
    A, B = draw(RANK, INTO, seed=1), draw(OUT, RANK, seed=2)
    B[4], B[:, 2] = 0, B[:, 0]  # a row that is still at 0, and no full rank
    head = {"weight": draw(2, 5)}
    before = job.strategy.start({"layer": {"A": A, "B": B}, HEAD: head}, ("B",))
    parts = [
        Contribution(str(k), w, {"layer": {"B": B + draw(OUT, RANK, seed=9 + k)}, HEAD: {"weight": draw(2, 5, seed=k)}})
        for k, w in enumerate((5.0, 3.0, 2.0))
    ]
    averaged = job.strategy.combine(before, parts)
    plain, ruled = server_step(job.config, before, averaged), ruled_step(job, job.config, {}, before, averaged)
    factors = [1 / (float(row.norm()) + 1.6**-2) ** 0.5 for row in B]
    assert factors[4] == pytest.approx(1.6)
    assert max(f for i, f in enumerate(factors) if i != 4) < 1.6
    steps = plain.adapter["layer"]["B"] - B
    found = ruled.adapter["layer"]["B"]
    for i, f in enumerate(factors):
        assert float((found[i] - B[i] - f * steps[i]).abs().max()) < 1e-12
    assert torch.equal(ruled.adapter["layer"]["A"], A)
    assert torch.equal(ruled.adapter[HEAD]["weight"], plain.adapter[HEAD]["weight"])
    # Planted: in front of Adam, which divides the factor out.
    scaled = B + torch.tensor(factors, dtype=torch.float64)[:, None] * (averaged.adapter["layer"]["B"] - B)
    layer = {**averaged.adapter["layer"], "B": scaled}
    planted = server_step(job.config, before, replace(averaged, adapter={**averaged.adapter, "layer": layer}))
    assert float((planted.adapter["layer"]["B"] - plain.adapter["layer"]["B"]).abs().max()) < 1e-6
    assert float((planted.adapter["layer"]["B"] - found).abs().max()) > 1e-3


def test_invariant_41_a_scale_is_refused_and_a_turn_of_the_basis_changes_nothing() -> None:
    with pytest.raises(ConfigError, match=r"no scale, and adapter\.alpha 16 makes it 2: set adapter\.alpha to 8"):
        configure({"strategy": "ffa-lora", "server.rule": "allora", "adapter.alpha": 16.0})
    with pytest.raises(ConfigError, match="rows of B trained from 0"):
        configure({"strategy": "fed-sb", "server.rule": "allora"})
    adapter = configure({"strategy": "fed-svd", "server.rule": "allora"}).adapter
    assert adapter.peft_config().lora_alpha == adapter.peft_config().r == 8
    Q, _ = torch.linalg.qr(draw(RANK, RANK))
    B = draw(OUT, RANK, seed=2)
    assert (row_factors(B @ Q, 2.0) - row_factors(B, 2.0)).abs().max() < 1e-12


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


def published(z: Tensor, threshold: float) -> Tensor:
    """Return what SoRA's code makes: shrunk by ξ, and then what is below ξ dropped."""
    once = entries_shrunk(z, threshold)
    return torch.where(once.abs() < threshold, 0.0, once)


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

    model = adapter.attach(stock(), 1)
    state, first = adapter.read(model), next(iter(adapter.layers(model)))
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
    for layer, held in adapter.layers(loaded).items():
        assert held.lora_A["default"].weight.shape[0] == (kept if layer == first else RANK)
        wanted = adapter.delta({name: t.double() for name, t in state[layer].items()})
        assert torch.allclose(held.get_delta_weight("default").double(), wanted, atol=1e-5)
    monkeypatch.setattr(LoRAFrozenA, "reduced", lambda own, state: state)
    adapter.export(model, state, tmp_path / "whole", "base")
    assert not PeftConfig.from_pretrained(tmp_path / "whole").rank_pattern  # type: ignore[attr-defined]


# --- all rules --------------------------------------------------------------------------------------------------------

FITTING: dict[str, dict[str, Any]] = {
    "none": {"strategy": "ffa-lora"},
    "lora-pro": {"strategy": "fedavg-lora"},
    "allora": {"strategy": "ffa-lora"},
    "align-guard": {"strategy": "ffa-lora", "model.task": "causal-lm", "head.policy": "frozen"},
    "soft-threshold": {**PLAIN, "soft-threshold.threshold": 0.1},
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
    assert same == [name in ("none", "allora", "align-guard", "soft-threshold"), name == "none"]
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


def test_lora_pro_runs_privately_and_its_adapter_is_exported(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "fedavg-lora", "server.rule": "lora-pro", "server.optimizer": "momentum", "rounds": 2}
    plain = {"training.local-steps": 1, "training.optimizer": "sgd", "server.learning-rate": 0.5}
    folder = run_in_process({**toy_settings, **own, **plain}, 2)
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [1, 2]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


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

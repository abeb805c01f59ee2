"""LoRA-Pro at the server: invariants 37 to 41."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rule_states import INTO, OUT, RANK, draw
from torch import Tensor, nn

from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import HEAD
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.contrib.rules.allora import row_factors
from fedveil.contrib.rules.lora_pro import LoRAPro, tangent_step
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.server.optimizer import server_step
from fedveil.server.ruled import ruled_step
from fedveil.strategies import Contribution
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]


S = 1.7


def projected(G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return P_B G + (I - P_B) G P_A."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + G @ P_A - P_B @ G @ P_A


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
    with pytest.raises(ConfigError, match=r"needs training\.local-steps 1, because it takes a change for a gradient"):
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


def test_lora_pro_runs_privately_and_its_adapter_is_exported(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "fedavg-lora", "server.rule": "lora-pro", "server.optimizer": "momentum", "rounds": 2}
    plain = {"training.local-steps": 1, "training.optimizer": "sgd", "server.learning-rate": 0.5}
    folder = run_in_process({**toy_settings, **own, **plain}, 2)
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [1, 2]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()

"""Fed-SB: rows S1 to S7 of the invariants, in float64 on layers that are not square."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.adapters import LoRASB
from common.adapters.lora_sb import leading_singular_triple
from common.errors import ConfigError
from strategies import Contribution, mean
from strategies.fed_sb import FedSB, gradient_basis

OUT, IN, RANK = 7, 12, 3
ADAPTER = LoRASB(RANK, 16.0, ("x",), "orthonormal")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(seed: int = 0) -> dict[str, Tensor]:
    B = torch.linalg.qr(draw(OUT, RANK, seed=seed))[0]
    A = torch.linalg.qr(draw(IN, RANK, seed=seed + 1))[0].T.contiguous()
    return {"B": B, "A": A, "R": torch.zeros(RANK, RANK, dtype=torch.float64)}


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_s1_the_mean_of_r_is_the_mean_of_the_weights(weights: list[float], seed: int) -> None:
    start = basis(seed)
    strategy = FedSB()
    sites = [Contribution(str(k), w, {"l": {"R": draw(RANK, RANK, seed=seed + 7 * k)}}) for k, w in enumerate(weights)]
    state = strategy.server_update(strategy.start({"l": start}), sites)
    exact = sum(
        w / sum(weights) * ADAPTER.delta({**start, "R": site.state["l"]["R"]})
        for w, site in zip(weights, sites, strict=True)
    )
    assert (ADAPTER.delta(state.adapter["l"]) - exact).abs().max() < 1e-12
    assert torch.equal(state.adapter["l"]["A"], start["A"])
    assert torch.equal(state.adapter["l"]["B"], start["B"])


@pytest.mark.parametrize("sign", [True, False])
def test_s2_b_and_a_are_orthonormal(sign: bool) -> None:
    made = gradient_basis(draw(OUT, IN, seed=3), RANK, 1e-3, sign=sign)
    eye = torch.eye(RANK, dtype=torch.float64)
    assert (made["B"].T @ made["B"] - eye).abs().max() < 1e-12
    assert (made["A"] @ made["A"].T - eye).abs().max() < 1e-12


def test_s3_the_published_start_is_the_best_rank_r_sign_step() -> None:
    G, step = draw(OUT, IN, seed=4), 0.02
    made = gradient_basis(G, RANK, step, sign=True)
    D = -step * torch.sign(G)
    tail = torch.linalg.svdvals(D)[RANK:].pow(2).sum().sqrt()
    residual = (D - ADAPTER.delta(made)).norm()
    assert float(residual) == pytest.approx(float(tail), rel=1e-10)
    assert torch.equal(made["R"], torch.diag(torch.diagonal(made["R"])))


def test_s3_alpha_cancels() -> None:
    factors = {**basis(), "R": draw(RANK, RANK, seed=5)}
    other = LoRASB(RANK, float(RANK), ("x",), "orthonormal")
    assert torch.equal(ADAPTER.delta(factors), other.delta(factors))
    assert ADAPTER.scaling == other.scaling == 1.0


def test_the_noised_start_drops_the_sign_and_starts_at_zero() -> None:
    G = draw(OUT, 1, seed=6) @ draw(1, IN, seed=7)
    made = gradient_basis(G, 1, 1e-3, sign=False)
    assert (made["R"] == 0).all()
    assert abs(float((made["B"][:, 0] @ G[:, 0]) / G[:, 0].norm())) == pytest.approx(1.0, abs=1e-12)


def test_s4_the_first_step_is_the_projected_gradient() -> None:
    factors, G, rate = basis(8), draw(OUT, IN, seed=9), 0.3
    R = torch.zeros(RANK, RANK, dtype=torch.float64, requires_grad=True)
    (ADAPTER.delta({**factors, "R": R}) * G).sum().backward()
    assert R.grad is not None
    change = ADAPTER.delta({**factors, "R": -rate * R.grad})
    wanted = -rate * factors["B"] @ factors["B"].T @ G @ factors["A"].T @ factors["A"]
    assert (change - wanted).abs().max() < 1e-10


def test_s5_noise_on_r_enters_the_weights_at_its_own_norm() -> None:
    X = draw(RANK, RANK, seed=10)
    assert float(ADAPTER.delta({**basis(), "R": X}).norm()) == pytest.approx(float(X.norm()), rel=1e-12)


def test_s6_a_round_uses_only_its_own_sites() -> None:
    strategy = FedSB()
    state = strategy.start({"l": basis()})
    for round_number in range(3):
        sites = [
            Contribution(str(k), 1.0 + k, {"l": {"R": draw(RANK, RANK, seed=10 * round_number + k)}}) for k in (0, 1)
        ]
        state = strategy.server_update(state, sites)
        assert torch.equal(state.adapter["l"]["R"], mean(sites)["l"]["R"])


def test_s7_raw_private_gradients_are_refused_under_privacy() -> None:
    with pytest.raises(ConfigError, match="raw gradients of private records"):
        FedSB(init="private-gradient").check(private=True)
    FedSB(init="private-gradient").check(private=False)
    with pytest.raises(ConfigError, match=r"needs fed-sb\.init-data"):
        FedSB(init="public-gradient").check(private=True)
    with pytest.raises(ConfigError, match="without privacy use 'private-gradient'"):
        FedSB(init="dp-gradient").check(private=False)


def test_singular_vectors_have_fixed_signs() -> None:
    matrix = draw(OUT, IN, seed=11)
    U, S, Vt = leading_singular_triple(matrix, RANK)
    flipped = leading_singular_triple(matrix.clone() * 1.0, RANK)
    assert torch.equal(U, flipped[0])
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    full = torch.linalg.svd(matrix, full_matrices=False)
    assert (U * S @ Vt - full.U[:, :RANK] * full.S[:RANK] @ full.Vh[:RANK]).abs().max() < 1e-12


def test_only_gradient_starts_send_a_basis() -> None:
    state = FedSB().start({"l": basis()})
    assert FedSB().basis(state) == {}
    assert set(FedSB(init="dp-gradient").basis(state)["l"]) == {"A", "B"}

"""Aggregation neighbours: invariants X1, X2 and X7, against slow sums of whole products, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import strategies.merging
from common.adapters import LoRAMerged
from common.adapters.lora_merged import pair_of
from common.messages.state import AdapterState, Factors
from common.messages.tensors import merge
from strategies import Contribution, ServerState, Strategy
from strategies.fedex_lora import FedExLoRA
from strategies.flora import FLoRA

OUT, INTO, RANK = 9, 6, 2
SHARES = (0.5, 0.3, 0.2)
MERGING: tuple[Strategy, ...] = (FedExLoRA(), FLoRA())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begun(seed: int = 1) -> AdapterState:
    """Return a layer that is not square, with a D that earlier rounds have left."""
    return {
        "layer": {
            "A": normal(RANK, INTO, seed=seed),
            "B": normal(OUT, RANK, seed=seed + 1),
            "D": normal(OUT, INTO, seed=seed + 2),
        }
    }


def sites(of: Sequence[Factors]) -> list[Contribution]:
    return [Contribution(f"{k}", 100 * p, {"layer": f}) for k, (p, f) in enumerate(zip(SHARES, of, strict=True))]


def trained(seed: int) -> Factors:
    B = normal(OUT, RANK, seed=seed)
    B[:, 1] = 2 * B[:, 0]  # without full rank
    return {"A": normal(RANK, INTO, seed=seed + 50), "B": B}


def weight(state: AdapterState) -> Tensor:
    return LoRAMerged(RANK, 3.0, ()).delta(state["layer"])


@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_x1_x2_the_new_weights_are_the_mean_of_the_sites_over_rounds(strategy: Strategy) -> None:
    state = strategy.start(begun(), ("A", "B"))
    for number in (10, 20, 30):
        factors = [trained(number + k) for k in range(3)]
        models = [weight(merge(state.adapter, {"layer": own})) for own in factors]
        state = strategy.server_update(state, sites(factors))
        wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
        assert float((weight(state.adapter) - wanted).abs().max()) < 1e-12
    stacked_b = torch.cat([own["B"] for own in factors], 1)
    stacked_a = torch.cat([p * own["A"] for p, own in zip(SHARES, factors, strict=True)])
    product = sum((p * own["B"] @ own["A"] for p, own in zip(SHARES, factors, strict=True)), torch.zeros(()))
    assert float((stacked_b @ stacked_a - product).abs().max()) < 1e-12
    twice = torch.cat([p * own["B"] for p, own in zip(SHARES, factors, strict=True)], 1) @ stacked_a
    assert float((twice - product).abs().max()) > 0.1, "shares on both factors would be seen"


def test_x1_a_covariance_that_is_left_out_or_taken_about_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [trained(10 + k) for k in range(3)]
    state = FedExLoRA().start(begun(), ("A", "B"))
    models = [weight(merge(state.adapter, {"layer": own})) for own in factors]
    wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
    monkeypatch.setattr(strategies.merging, "_covariance", lambda *_: normal(OUT, INTO, seed=1) * 0)
    left_out = FedExLoRA().server_update(state, sites(factors))
    assert float((weight(left_out.adapter) - wanted).abs().max()) > 0.1


def test_flora_begins_every_round_with_the_model_as_it_was_and_nothing_of_the_factors() -> None:
    state = FLoRA().start(begun(), ("A", "B"))
    first = FLoRA().server_update(state, sites([trained(k) for k in range(3)]))
    again = FLoRA().server_update(replace(first, round_number=0), sites([first.adapter["layer"]] * 3))
    assert float(first.adapter["layer"]["B"].abs().max()) == 0
    assert torch.allclose(weight(first.adapter), weight(again.adapter), atol=1e-12)
    second = FLoRA().settle(replace(first, round_number=2))
    assert not torch.allclose(first.adapter["layer"]["A"], second.adapter["layer"]["A"]), "A is drawn by the round"
    assert torch.equal(FLoRA().settle(first).adapter["layer"]["A"].norm(), first.adapter["layer"]["A"].norm())


def test_x7_stacking_carries_k_times_the_quadratic_noise_of_averaged_factors() -> None:
    count, draws = 4, 400
    share, generator = 1 / count, torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stacked = averaged = 0.0
    for _ in range(draws):
        A, B = noise(count, RANK, INTO), noise(count, OUT, RANK)
        stacked += float((share * torch.bmm(B, A).sum(0)).square().sum())
        averaged += float((B.mean(0) @ A.mean(0)).square().sum())
    assert stacked / averaged == pytest.approx(count, rel=0.15)
    assert stacked / draws == pytest.approx(OUT * INTO * RANK * count * share**2, rel=0.1)


def test_the_exported_pair_has_the_rank_of_the_change_and_nothing_has_rank_one() -> None:
    state: ServerState = FedExLoRA().start(begun(), ("A", "B"))
    delta = weight(state.adapter)
    pair = pair_of(delta)
    assert (pair["B"].shape, pair["A"].shape) == ((OUT, INTO), (INTO, INTO))
    assert torch.allclose(pair["B"] @ pair["A"], delta, atol=1e-12)
    low = normal(OUT, RANK, seed=4) @ normal(RANK, INTO, seed=5)
    assert pair_of(low)["A"].shape == (RANK, INTO)
    assert pair_of(0 * delta)["A"].shape == (1, INTO)

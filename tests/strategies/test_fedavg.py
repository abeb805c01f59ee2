"""FedAvg-LoRA: its aggregation error is exactly a covariance of the factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedveil.common.adapters import LoRA
from fedveil.common.messages.state import AdapterState
from fedveil.strategies.fedavg import FedAvgLoRA
from fedveil.strategies.state import Contribution

fast = settings(max_examples=25, deadline=None)
LAYERS = {"q": (7, 5), "v": (4, 9)}
RANK = 2


def sites(count: int, seed: int, *, same: str = "") -> list[Contribution]:
    """Return random contributions of unequal weights; factor ``same`` is equal at every site."""
    generator = torch.Generator().manual_seed(seed)

    def state() -> AdapterState:
        return {
            layer: {
                "A": torch.randn(RANK, into, generator=generator, dtype=torch.float64),
                "B": torch.randn(out, RANK, generator=generator, dtype=torch.float64),
            }
            for layer, (out, into) in LAYERS.items()
        }

    states = [state() for _ in range(count)]
    for other in states[1:]:
        for layer in LAYERS if same else ():
            other[layer][same] = states[0][layer][same]
    return [Contribution(f"site-{k}", 100.0 * (k + 1), s) for k, s in enumerate(states)]


def shares(contributions: list[Contribution]) -> list[float]:
    total = sum(c.weight for c in contributions)
    return [c.weight / total for c in contributions]


def aggregate(contributions: list[Contribution]) -> AdapterState:
    strategy = FedAvgLoRA()
    return strategy.server_update(strategy.start(contributions[0].state, ("A", "B")), contributions).adapter


def error(contributions: list[Contribution], layer: str) -> Tensor:
    """Return ``sum p_k B_k A_k`` minus the product that the server has after averaging."""
    wanted = torch.zeros(LAYERS[layer], dtype=torch.float64)
    for p, c in zip(shares(contributions), contributions, strict=True):
        wanted += p * c.state[layer]["B"] @ c.state[layer]["A"]
    new = aggregate(contributions)[layer]
    return wanted - new["B"] @ new["A"]


def covariance(contributions: list[Contribution], layer: str) -> Tensor:
    """Return ``1/2 sum_ij p_i p_j (B_i - B_j)(A_i - A_j)``."""
    total = torch.zeros(LAYERS[layer], dtype=torch.float64)
    weighted = list(zip(shares(contributions), [c.state[layer] for c in contributions], strict=True))
    for p, left in weighted:
        for q, right in weighted:
            total += 0.5 * p * q * (left["B"] - right["B"]) @ (left["A"] - right["A"])
    return total


@fast
@given(st.integers(2, 5), st.integers(0, 2**32))
def test_the_error_of_the_aggregate_is_the_covariance_of_the_factors(count: int, seed: int) -> None:
    contributions = sites(count, seed)
    for layer in LAYERS:
        gap = float((error(contributions, layer) - covariance(contributions, layer)).abs().max())
        assert gap < 1e-12, f"{layer}: the error differs from the covariance formula by {gap:.1e}"


@fast
@given(st.integers(2, 4), st.integers(0, 2**32), st.sampled_from("AB"))
def test_the_aggregate_is_exact_when_all_sites_agree_on_one_factor(count: int, seed: int, same: str) -> None:
    for layer in LAYERS:
        assert float(error(sites(count, seed, same=same), layer).abs().max()) < 1e-12


@fast
@given(st.integers(2, 4), st.integers(0, 2**32))
def test_the_aggregate_is_inexact_when_both_factors_differ(count: int, seed: int) -> None:
    for layer in LAYERS:
        assert float(error(sites(count, seed), layer).norm()) > 1e-3, f"{layer}: no error, but theory demands one"


@pytest.mark.parametrize("count", [2, 3])
def test_the_error_has_at_most_rank_r_for_every_site_but_one(count: int) -> None:
    singular = torch.linalg.svdvals(error(sites(count, 11), "q"))
    bound = (count - 1) * RANK
    assert float(singular[bound:].max()) < 1e-12, f"the error of {count} sites has a rank above {bound}"
    assert float(singular[bound - 1]) > 1e-6, "the bound should be reached by random sites"


def test_the_covariance_formula_would_notice_unweighted_averaging() -> None:
    weighted = sites(3, 5)
    uniform = [Contribution(c.site, 1.0, c.state) for c in weighted]
    assert float((error(uniform, "q") - covariance(weighted, "q")).norm()) > 1e-3


def test_dp_noise_on_both_factors_leaves_a_product_of_noises_in_the_weights() -> None:
    adapter, generator = LoRA(RANK, 2.0 * RANK, ("q",)), torch.Generator().manual_seed(3)
    factors = sites(1, 3)[0].state["q"]
    noise = {k: torch.randn(t.shape, generator=generator, dtype=torch.float64) for k, t in factors.items()}
    noised = adapter.delta({k: factors[k] + noise[k] for k in factors})
    linear = adapter.delta({"A": noise["A"], "B": factors["B"]}) + adapter.delta({"A": factors["A"], "B": noise["B"]})
    quadratic = adapter.delta(noise)
    assert float((noised - adapter.delta(factors) - linear - quadratic).abs().max()) < 1e-12
    assert float(quadratic.norm()) > 1e-3

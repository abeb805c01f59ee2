"""Starts from gradients and calibration: paid sketches, LoRA-GA and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from paid_worlds import RANK, Make, _clip_each, draw, each_family, noiseless, plan_of, records_of
from torch import Tensor, nn

from fedveil.common.adapters.base import factors_of
from fedveil.common.adapters.layers import layers_of
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.directions import leading_singular_triple, orthonormal_rows
from fedveil.common.starts.gradient import initial_shapes, mean_gradient
from fedveil.common.tasks import Record
from fedveil.contrib.starts.dp_lora_ga import DPLoRAGA, sketching
from fedveil.contrib.starts.lora_ga import LoRAGA
from fedveil.privacy import dpsgd, grid

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]


# --- LoRA-GA ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("out", "into"), [(9, 14), (14, 9), (10, 10)])
def test_invariants_18_and_19_the_first_step_is_the_best_of_its_rank(out: int, into: int, kept: torch.dtype) -> None:
    near = {torch.float32: 1e-5, torch.float64: 1e-10}[kept]
    G, eta, s = draw(out, into, seed=out), 0.3, 1.7
    made = {name: t.double() for name, t in LoRAGA(data="p").from_statistic({"G": G}, RANK).items()}
    A, B = made["A"], made["B"]
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    step = B @ B.T @ G + G @ A.T @ A
    assert (step - U[:, : 2 * RANK] @ torch.diag(S[: 2 * RANK]) @ Vt[: 2 * RANK]).abs().max() < near
    first = s * (-eta * (s * G @ A.T)) @ A  # B one step of plain SGD from 0
    assert (first + eta * s**2 * U[:, :RANK] @ torch.diag(S[:RANK]) @ Vt[:RANK]).abs().max() < near
    same_side = LoRAGA(data="p").from_statistic({"G": G}, RANK)["A"].double()
    worse = U[:, :RANK] @ U[:, :RANK].T @ G + G @ same_side.T @ same_side
    best = U[:, : 2 * RANK] @ torch.diag(S[: 2 * RANK]) @ Vt[: 2 * RANK]
    assert (worse - best).norm() > 0.1 * best.norm(), "with B among the first columns too nothing would be proved"


def test_a_layer_with_fewer_directions_than_two_ranks_gives_its_last_ones() -> None:
    B = LoRAGA(data="p").from_statistic({"G": draw(4, 9)}, RANK)["B"].double()
    assert B.shape == (4, RANK)
    assert (B.T @ B - torch.eye(RANK)).abs().max() < 1e-6


def test_invariant_20_pefts_lora_ga_scales_b_by_the_singular_values_and_leaves_a_of_unit_rows() -> None:
    """The authors' code gives both factors m^(1/4) / γ^(1/2) and unit vectors: where PEFT follows, our docstring ends.

    Golden: PEFT 0.19 to 0.21, ``tuners/lora/layer.py``.
    """
    import peft

    G = torch.diag_embed(torch.arange(8.0, 0.0, -1.0)) @ orthonormal_rows(8, 12, torch.Generator().manual_seed(2))
    base = nn.Sequential(nn.Linear(12, 8))
    base[0]._peft_loraga_grad = G  # type: ignore[assignment]
    how = peft.LoraConfig(
        r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(stable_gamma=16)
    )
    layer = peft.get_peft_model(base, how).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(A.norm(dim=1), torch.ones(2), atol=1e-4)
    columns, ours = B.norm(dim=0), LoRAGA(data="p").from_statistic({"G": G}, 2)
    assert torch.allclose(columns, torch.tensor([6.0, 5.0]) * 8**0.25 / 16**0.5, rtol=1e-3)
    assert torch.allclose(A.abs(), ours["A"].abs(), atol=1e-3)
    assert torch.allclose((B / columns).abs(), ours["B"].abs(), atol=1e-3)


def test_invariant_21_what_noise_leaves_of_the_right_vector() -> None:
    m, n = 60, 220
    u, v = (torch.nn.functional.normalize(draw(size, seed=size), dim=0) for size in (m, n))
    for times in (2.0, 0.5):
        t = times * (m * n) ** 0.25
        found = []
        for seed in range(6):
            U, _, Vt = leading_singular_triple(t * torch.outer(u, v) + draw(m, n, seed=90 + seed), 1)
            found.append((float(Vt[0] @ v) ** 2, float(U[:, 0] @ u) ** 2))
        right, left = torch.tensor(found).mean(0).tolist()
        wanted_right = max(0.0, (t**4 - m * n) / (t**4 + n * t**2))
        wanted_left = max(0.0, (t**4 - m * n) / (t**4 + m * t**2))
        assert right == pytest.approx(wanted_right, abs=0.08)
        assert left == pytest.approx(wanted_left, abs=0.12)
        if times > 1:
            assert abs(wanted_right - wanted_left) > 0.1, "with equal sides a swap would not show"


@each_family
def test_invariant_22_a_sketch_is_the_gradient_of_a_with_b_frozen_and_clipped_as_one(
    tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = DPLoRAGA(oversampling=1)
    model = tiny(family, start)
    records = records_of(model)
    noiseless(monkeypatch)
    sent = start.privatise(model, records, plan_of(start, clip=1e6, divisor=float(len(records))))
    shapes = {name: tuple(held["S"].shape) for name, held in sent.items()}
    assert shapes == {name: held["S"] for name, held in start.layout(model).items()}
    whole = mean_gradient(model, [model.batch([record]) for record in records])
    for name, held in sent.items():
        G = whole[name]["G"]
        assert held["S"].shape == (RANK + 1, G.shape[1])
        wanted = sketching(name, G.shape[0], RANK + 1).double().T @ G.double()
        assert (held["S"].double() - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
        A = start.from_statistic(held, RANK)["A"].double()
        top = torch.linalg.svd(wanted, full_matrices=False).Vh[:RANK]
        assert (A @ A.T - torch.eye(RANK)).abs().max() < 1e-6
        assert float((A @ top.T).norm()) == pytest.approx(math.sqrt(RANK), abs=0.02)

    assert moved_by_a_record(start, model, records) == pytest.approx(SHORT, abs=1e-6), "the clip is not attained"
    # Planted: a clip that each layer has for itself is the promise broken.
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", _clip_each)
    assert moved_by_a_record(start, model, records) > 1.1 * SHORT, "the check has no teeth"


SHORT = 0.01
"""A clip that every record's sketch is longer than."""


def moved_by_a_record(start: DPLoRAGA, model: FederatedModel, records: list[Record]) -> float:
    """Return how far the first record moves the sum of all sketches together."""
    whole, rest = (start.privatise(model, some, plan_of(start, SHORT)) for some in (records, records[1:]))
    return float(torch.cat([(whole[name]["S"] - rest[name]["S"]).double().flatten() for name in whole]).norm())


@each_family
def test_invariant_22_before_rounding_a_sketch_is_the_noised_step_of_a_behind_that_b(
    tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against B = Ω frozen in PEFT's own layers, one record after another, in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(FederatedModel, "many_passes", lambda self: nullcontext())  # which holds weights in float32
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total + std * draw(*total.shape, seed=7))
    monkeypatch.setattr(grid, "SUM_BITS", 40)
    monkeypatch.setattr(grid, "MOST_BITS", 60)
    start, divisor = DPLoRAGA(noise_multiplier=2.0), 4.0
    model, slow = tiny(family, start), tiny(family, start)
    model.module.double()
    slow.module.double().requires_grad_(False).train()
    assert slow.adapter.scaling == 1
    layers = layers_of(slow.peft_model)
    rows = []
    with torch.no_grad():
        for name, layer in layers.items():
            factors = factors_of(slow.adapter, layer)
            factors["B"].copy_(sketching(name, len(factors["B"]), RANK))
            rows.append(factors["A"].zero_().requires_grad_())
    records = records_of(model)
    # In the shapes of the release: Llama's norms are in float32 whatever the model is in, and follow the shape.
    parts = [next(iter(slow.fixed_batches([record], initial_shapes(slow)))) for record in records]
    gradients = [torch.autograd.grad(slow.losses(part).sum(), rows) for part in parts]
    norms = [float(torch.cat([g.flatten() for g in gradient]).norm()) for gradient in gradients]
    clip = sorted(norms)[2]
    assert norms.count(clip) == 1 < len(norms), "some are clipped and some are not"
    with in_float64():
        sent = start.privatise(model, records, plan_of(start, clip, divisor))
    for i, name in enumerate(layers):
        total = sum((g[i] * min(1.0, clip / norm) for g, norm in zip(gradients, norms, strict=True)), torch.zeros(()))
        wanted = (total + 2.0 * clip * draw(*total.shape, seed=7)) / divisor
        assert (sent[name]["S"] - wanted).abs().max() < 1e-12, f"{name}: another step"


@contextmanager
def in_float64() -> Iterator[None]:
    """Make new parameters in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

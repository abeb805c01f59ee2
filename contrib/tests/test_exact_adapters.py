"""Adapters of the field in their exact forms: numbered invariants, in float64, on layers that are not square.

Numbers 1 to 44 are of adapters; L of LoLDU, S of systems that share one elementwise module, Y of sparse directions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_models import WITH_FACTORS, as_trained
from digits import tiny_vit
from exact import (
    ALPHA,
    RANK,
    TALL,
    WIDE,
    apart,
    begun,
    draw,
    drawn,
    each_shape,
    gradients_at_0,
    noises,
    off,
    place,
    plain,
    trajectory,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from audits.tiny_models import with_biases
from fedveil.common.adapters import ADAPTERS, Adapter, LoRAFrozenA, LoRASB
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.errors import ModelError
from fedveil.common.starts import STARTS
from fedveil.common.starts.directions import leading_singular_triple
from fedveil.contrib.adapters.dora import row_norms
from fedveil.contrib.adapters.dora_frozen_norm import DoRAFrozenNorm
from fedveil.contrib.adapters.dora_magnitude import DoRAMagnitude
from fedveil.contrib.adapters.lora_increments import LoRAIncrements
from fedveil.contrib.rules.lora_pro import tangent_step
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan

pytestmark = pytest.mark.peft

# --- what every row must keep -----------------------------------------------------------------------------------------


def expected_square(adapter: Adapter, out: int, into: int) -> float:
    """Return what theory says of the mean of ‖delta(x) - delta(0)‖² for x of unit variance."""
    r, s = adapter.rank, adapter.scaling
    of = {
        "lora-diagonal": s**2 * r,
        "dora-magnitude": out,
        "dora-frozen-norm": out + s**2 * out * r,
        "randlora": s**2 * r * math.ceil(min(out, into) / r),
        "salt": s**2 * (r + (out - r) * r),
    }
    return of[adapter.name]


@pytest.mark.parametrize("name", ["lora-diagonal", "dora-magnitude", "dora-frozen-norm", "randlora", "salt"])
@each_shape
def test_noise_on_what_is_trained_has_the_stated_norm_in_the_weights(name: str, out: int, into: int) -> None:
    """9, L4, and the same of every new row: by the squares of the columns of the linear map, which is exact."""
    adapter, W = plain(ADAPTERS[name], rank=2 if name == "salt" else RANK), draw(out, into)
    start = begun(adapter, W)
    still, total = adapter.delta(start, W), 0.0
    for factor in adapter.trained:
        for i in range(start[factor].numel()):
            unit = torch.zeros_like(start[factor]).flatten()
            unit[i] = 1.0
            moved = {**start, factor: start[factor] + unit.view_as(start[factor])}
            total += float((adapter.delta(moved, W) - still).square().sum())
    wanted = expected_square(adapter, out, into)
    assert total == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", WITH_FACTORS)
def test_the_gradient_of_each_record_of_a_vision_transformer_is_that_of_one_alone(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = with_biases(tiny_vit("vit")).eval()
    targets = tuple(sorted({n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)}))
    adapter = ADAPTERS[name](RANK, ALPHA, targets, STARTS["orthonormal"]())
    model = attach(adapter, base, 1)
    write_factors(adapter, model, as_trained(read_factors(adapter, model), adapter.trained))
    side = model.config.image_size
    pixels = draw(4, 3, side, side, seed=5)

    def losses(batch: Tensor) -> Tensor:
        hidden = model(pixel_values=batch).last_hidden_state
        return cast(Tensor, (hidden * draw(*hidden.shape[1:], seed=6)).sum((1, 2)).sin())

    model.double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = [torch.autograd.grad(losses(pixels[i : i + 1]).sum(), trained, allow_unused=True) for i in range(4)]
    figures = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
    used = [p for p, g in zip(trained, alone[0], strict=True) if g is not None]
    for parameter in trained:
        parameter.requires_grad_(any(parameter is p for p in used))
    with PrivateSteps(model, torch.optim.SGD(used, 0.0), figures) as steps:
        samples = steps.samples(pixels, losses)
    wanted = [[g for g in gradients if g is not None] for gradients in alone]
    largest = max(float(g.abs().max()) for gradients in wanted for g in gradients)
    gaps = [off(sample[i], g) for i in range(4) for sample, g in zip(samples, wanted[i], strict=True)]
    assert max(gaps) < 1e-12 * largest


# --- DoRA -------------------------------------------------------------------------------------------------------------


def dora_weight(factors: Mapping[str, Tensor], W: Tensor, c: Tensor, s: float) -> Tensor:
    """Return DoRA's weight with a frozen norm, in the paper's coordinates: diag(mu / c) (W0 + s B' A)."""
    return (factors["mu"] / c)[:, None] * (W + s * factors["B"] @ factors["A"])


@each_shape
def test_7_a_frozen_norm_averages_exactly_in_our_coordinates_and_off_by_the_covariance_in_the_papers(
    out: int, into: int
) -> None:
    W, A, shares = draw(out, into), draw(RANK, into, seed=1), (0.25, 0.75)
    c, s = W.norm(dim=1), ALPHA / RANK
    sites = [{"A": A, "mu": c + draw(out, seed=k), "B": draw(out, RANK, seed=10 + k)} for k in range(2)]

    def off_by(points: list[dict[str, Tensor]], weight: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        mean = {name: sum(p * x[name] for p, x in zip(shares, points, strict=True)) for name in points[0]}
        whole = sum(p * weight(x) for p, x in zip(shares, points, strict=True))
        return cast(Tensor, whole - weight(cast(Mapping[str, Tensor], mean)))

    def theirs(point: Mapping[str, Tensor]) -> Tensor:
        return dora_weight(point, W, c, s)

    mu, B = (sum(p * x[name] for p, x in zip(shares, sites, strict=True)) for name in ("mu", "B"))
    covariance = sum(
        p * ((x["mu"] - mu) / c)[:, None] * (s * (x["B"] - B) @ A) for p, x in zip(shares, sites, strict=True)
    )
    assert off(off_by(sites, theirs), cast(Tensor, covariance)) < 1e-12
    assert float(cast(Tensor, covariance).abs().max()) > 1e-2, "the two sites agree: nothing is proved"
    assert float(off_by([{**x, "mu": c} for x in sites], theirs).abs().max()) < 1e-12
    assert float(off_by([{**x, "B": sites[0]["B"]} for x in sites], theirs).abs().max()) < 1e-12
    # Ours is that weight in other coordinates, and its mean is the mean.
    adapter = plain(DoRAFrozenNorm)
    ours = [{**x, "c": c, "B": (x["mu"] / c)[:, None] * x["B"]} for x in sites]
    assert max(off(W + adapter.delta(y, W), theirs(x)) for x, y in zip(sites, ours, strict=True)) < 1e-12
    assert float(off_by(ours, lambda point: adapter.delta(point, W)).abs().max()) < 1e-12


@each_shape
def test_8_the_exported_magnitudes_make_stock_dora_the_same_weight(out: int, into: int) -> None:
    W = draw(out, into)
    for kind in (DoRAFrozenNorm, DoRAMagnitude):
        adapter = plain(kind)
        factors = drawn(adapter, W, 0.4)
        told = adapter.exported(factors, W)
        A, B, mu = (told[name].double() for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
        s = adapter.scaling
        V = W + s * B @ A
        gap = off((mu / V.norm(dim=1))[:, None] * V, W + adapter.delta(factors, W))
        assert gap < 1e-10
        # The fault that is easily made: magnitudes are not brought to the norms of the turned rows.
        if kind is DoRAFrozenNorm:
            norms = row_norms(W, A, torch.zeros_like(B), s)
            wrong = (factors["mu"] / factors["c"] * norms / V.norm(dim=1))[:, None] * V
            assert off(wrong, W + adapter.delta(factors, W)) > 1e-2


def test_8_a_magnitude_of_exactly_zero_is_refused() -> None:
    adapter, W = plain(DoRAFrozenNorm), draw(*TALL)
    factors = begun(adapter, W)
    factors["mu"][2] = 0
    with pytest.raises(ModelError, match="a magnitude of the trained adapter is exactly 0"):
        adapter.exported(factors, W)


@pytest.mark.parametrize("kind", [DoRAMagnitude, DoRAFrozenNorm])
def test_9_a_row_of_zeros_is_refused(kind: type[Adapter]) -> None:
    W = draw(*TALL)
    W[4] = 0
    with pytest.raises(ModelError, match="row 4 of layer is zero in the base model"):
        begun(plain(kind), W)
    base = nn.Linear(*TALL[::-1], bias=False)
    base.weight = nn.Parameter(W.float())
    theirs = get_peft_model(nn.Sequential(base), LoraConfig(r=RANK, target_modules=["0"], use_dora=True))
    assert bool(theirs(torch.ones(1, TALL[1])).isnan().any()), "PEFT's own layer bears such a row"


# --- PiSSA and LoRA-GA ------------------------------------------------------------------------------------------------


def pissa(alpha: float = ALPHA) -> LoRAIncrements:
    start = STARTS["svd-of-weights"](singular_values=True)  # type: ignore[call-arg]
    return LoRAIncrements(RANK, alpha, ("wide", "tall"), start)


def best_of_rank(W: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank: W on the span of the leading eigenvectors of Wᵀ W."""
    leading = torch.linalg.eigh(W.T @ W).eigenvectors[:, -rank:]
    return W @ leading @ leading.T


class BeforeTheTrained(LoRAIncrements):
    """The fault: the scale is before the half that is trained, and what the start takes off has none."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        A, B = factors["A"], factors["B"]
        return factors["s"] * (B + factors["dB"]) @ (A + factors["dA"]) - B @ A


class BeforeTheStart(LoRAIncrements):
    """The fault the other way."""

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        A, B = factors["A"], factors["B"]
        return (B + factors["dB"]) @ (A + factors["dA"]) - factors["s"] * B @ A


@pytest.mark.parametrize("alpha", [1.0, 6.0])
@each_shape
def test_12_pissa_begins_with_the_best_of_its_rank_and_adds_nothing(
    alpha: float, out: int, into: int, kept: torch.dtype
) -> None:
    near = {torch.float32: 1e-5, torch.float64: 1e-10}[kept]
    adapter, W = pissa(alpha), draw(out, into)
    factors = begun(adapter, W)
    values, best = torch.linalg.svdvals(W), best_of_rank(W, RANK)
    principal = adapter.scaling * factors["B"] @ factors["A"]
    assert off(principal, best) < near
    residual = torch.linalg.svdvals(W - principal)
    assert float((residual[0] - values[RANK]).abs()) < near
    assert not adapter.delta(factors).any()
    assert off(factors["A"] @ factors["A"].T, torch.diag(values[:RANK])) < near
    # Planted: PEFT divides the singular values by its scale; with that scale and without the division it is another.
    assert off(alpha / RANK * factors["B"] @ factors["A"], best) > 0.1


@pytest.mark.parametrize("rank", [1, RANK, 5])
@each_shape
def test_12_the_leading_triple_is_the_best_of_its_rank_and_its_signs_are_fixed(rank: int, out: int, into: int) -> None:
    W = draw(out, into, seed=1)
    U, S, V = leading_singular_triple(W, rank)
    assert off((U * S) @ V, best_of_rank(W, rank)) < 1e-10
    assert off(S, torch.linalg.eigvalsh(W.T @ W)[-rank:].flip(0).sqrt()) < 1e-10
    assert max(off(U.T @ U, torch.eye(rank)), off(V @ V.T, torch.eye(rank))) < 1e-10
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    assert max(off(a, b) for a, b in zip(leading_singular_triple(-W, rank), (U, S, -V), strict=True)) < 1e-10


@each_shape
def test_13_the_export_of_twice_the_rank_is_the_model_and_the_trained_pair_alone_is_not(out: int, into: int) -> None:
    adapter, W = pissa(), draw(out, into)
    factors = drawn(adapter, W, 0.1)
    pair = adapter.as_lora(factors)
    assert (pair["A"].shape, pair["B"].shape) == ((2 * RANK, into), (out, 2 * RANK))
    A, B = factors["A"] + factors["dA"], factors["B"] + factors["dB"]
    # What PEFT's conversion writes is another pair of the same product: [A + dA; A], [B + dB, -B].
    theirs = torch.cat([B, -factors["B"]], 1) @ torch.cat([A, factors["A"]])
    assert off(pair["B"] @ pair["A"], theirs) < 1e-12
    assert off(B @ A, theirs) > 0.5, "the principal part is not counted twice here: nothing is proved"


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_12_it_begins_with_what_pefts_own_does_under_any_alpha(alpha: float) -> None:
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(12, 7))
    W = base[0].weight.detach().double()
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")  # type: ignore[arg-type]
    theirs: Any = get_peft_model(base, config).base_model.model[0]
    ours = begun(pissa(alpha), W)
    assert off(theirs.get_delta_weight("default").detach(), ours["B"] @ ours["A"]) < 1e-6
    assert off(theirs.base_layer.weight.detach(), W - ours["B"] @ ours["A"]) < 1e-6


@pytest.mark.parametrize("scale", [0.15, 2.5])
@each_shape
def test_12_at_any_scale_it_begins_as_its_base_and_with_a_scale_on_one_half_alone_it_does_not(
    scale: float, out: int, into: int
) -> None:
    adapter, W = pissa(), draw(out, into)
    factors = {**begun(adapter, W), "s": torch.full((1,), scale, dtype=torch.float64)}
    assert not adapter.delta(factors).any()
    pair = adapter.as_lora(factors)
    assert not (pair["B"] @ pair["A"]).any(), "the export begins elsewhere"
    for planted in (BeforeTheTrained, BeforeTheStart):
        assert float(planted(RANK, ALPHA, ()).delta(factors).abs().max()) > 0.1, "a scale on one half goes unnoticed"


@each_shape
def test_13_a_scale_lengthens_the_whole_change_in_every_form(out: int, into: int) -> None:
    adapter, W, scale = pissa(), draw(out, into), 0.3
    moved = drawn(adapter, W, 0.1)
    scaled = {**moved, "s": torch.full((1,), scale, dtype=torch.float64)}
    A, B, dA, dB = (moved[name] for name in ("A", "B", "dA", "dB"))
    wanted = scale * ((B + dB) @ (A + dA) - B @ A)
    pair = adapter.as_lora(scaled)
    assert off(adapter.delta(scaled), wanted) < 1e-12
    assert off(pair["B"] @ pair["A"], wanted) < 1e-12
    # Planted: the scale before the trained column of the pair alone, and before the frozen one alone.
    for halves in ((scale * dB, B), (dB, scale * B)):
        assert off(torch.cat(halves, 1) @ pair["A"], wanted) > 1e-2, "a scale on one half alone goes unnoticed"


@each_shape
def test_43_the_first_step_of_both_factors_is_as_long_in_the_weights_as_the_scale_says(out: int, into: int) -> None:
    """From its start one plain step of rate η moves the weights by -η s² (B Bᵀ G + G Aᵀ A) + η² s³ G Aᵀ Bᵀ G."""
    adapter, W, G, eta, scale = pissa(), draw(out, into), draw(out, into, seed=4), 0.1, 0.4
    factors = {**begun(adapter, W), "s": torch.full((1,), scale, dtype=torch.float64)}
    A, B = factors["A"], factors["B"]
    leaves = {name: factors[name].clone().requires_grad_() for name in adapter.trained}
    gradients = torch.autograd.grad((adapter.delta({**factors, **leaves}) * G).sum(), list(leaves.values()))
    seen = gradients_at_0(adapter, factors, G)
    for name, slow in zip(leaves, gradients, strict=True):
        assert off(seen[name], slow) < 1e-12, f"{name} has another gradient than is calibrated"
    stepped = {name: factors[name] - eta * g for name, g in zip(leaves, gradients, strict=True)}
    moved = adapter.delta({**factors, **stepped})
    first = scale**2 * (B @ B.T @ G + G @ A.T @ A)
    assert off(moved, -eta * first + eta**2 * scale**3 * G @ A.T @ B.T @ G) < 1e-12
    # Planted: one of the two gradients without the scale.
    for name in seen:
        planted = adapter.delta({**factors, **stepped, name: factors[name] - eta * seen[name] / scale})
        assert off(planted, moved) > 1e-2, f"{name} without the scale goes unnoticed"


def test_13_it_is_pefts_own_pissa() -> None:
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(12, 7))
    base_weight = base[0].weight.detach().clone()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="pissa")
    theirs: Any = get_peft_model(base, config).base_model.model[0]
    A, B = (part["default"].weight for part in (theirs.lora_A, theirs.lora_B))
    factors = {"A": A.detach().clone(), "B": B.detach().clone(), "s": torch.ones(1)}
    factors |= {"dA": 0.1 * draw(RANK, 12, seed=1).float(), "dB": 0.1 * draw(7, RANK, seed=2).float()}
    with torch.no_grad():
        A += factors["dA"]
        B += factors["dB"]
        moved = theirs(torch.eye(12)) - theirs(torch.zeros(1, 12))
    assert off(moved.T - base_weight, pissa().delta(factors)) < 1e-5


def test_13_pefts_conversion_is_the_same_change_on_the_stock_base_and_the_pair_alone_is_not(tmp_path: Path) -> None:
    torch.manual_seed(3)
    stock_base = nn.Sequential(nn.Linear(12, 7))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="pissa")
    theirs: Any = get_peft_model(copy.deepcopy(stock_base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    A, B = (part["default"].weight for part in (theirs.base_model.model[0].lora_A, theirs.base_model.model[0].lora_B))
    factors = {"A": A.detach().clone(), "B": B.detach().clone(), "s": torch.ones(1)}
    factors |= {"dA": 0.1 * draw(RANK, 12, seed=1).float(), "dB": 0.1 * draw(7, RANK, seed=2).float()}
    with torch.no_grad():
        A += factors["dA"]
        B += factors["dB"]
    theirs.save_pretrained(tmp_path / "pair")
    theirs.save_pretrained(tmp_path / "twice", path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    def change(folder: Path) -> tuple[Tensor, Any]:
        loaded = PeftModel.from_pretrained(copy.deepcopy(stock_base), str(folder))
        return loaded.base_model.model[0].get_delta_weight("default"), loaded.peft_config["default"]

    adapter = pissa()
    (twice, of_twice), (pair, of_pair) = change(tmp_path / "twice"), change(tmp_path / "pair")
    assert (of_twice.r, of_twice.lora_alpha) == (2 * RANK, 2 * RANK)
    assert (adapter.peft_config().r, adapter.peft_config().lora_alpha) == (2 * RANK, 2 * RANK)
    own = adapter.as_lora(factors)
    assert off(twice, adapter.delta(factors)) < 1e-6
    assert off(twice, own["B"] @ own["A"]) < 1e-6
    # Theirs is [A + dA; A] and [B + dB, -B], to the last bit: ours in another basis of the same 2 r directions.
    written = load_file(tmp_path / "twice" / "adapter_model.safetensors")
    pair_a, pair_b = (written[f"base_model.model.0.lora_{letter}.weight"] for letter in "AB")
    assert torch.equal(pair_a, torch.cat([A, factors["A"]]))
    assert torch.equal(pair_b, torch.cat([B, -factors["B"]], 1))
    one, none = torch.eye(RANK), torch.zeros(RANK, RANK)
    turn = torch.cat([torch.cat([one, none], 1), torch.cat([one, -one], 1)])  # its own inverse
    assert off(turn @ own["A"], pair_a) < 1e-6
    assert off(own["B"] @ turn, pair_b) < 1e-6
    assert off(own["A"], pair_a) > 0.1, "they are one pair: the row can ask for the same tensors"
    assert of_pair.r == RANK
    assert off(pair, adapter.delta(factors)) > 0.1, "the principal part is counted twice, and that is not seen"


@pytest.mark.parametrize("scale", [1.0, 0.3])
@each_shape
def test_13_the_pass_in_training_is_that_of_the_exported_change(scale: float, out: int, into: int) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, Any] = {"model_type": "custom"}
            self.layer = nn.Linear(into, out)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x))

    start = STARTS["svd-of-weights"](singular_values=True)  # type: ignore[call-arg]
    adapter = LoRAIncrements(RANK, ALPHA, ("layer",), start)
    base, x = One(), draw(5, into, seed=8)
    plain_output = base.double()(x).detach()
    model = attach(adapter, base.float(), 1)
    begins = read_factors(adapter, model)["layer"]
    write_factors(adapter, model, {"layer": {"s": torch.tensor([scale])}})
    for mode in (True, False):
        assert torch.equal(model.double().train(mode)(x).detach(), plain_output), "it does not begin as its base"
    state = as_trained({"layer": {**begins, "s": torch.tensor([scale])}}, adapter.trained)
    write_factors(adapter, model, state)
    wanted = plain_output + x @ adapter.delta({name: t.double() for name, t in state["layer"].items()}).T
    for mode in (True, False):
        assert off(model.double().train(mode)(x).detach(), wanted) < 1e-6
    assert off(plain_output, wanted) > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.6])
@each_shape
def test_14_the_mean_is_off_by_the_covariance_and_the_start_drops_out(out: int, into: int, scale: float) -> None:
    adapter, W, shares = pissa(), draw(out, into), (0.25, 0.75)
    s = torch.full((1,), scale, dtype=torch.float64)
    sites = [{**drawn(adapter, W, 0.5, seed=k), "s": s} for k in (3, 30)]
    mean = {name: shares[0] * sites[0][name] + shares[1] * sites[1][name] for name in sites[0]}
    gap = sum((p * adapter.delta(x) for p, x in zip(shares, sites, strict=True)), -adapter.delta(mean))
    covariance = sum(
        (p * s * (x["dB"] - mean["dB"]) @ (x["dA"] - mean["dA"]) for p, x in zip(shares, sites, strict=True)),
        torch.zeros(out, into, dtype=torch.float64),
    )
    assert off(gap, covariance) < 1e-12
    assert float(covariance.abs().max()) > 1e-2


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("adam", [False, True], ids=["dp-sgd", "dp-adam"])
def test_15_increments_over_the_base_train_as_the_factors_do_over_the_residual_one(adam: bool, scale: float) -> None:
    adapter, W = pissa(), draw(*WIDE)
    start = begun(adapter, W)
    A, B = start["A"], start["B"]
    shapes = {"dA": tuple(A.shape), "dB": tuple(B.shape)}
    noise, rates = noises(shapes), dict.fromkeys(shapes, 0.02)

    def ours(decay: float) -> list[Tensor]:
        held = {"dA": start["dA"], "dB": start["dB"]}
        frozen = {"A": A, "B": B, "s": torch.full((1,), scale, dtype=torch.float64)}
        return trajectory(lambda f: adapter.delta({**frozen, **f}), held, W, noise, rates, 2.0, adam=adam, decay=decay)

    def theirs(decay: float) -> list[Tensor]:
        residual = W - scale * B @ A
        return trajectory(
            lambda f: scale * f["dB"] @ f["dA"], {"dA": A, "dB": B}, residual, noise, rates, 2.0, adam=adam, decay=decay
        )

    assert apart(ours(0.0), theirs(0.0)) < 1e-12
    assert apart(ours(0.1), theirs(0.1)) > 1e-4, "weight decay draws to another place, and that is not seen"


@pytest.mark.parametrize("adam", [False, True], ids=["dp-sgd", "dp-adam"])
@each_shape
def test_15_behind_a_frozen_a_b_from_0_over_the_base_trains_as_pissas_does_over_the_residual_one(
    adam: bool, out: int, into: int
) -> None:
    W = draw(out, into)
    start = begun(pissa(), W)
    adapter = LoRAFrozenA(RANK, ALPHA, ("l",))
    s, A = adapter.scaling, start["A"] / adapter.scaling**0.5
    B = start["B"] / s**0.5  # s B A is the principal part
    noise, rates = noises({"B": (out, RANK)}), {"B": 0.02}

    def ours(decay: float) -> list[Tensor]:
        held = {"B": torch.zeros_like(B)}
        return trajectory(lambda f: adapter.delta({"A": A, **f}), held, W, noise, rates, 2.0, adam=adam, decay=decay)

    def theirs(decay: float, base: Tensor) -> list[Tensor]:
        return trajectory(lambda f: s * f["B"] @ A, {"B": B}, base, noise, rates, 2.0, adam=adam, decay=decay)

    residual = W - s * B @ A
    assert apart(ours(0.0), theirs(0.0, residual)) < 1e-12
    assert apart(ours(0.1), theirs(0.1, residual)) > 1e-4, "weight decay draws to another place, and that is not seen"
    assert apart(ours(0.0), theirs(0.0, W)) > 0.1, "the principal part is counted twice, and that is not seen"


def test_16_singular_values_in_the_factors_are_an_option_and_leave_the_directions() -> None:
    W = draw(*WIDE)
    unit, scaled = (
        STARTS["svd-of-weights"](singular_values=on).factors(place(W), ("A", "B"))  # type: ignore[call-arg]
        for on in (False, True)
    )
    roots = torch.linalg.svdvals(W)[:RANK].sqrt()
    assert off(unit["A"] @ unit["A"].T, torch.eye(RANK)) < 1e-6
    assert off(scaled["A"], roots[:, None].float() * unit["A"]) < 1e-5
    assert off(scaled["B"], unit["B"] * roots.float()) < 1e-5


@pytest.mark.parametrize("rank", [RANK, 2], ids=["of full rank", "of a rank too low"])
@each_shape
def test_17_lora_fa_on_pissas_rows_is_a_plain_step_on_orthonormal_ones(rank: int, out: int, into: int) -> None:
    """G Aᵀ (A Aᵀ)⁻¹ A is one projection whatever the length of A's rows, where nothing is clipped and nothing noised.

    B begins at 0: over the residual base PiSSA's B begins elsewhere, which changes no gradient of it (15).
    """
    W = draw(out, rank, seed=1) @ draw(rank, into, seed=2)
    _, values, V = leading_singular_triple(W, RANK)
    long, shares, s, eta = values.sqrt()[:, None] * V, (0.5, 0.3, 0.2), 1.7, 0.3
    G = sum((p * draw(out, into, seed=5 + k) for k, p in enumerate(shares)), torch.zeros(()))

    def lora_fa(A: Tensor, clip: float = math.inf) -> Tensor:
        g_b = s * G @ A.T
        g_b = g_b * min(1.0, clip / float(g_b.norm()))
        nothing = torch.zeros(out, len(A), dtype=torch.float64)
        b = tangent_step(torch.zeros_like(A), g_b, A, nothing, s, 0.0)[1]
        return -eta * s * b @ A

    # What W does not reach has no length in PiSSA's rows, and no part in its steps.
    unit = V[:rank]
    adapter = LoRAFrozenA(len(unit), len(unit), ("l",))
    plain_step = adapter.delta({"A": unit, "B": -eta * G @ unit.T})
    assert off(lora_fa(long), plain_step) < 1e-10
    assert off(lora_fa(V[:rank]), plain_step) < 1e-10
    # Planted: the same plain step on the long rows, and a clip before the rows are taken out.
    assert off(adapter.delta({"A": long[:rank], "B": -eta * G @ long[:rank].T}), plain_step) > 1e-2
    assert off(lora_fa(long, clip=1.0), lora_fa(V, clip=1.0)) > 1e-3


@pytest.mark.parametrize("adam", [False, True], ids=["dp-sgd", "dp-adam"])
def test_42_a_nystrom_core_trained_from_anywhere_is_one_trained_from_0_on_the_stock_base(adam: bool) -> None:
    adapter, W = LoRASB(RANK, ALPHA, ("l",), STARTS["nystrom"]()), draw(*WIDE)
    start = begun(adapter, W)
    assert not adapter.delta(start, W).any(), "the start is another model than the base"
    A, B = start["A"], start["B"]
    first = W[:, :RANK] @ torch.linalg.solve(W[:RANK, :RANK], W[:RANK])
    core = B.T @ first @ A.T  # of the interpolation, in the orthonormal factors
    assert off(B @ core @ A, first) < 1e-4 * float(first.abs().max())  # factors are rounded to float32
    noise, rates = noises({"R": (RANK, RANK)}), {"R": 0.05}

    def ours(decay: float) -> list[Tensor]:
        frozen, held = {"A": A, "B": B}, {"R": start["R"]}
        return trajectory(lambda f: adapter.delta({**frozen, **f}), held, W, noise, rates, 2.0, adam=adam, decay=decay)

    def theirs(decay: float, base: Tensor) -> list[Tensor]:
        return trajectory(lambda f: B @ f["R"] @ A, {"R": core}, base, noise, rates, 2.0, adam=adam, decay=decay)

    residual = W - B @ core @ A
    assert apart(ours(0.0), theirs(0.0, residual)) < 1e-10
    assert apart(ours(0.1), theirs(0.1, residual)) > 1e-4, "weight decay draws to another place, and that is not seen"
    assert apart(ours(0.0), theirs(0.0, W)) > 0.1, "as released nothing is taken from the base, and that is not seen"

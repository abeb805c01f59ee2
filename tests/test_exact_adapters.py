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
from digits import tiny_vit
from opacus.grad_sample import GradSampleHooks
from peft import LoraConfig, PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file
from test_adapters import WITH_FACTORS, Folder, as_trained, float64_model, furthest_from_alone, stock
from torch import Tensor, nn

from audits.tiny_models import TARGETS, with_biases
from common.adapters import (
    ADAPTERS,
    SALT,
    Adapter,
    DoRAFrozenNorm,
    DoRAMagnitude,
    LoRA,
    LoRADiagonal,
    LoRAFrozenA,
    LoRAIncrements,
    LoRASB,
    Place,
    RandLoRA,
)
from common.adapters.dora import row_norms
from common.adapters.lora_diagonal import Diagonal
from common.config.text import parse_settings
from common.errors import ConfigError, ModelError
from common.messages.state import Factors
from common.privacy.dpsgd import PrivateSteps
from common.privacy.plan import gaussian_plan
from common.randomness import stream
from common.starts import STARTS
from common.starts.directions import leading_singular_triple, orthonormal_rows
from common.starts.lu_of_weights import lu_triple
from strategies.job import configure
from strategies.rules.lora_pro import tangent_step
from strategies.systems import SYSTEMS

RANK, ALPHA = 3, 6.0
TALL, WIDE = (9, 5), (7, 12)
each_shape = pytest.mark.parametrize(("out", "into"), [TALL, WIDE], ids=["tall", "wide"])
Step = Callable[[Tensor, Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def place(W: Tensor, layer: str = "layer", rank: int = RANK) -> Place:
    return Place(layer, W.shape[0], W.shape[1], rank, 1, W.clone)


def plain(kind: type[Adapter], rank: int = RANK, alpha: float = ALPHA) -> Adapter:
    return kind(rank, alpha, ("wide", "tall"), STARTS["orthonormal"]())


def off(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


class Layer:
    """What a start looks at of one layer of its own."""

    def __init__(self, W: Tensor) -> None:
        self.out_features, self.in_features = W.shape
        self._base = nn.Linear(*W.shape[::-1], bias=False)
        self._base.weight = nn.Parameter(W)

    def get_base_layer(self) -> nn.Module:
        return self._base


def begun(adapter: Adapter, W: Tensor) -> Factors:
    """Return all factors where the adapter begins, float64."""
    return {name: t.double() for name, t in adapter.start("layer", cast(Any, Layer(W)), 1).items()}


def drawn(adapter: Adapter, W: Tensor, size: float = 1.0, seed: int = 3) -> Factors:
    """Return factors as training leaves them: what is frozen at its start, what is trained off it."""
    start = begun(adapter, W)
    moved = {
        name: start[name] + size * draw(*start[name].shape, seed=seed + i) for i, name in enumerate(adapter.trained)
    }
    return {**start, **moved}


def trajectory(
    change: Callable[[Mapping[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    base: Tensor,
    noise: list[dict[str, Tensor]],
    rates: Mapping[str, float],
    clip: float,
    *,
    adam: bool = False,
    decay: float = 0.0,
) -> list[Tensor]:
    """Return a layer's weight after every private step, one record at a time: the slow, obvious reference."""
    x, y = draw(6, base.shape[1], seed=20), draw(6, base.shape[0], seed=21)
    held = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    kind = torch.optim.Adam if adam else torch.optim.SGD
    groups = [{"params": [held[name]], "lr": rate, "weight_decay": decay} for name, rate in rates.items()]
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.1)
    weights, clipped = [], 0
    for noises in noise:
        sums = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        for record, target in zip(x, y, strict=True):
            loss = ((base + change(held)) @ record - target).square().sum()
            gradient = torch.autograd.grad(loss, list(held.values()))
            norm = float(torch.cat([g.flatten() for g in gradient]).norm())
            clipped += norm > clip
            for name, g in zip(held, gradient, strict=True):
                sums[name] += g * min(1.0, clip / norm)
        for name, tensor in held.items():
            tensor.grad = (sums[name] + clip * noises[name]) / len(x)
        optimizer.step()
        weights.append((base + change(held)).detach())
    assert clipped > 0, "no record is clipped: nothing is proved"
    return weights


def apart(left: list[Tensor], right: list[Tensor]) -> float:
    return max(off(a, b) for a, b in zip(left, right, strict=True))


def noises(shapes: Mapping[str, tuple[int, ...]], steps: int = 6) -> list[dict[str, Tensor]]:
    return [{n: draw(*shape, seed=100 * k + i) for i, (n, shape) in enumerate(shapes.items())} for k in range(steps)]


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
    model = adapter.attach(base, 1)
    adapter.write(model, as_trained(adapter.read(model), adapter.trained))
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
    seen = adapter.seen(factors, G)
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
    model = adapter.attach(base.float(), 1)
    begins = adapter.read(model)["layer"]
    adapter.write(model, {"layer": {"s": torch.tensor([scale])}})
    for mode in (True, False):
        assert torch.equal(model.double().train(mode)(x).detach(), plain_output), "it does not begin as its base"
    state = as_trained({"layer": {**begins, "s": torch.tensor([scale])}}, adapter.trained)
    adapter.write(model, state)
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


# --- RandLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "into"), [(7, 12), (12, 7), (9, 9), (6, 9)])
def test_30_the_change_is_pefts_by_position_and_another_as_the_formula_is_printed(out: int, into: int) -> None:
    adapter, W = plain(RandLoRA), draw(out, into)
    factors = drawn(adapter, W)
    base = nn.Sequential(nn.Linear(into, out, bias=False))
    theirs: Any = get_peft_model(base, RandLoraConfig(r=RANK, randlora_alpha=ALPHA, target_modules=["0"]))  # type: ignore[arg-type]
    layer = theirs.base_model.model[0]
    told, bases = adapter.exported(factors, W), cast(RandLoRA, adapter).shared({"0": factors}, [(out, into)])
    with torch.no_grad():
        layer.randlora_lambda["default"].copy_(told["randlora_lambda"])
        layer.randlora_gamma["default"].copy_(told["randlora_gamma"])
        layer.randlora_A["default"].copy_(bases["randlora_A"])
        layer.randlora_B["default"].copy_(bases["randlora_B"])
        wanted = layer.get_delta_weight("default")
    delta = adapter.delta(factors, W)
    assert off(delta, wanted.double()) < 1e-5 * float(delta.abs().max())
    # As printed: Σ_b B_b Λ_b A Γ_b.
    B, A, gamma, diagonal = factors["B"], factors["A"], factors["gamma"], told["randlora_lambda"]
    printed = adapter.scaling * sum(
        (B[:, b] @ torch.diag(diagonal[:, b]) @ A * gamma[b] for b in range(B.shape[1])), torch.zeros(())
    )
    assert off(printed if out >= into else printed.T, delta) > 0.1 * float(delta.abs().max())


@each_shape
def test_31_the_change_has_full_rank_and_with_a_constant_gamma_it_has_not(out: int, into: int) -> None:
    adapter, W = plain(RandLoRA), draw(out, into)
    factors = drawn(adapter, W)
    assert int(torch.linalg.matrix_rank(adapter.delta(factors, W))) == min(out, into)
    constant = {**factors, "gamma": torch.full_like(factors["gamma"], 1 / out)}
    assert int(torch.linalg.matrix_rank(adapter.delta(constant, W))) == RANK


@each_shape
def test_31_a_trained_gamma_would_begin_at_the_base_from_0_and_be_linear_with_lambda_at_1(out: int, into: int) -> None:
    """Of PEFT's own layer, in float64, because no adapter here trains Gamma."""
    base = nn.Sequential(nn.Linear(into, out, bias=False))
    theirs: Any = get_peft_model(base, RandLoraConfig(r=RANK, randlora_alpha=ALPHA, target_modules=["0"])).double()  # type: ignore[arg-type]
    layer = theirs.base_model.model[0]
    diagonal, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    x = draw(4, into, seed=5)

    def change(g: Tensor, scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            diagonal.fill_(scale)
            gamma.copy_(g)
            return cast(Tensor, layer.get_delta_weight("default"))

    nothing = torch.zeros_like(gamma)
    assert not change(nothing).any()
    assert torch.equal(theirs(x), nn.functional.linear(x, layer.base_layer.weight))
    first, second = (draw(*gamma.shape, seed=k) for k in (1, 2))
    assert off(change(0.3 * first + 0.7 * second), 0.3 * change(first) + 0.7 * change(second)) < 1e-12
    assert int(torch.linalg.matrix_rank(change(first))) == min(out, into)
    # With both diagonals trained the mean is off.
    both = 0.3 * change(first, 1.5) + 0.7 * change(second, 0.5)
    assert off(change(0.3 * first + 0.7 * second, 0.3 * 1.5 + 0.7 * 0.5), both) > 1e-2 * float(both.abs().max())
    # Ours has rows of length 1, so that one Gamma's length is not seen in it: trained it would not be linear.
    adapter, W = plain(RandLoRA), draw(out, into)
    factors = drawn(adapter, W)
    assert off(adapter.delta({**factors, "gamma": 2 * factors["gamma"]}, W), adapter.delta(factors, W)) < 1e-12


def test_32_layers_share_bases_as_far_as_they_reach() -> None:
    adapter = plain(RandLoRA)
    small, large = begun(adapter, draw(*TALL)), begun(adapter, draw(*WIDE))
    assert torch.equal(small["A"], large["A"][:, : small["A"].shape[1]])
    rows, bases = small["B"].shape[:2]
    assert torch.equal(small["B"], large["B"][:rows, :bases])
    shared = cast(RandLoRA, adapter).shared({"a": small, "b": large}, [TALL, WIDE])
    # PEFT's bases are those of the most outputs, 9, and the most inputs, 12, of any layer.
    assert (shared["randlora_A"].shape, shared["randlora_B"].shape) == ((RANK, 1, 9), (12, 3, RANK))


# --- LoLDU and whatever else is one diagonal --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (7, 12), (8, 8)])
def test_l1_the_decomposition_is_the_weights_and_increments_train_as_published(shape: tuple[int, int]) -> None:
    W = draw(*shape)
    B, D, A = lu_triple(W, min(shape))
    assert off((B * D) @ A, W) < 1e-12
    B, D, A = lu_triple(W, RANK)
    for s in (0.5, 2.0):
        noise, rates = noises({"z": (RANK,)}), {"z": 0.05}
        published = trajectory(lambda f, s=s: s * (B * f["z"]) @ A, {"z": D}, W - s * (B * D) @ A, noise, rates, 1.0)
        adapter = LoRADiagonal(RANK, s * RANK, ("l",))
        ours = trajectory(
            lambda f, adapter=adapter: adapter.delta({"A": A, "B": B, **f}), {"z": 0 * D}, W, noise, rates, 1.0
        )
        assert apart(published, ours) < 1e-12


@each_shape
def test_l2_the_residual_is_the_schur_complement_and_no_best_approximation(out: int, into: int) -> None:
    W = draw(out, into)
    B, D, A = lu_triple(W, RANK)
    P, _, _ = torch.linalg.lu(W)
    residual = P.T @ (W - (B * D) @ A)
    assert float(residual[:RANK].abs().max()) < 1e-12
    assert float(residual[:, :RANK].abs().max()) < 1e-12
    best = torch.linalg.svdvals(W)[RANK:].norm()
    assert float(residual.norm()) > 1.05 * float(best), "the two agree here, which the docstring denies"


@each_shape
def test_l1_the_start_has_unit_vectors_of_the_decompositions_directions(out: int, into: int) -> None:
    W = draw(out, into)
    made = STARTS["lu-of-weights"]().factors(place(W), ("A", "B"))
    B, _, A = lu_triple(W, RANK)
    assert off(made["A"].double(), A / A.norm(dim=1, keepdim=True)) < 1e-6
    assert off(made["B"].double(), B / B.norm(dim=0)) < 1e-6


def test_l1_a_pivot_next_to_nothing_is_refused() -> None:
    W = draw(9, 2) @ draw(2, 5)
    with pytest.raises(ModelError, match="an LU pivot of layer is next to nothing"):
        STARTS["lu-of-weights"]().factors(place(W), ("A",))


def test_l3_the_diagonals_gradient_of_each_record_is_that_of_the_record_alone_also_where_it_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(5, RANK, bias=False), nn.Linear(RANK, 4, bias=False)
            self.z = Diagonal(self.out)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.out(self.z(torch.tanh(self.z(self.into(x))))))

    torch.manual_seed(1)
    model = Twice().double()
    for frozen in (model.into, model.out):
        frozen.requires_grad_(False)
    with torch.no_grad():
        model.z.weight.copy_(draw(RANK, seed=2))
    x = draw(4, 6, 5, seed=3)

    def losses(batch: Tensor) -> Tensor:
        return cast(Tensor, model(batch).sin().sum((1, 2)))

    figures = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
    wanted = torch.stack([torch.autograd.grad(losses(x[i : i + 1]).sum(), model.z.weight)[0] for i in range(4)])
    with PrivateSteps(model, torch.optim.SGD([model.z.weight], 0.0), figures) as steps:
        (found,) = steps.samples(x, losses)
    assert off(found, wanted) < 1e-12 * float(wanted.abs().max())


def test_l3_a_diagonal_whose_gradient_leaves_out_a_position_is_found(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(layer: Diagonal, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return layer.gradients([activations[0][:, 1:]], backprops[:, 1:])

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Diagonal, planted)
    assert furthest_from_alone(float64_model(model_folder("bert"), "lora-diagonal", "bert")[1]) > 1e-6


@each_shape
def test_l4_noise_on_the_diagonal_enters_at_the_lengths_of_its_vectors_and_at_one_each_where_they_are_units(
    out: int, into: int
) -> None:
    W, s, tau, draws = draw(out, into), 2.0, 0.4, 20_000
    B, _, A = lu_triple(W, RANK)
    units = STARTS["lu-of-weights"]().factors(place(W), ("A", "B"))
    adapter = LoRADiagonal(RANK, s * RANK, ("l",))
    noise = tau * draw(draws, RANK, seed=4)

    def mean_square(frozen: Mapping[str, Tensor]) -> float:
        each = torch.stack([adapter.delta({**frozen, "z": unit}).flatten() for unit in torch.eye(RANK).double()])
        return float((noise @ each).square().sum()) / draws

    published = s**2 * tau**2 * float((B.norm(dim=0) * A.norm(dim=1)).square().sum())
    assert mean_square({"A": A, "B": B}) == pytest.approx(published, rel=0.03)
    unit = {name: tensor.double() for name, tensor in units.items()}
    assert mean_square(unit) == pytest.approx(s**2 * tau**2 * RANK, rel=0.03)
    assert published > 1.2 * s**2 * tau**2 * RANK, "lengths of 1 would do here: nothing is proved"


@pytest.mark.parametrize("name", [name for name, kind in ADAPTERS.items() if kind.free_scale and kind.linear])
@each_shape
def test_i1_the_whole_gradient_along_the_change_is_the_factors_own_along_what_is_trained(
    name: str, out: int, into: int
) -> None:
    """What lets the server score a layer by what is sent: no m × n gradient is needed."""
    rank = min(RANK, into // 2) if name == "salt" else RANK  # which needs twice as many inputs
    adapter, W, shares = plain(ADAPTERS[name], rank), draw(out, into), (0.5, 0.3, 0.2)
    full = drawn(adapter, W)
    deficient = {**full, **{trained: full[trained].clone() for trained in adapter.trained}}
    for trained in adapter.trained:
        deficient[trained][..., 1] = 0

    def along(factors: Factors, of: Factors, g: Tensor) -> float:
        seen = adapter.seen(of, g)
        return adapter.scaling * sum(float((factors[trained] * seen[trained]).sum()) for trained in adapter.trained)

    for factors in (full, deficient):
        sites = [draw(out, into, seed=30 + k) for k in range(3)]
        G = sum((p * g for p, g in zip(shares, sites, strict=True)), torch.zeros(()))
        wanted = float((adapter.delta(factors, W) * G).sum())
        own = [along(factors, factors, g) for g in sites]
        assert sum(p * x for p, x in zip(shares, own, strict=True)) == pytest.approx(wanted, abs=1e-10)
        for trained in adapter.trained:
            leaf = factors[trained].clone().requires_grad_()
            (slow,) = torch.autograd.grad((adapter.delta({**factors, trained: leaf}, W) * G).sum(), leaf)
            assert off(adapter.scaling * adapter.seen(factors, G)[trained], slow) < 1e-12
        other = {**factors, **{frozen: factors[frozen].flip(0) for frozen in adapter.frozen}}
        assert abs(along(factors, other, G) - wanted) > 1e-2, "the factors of another layer would do: nothing is proved"


@each_shape
def test_d1_one_number_for_a_module_averages_exactly_and_not_with_b_trained_beside_it(out: int, into: int) -> None:
    """A gate g on a frozen s B A is a diagonal of which all numbers are g."""
    adapter, W, shares, gates = plain(LoRADiagonal), draw(out, into), (0.5, 0.3, 0.2), (0.3, -1.2, 2.0)
    frozen = begun(adapter, W)
    ones = torch.ones(RANK, dtype=torch.float64)

    def mean_of(sites: list[Factors]) -> tuple[Tensor, Tensor]:
        """Return the change of the mean factors, and the mean of the changes."""
        mean = {n: sum((p * x[n] for p, x in zip(shares, sites, strict=True)), torch.zeros(())) for n in sites[0]}
        each = [p * adapter.delta(x, W) for p, x in zip(shares, sites, strict=True)]
        return adapter.delta(mean, W), sum(each, torch.zeros(()))

    for g in gates:
        gated = g * adapter.scaling * frozen["B"] @ frozen["A"]
        assert off(adapter.delta({**frozen, "z": g * ones}, W), gated) < 1e-12
    assert off(*mean_of([{**frozen, "z": g * ones} for g in gates])) < 1e-12
    moved = [{**frozen, "B": draw(out, RANK, seed=40 + k), "z": g * ones} for k, g in enumerate(gates)]
    assert off(*mean_of(moved)) > 0.1, "a gate and B are a product, and that is not seen"
    G = draw(out, into, seed=50)
    of_gate = adapter.scaling * float(adapter.seen(frozen, G)["z"].sum())
    assert of_gate == pytest.approx(float((G * adapter.delta({**frozen, "z": ones}, W)).sum()), rel=1e-12)


def test_s2_layers_of_one_shape_share_their_factors_and_others_do_not(model_folder: Folder) -> None:
    adapter = LoRADiagonal(RANK, ALPHA, tuple(TARGETS["bert"].split(",")), STARTS["shared"]())
    model = adapter.attach(stock(model_folder("bert"), "bert"), 1)
    state = adapter.read(model)
    layers = list(state)
    for i, left in enumerate(layers):
        for right in layers[:i]:
            alike = all(
                torch.equal(state[left][f], state[right][f]) for f in ("A", "B") if same_shape(state, left, right)
            )
            assert alike
    shapes = {(state[layer]["A"].shape, state[layer]["B"].shape) for layer in layers}
    assert 1 < len(shapes) < len(layers)
    one = state[layers[0]]
    assert off(one["A"] @ one["A"].T, torch.eye(RANK)) < 1e-6


def same_shape(state: Mapping[str, Factors], left: str, right: str) -> bool:
    return all(state[left][factor].shape == state[right][factor].shape for factor in ("A", "B"))


def test_s3_salt_is_scaled_singular_values_and_a_low_rank_part_of_the_rest() -> None:
    out, into = WIDE
    W = draw(out, into)
    start = STARTS["svd-of-weights"]()
    adapter = SALT(RANK, float(RANK), ("l",), start)
    factors = begun(adapter, W)
    U, values, Vt = torch.linalg.svd(W)
    a, b, X, Y = draw(RANK, seed=1), draw(RANK, seed=2), draw(out - RANK, RANK, seed=3), draw(RANK, into - RANK, seed=4)
    # The published weight: U diag(a σ + b, ...) Vᵀ, and U_r X Y V_rᵀ of what the first r leave.
    rows = torch.linalg.qr(Y.T)[0].T @ Vt[RANK:]
    kept = torch.cat([a * values[:RANK] + b, values[RANK:]])
    published = (U[:, : len(kept)] * kept) @ Vt[: len(kept)] + U[:, RANK:] @ X @ rows
    signs = torch.sign((U[:, :RANK] * factors["B"]).sum(0))
    ours = {
        "A": Vt[:RANK] * signs[:, None],
        "B": U[:, :RANK] * signs,
        "C": rows,
        "z": (a - 1) * values[:RANK] + b,
        "D": U[:, RANK:] @ X,
    }
    assert off(W + adapter.delta(ours, W), published) < 1e-12
    assert off(ours["A"], factors["A"]) + off(ours["B"], factors["B"]) < 1e-5
    assert off(factors["C"] @ factors["C"].T, torch.eye(RANK)) < 1e-6
    assert float((factors["A"] @ factors["C"].T).abs().max()) < 1e-6


def test_s3_what_of_d_the_leading_outputs_hold_changes_nothing() -> None:
    adapter, W = plain(SALT), draw(*WIDE)
    factors = drawn(adapter, W)
    along = {**factors, "D": factors["D"] + factors["B"] @ draw(RANK, RANK, seed=9)}
    assert off(adapter.delta(along, W), adapter.delta(factors, W)) < 1e-5  # B is rounded to float32


def test_s3_a_rank_that_leaves_no_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs twice as many inputs of a layer, but layer has 5"):
        begun(plain(SALT), draw(*TALL))


# --- FlyLoRA ----------------------------------------------------------------------------------------------------------


def test_y3_sparse_rows_have_length_1_and_the_stated_share_of_inputs() -> None:
    start = STARTS["sparse"](density=0.3)  # type: ignore[call-arg]
    made = start.factors(place(draw(40, 50), rank=8), ("A", "B"))
    assert (made["A"] != 0).sum(1).tolist() == [15] * 8
    assert (made["B"] != 0).sum(0).tolist() == [12] * 8
    assert off(made["A"].norm(dim=1), torch.ones(8)) < 1e-6
    used = [frozenset(row.nonzero().flatten().tolist()) for row in made["A"]]
    assert len(set(used)) == 8, "rows take the same inputs"
    other = start.factors(place(draw(40, 50), layer="other", rank=8), ("A",))["A"]
    assert not torch.equal(other, made["A"])
    assert torch.equal(start.factors(place(draw(40, 50), rank=8), ("A",))["A"], made["A"])
    least = STARTS["sparse"](density=0.001).factors(place(draw(40, 50), rank=8), ("A",))["A"]  # type: ignore[call-arg]
    assert (least != 0).sum(1).tolist() == [1] * 8


# --- Block-LoRA -------------------------------------------------------------------------------------------------------


def block_lora(blocks: int, noise: list[dict[str, Tensor]], A: Tensor, rate: float, adam: bool) -> list[Tensor]:
    """Train (Σ B_i) A s with one shared A (r / n, in) and n blocks B_i (out, r / n)."""
    W, s = draw(*WIDE), 0.7
    start = {"A": A, **{f"B{i}": torch.zeros(WIDE[0], len(A), dtype=torch.float64) for i in range(blocks)}}
    rates = dict.fromkeys(start, rate)
    return trajectory(
        lambda f: s * sum((f[f"B{i}"] for i in range(blocks)), torch.zeros(())) @ f["A"],
        start,
        W,
        noise,
        rates,
        2.0,
        adam=adam,
    )


@pytest.mark.parametrize("adam", [False, True], ids=["dp-sgd", "dp-adam"])
def test_s1_block_lora_is_lora_of_a_part_of_the_rank_at_a_longer_scale(adam: bool) -> None:
    """Block-LoRA(r, n, alpha) = LoRA(r / n, √n alpha) under DP-SGD, and with the rate of B times √n under Adam."""
    blocks, small, s = 3, 2, 0.7
    A = orthonormal_rows(small, WIDE[1], stream(1, "A")).double()
    shapes = {"A": (small, WIDE[1]), "B": (WIDE[0], small)}
    one = noises(shapes)
    # n noises whose sum is √n times the one: all of a sum's law that a step sees.
    split = [{"A": step["A"], **{f"B{i}": step["B"] / math.sqrt(blocks) for i in range(blocks)}} for step in one]
    theirs = block_lora(blocks, split, A, 0.02, adam)
    root = math.sqrt(blocks)
    adapter = LoRA(small, small * s * root, ("l",))

    def ours(rate_of_b: float) -> list[Tensor]:
        start = {"A": A, "B": torch.zeros(WIDE[0], small, dtype=torch.float64)}
        rates = {"A": 0.02, "B": rate_of_b}
        return trajectory(adapter.delta, start, draw(*WIDE), one, rates, 2.0, adam=adam)

    right, wrong = (0.02 * root, 0.02) if adam else (0.02, 0.02 * root)
    assert apart(theirs, ours(right)) < (1e-6 if adam else 1e-12)  # Adam's ε is not scaled
    assert apart(theirs, ours(wrong)) > 1e-3


# --- systems by their names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_that_is_other_rows_is_refused_with_what_to_write_and_that_is_a_run(name: str) -> None:
    with pytest.raises(ConfigError, match="is no adapter here; it is other rows put together: set ") as refused:
        configure({"adapter.name": name})
    named = str(refused.value).partition(": set ")[2]
    assert configure(parse_settings([named])).settings() == configure(SYSTEMS[name]).settings()


def test_block_lora_is_refused_with_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"'Block-LoRA' is no adapter here; n blocks are LoRA of n times less rank"):
        configure({"adapter.name": "Block-LoRA"})

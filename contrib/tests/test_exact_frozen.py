"""Adapters whose large factors are frozen, and systems that are other rows: what is exact, by formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from adapter_models import Folder, float64_model, furthest_from_alone, stock
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
from opacus.grad_sample import GradSampleHooks
from peft import RandLoraConfig, get_peft_model
from torch import Tensor, nn

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS, LoRA
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.adapters.base import FreeScale
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import Factors
from fedveil.common.starts import STARTS
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.contrib.adapters.lora_diagonal import Diagonal, LoRADiagonal
from fedveil.contrib.adapters.randlora import RandLoRA
from fedveil.contrib.adapters.salt import SALT
from fedveil.contrib.starts.lu_of_weights import lu_triple
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream

pytestmark = pytest.mark.peft

# --- RandLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "into"), [(7, 12), (12, 7), (9, 9), (6, 9)])
def test_30_the_change_is_pefts_by_position_and_another_as_the_formula_is_printed(out: int, into: int) -> None:
    adapter, W = plain(RandLoRA), draw(out, into)
    factors = drawn(adapter, W)
    base = nn.Sequential(nn.Linear(into, out, bias=False))
    theirs: Any = get_peft_model(base, RandLoraConfig(r=RANK, randlora_alpha=ALPHA, target_modules=["0"]))  # type: ignore[arg-type]
    layer = theirs.base_model.model[0]
    told, bases = adapter.exported(factors, W), cast(RandLoRA, adapter).bases({"0": factors}, [(out, into)])
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
    shared = cast(RandLoRA, adapter).bases({"a": small, "b": large}, [TALL, WIDE])
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


@pytest.mark.parametrize(
    "name",
    [name for name, kind in ADAPTERS.items() if isinstance(kind.traits.free_scale, FreeScale) and kind.traits.linear],
)
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
        seen = gradients_at_0(adapter, of, g)
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
            assert off(adapter.scaling * gradients_at_0(adapter, factors, G)[trained], slow) < 1e-12
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
    of_gate = adapter.scaling * float(gradients_at_0(adapter, frozen, G)["z"].sum())
    assert of_gate == pytest.approx(float((G * adapter.delta({**frozen, "z": ones}, W)).sum()), rel=1e-12)


def test_s2_layers_of_one_shape_share_their_factors_and_others_do_not(model_folder: Folder) -> None:
    adapter = LoRADiagonal(RANK, ALPHA, tuple(TARGETS["bert"].split(",")), STARTS["shared"]())
    model = attach(adapter, stock(model_folder("bert"), "bert"), 1)
    state = read_factors(adapter, model)
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

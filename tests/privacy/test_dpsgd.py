"""DP-SGD at a site: each promise of ``privacy.dpsgd``, and for each a planted fault that the same check finds.

Statistical checks raise a false alarm about once in a million runs; every band says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpsgd_worlds import FAMILIES, WorldOf, deviation, unchanged, values
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor
from torch.optim import SGD

from audits.bands import related
from audits.faults import (
    clip_doubled,
    noise_halved,
    noise_on_every_second_step,
    same_seeds,
    shared_seed,
    token_mean_loss,
)
from audits.noise_law import NOISY, noise_faults, noise_only
from audits.sensitivity import sensitivity, with_one_long_record
from audits.site_rounds import Round, SiteRounds
from audits.worlds import Gradient, Losses, Recorder, World, alone, flat, fresh_world, norm, plan, released
from fedveil.common.adapters.base import factors_of
from fedveil.common.adapters.layers import layers_of
from fedveil.common.model.batching import length_batches
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.randomness import add_private_noise

CASES = [
    ("bert", "lora", "trained"),
    ("bert", "lora", "frozen"),
    ("bert", "lora-frozen-a", "trained"),
    ("bert", "lora-frozen-a", "frozen"),
    ("gpt2", "lora", "frozen"),
    ("gpt2", "lora-frozen-a", "frozen"),
    ("llama", "lora", "frozen"),
    ("llama", "lora-frozen-a", "frozen"),
    ("bert", "lora-sb", "trained"),
    ("gpt2", "lora-sb", "frozen"),
    ("llama", "lora-sb", "frozen"),
    ("bert", "lora-metric", "trained"),
    ("gpt2", "lora-metric", "frozen"),
]


def clipped_sum(gradients: Sequence[Gradient], clip: float) -> Gradient:
    """Return sum_i g_i min(1, C / ||g_i||) with the norm over all tensors together, in float64."""
    total = [torch.zeros_like(g) for g in gradients[0]]
    for gradient in gradients:
        factor = min(1.0, clip / norm(gradient))
        total = [t + factor * g for t, g in zip(total, gradient, strict=True)]
    return total


# --- per-record gradients ---------------------------------------------------------------------------------------------
def samples_seen(world: World, losses: Losses, monkeypatch: pytest.MonkeyPatch) -> list[Gradient]:
    """Return each record's gradient as the mechanism sees it before the clip, all records in one padded batch."""
    seen: list[Gradient] = []
    real = dpsgd.ClipAndNoise.clip_and_accumulate

    def spy(mechanism: Any) -> None:
        seen.extend(list(map(list, zip(*[p.grad_sample.clone() for p in mechanism.params], strict=True))))
        real(mechanism)

    with monkeypatch.context() as patch:
        patch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", spy)
        released(world, [world.records], plan(clip=1e6), losses)
    return seen


@pytest.mark.parametrize(("family", "adapter", "head"), CASES)
def test_per_record_gradients_equal_a_loop_over_records(
    family: str, adapter: str, head: str, world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(family, adapter, head)
    assert (world.batch()["attention_mask"] == 0).any(), "the batch has no padding, so padding is not tested"
    want = [alone(world, record) for record in world.records]
    assert all(g.norm() > 0 for gradient in want for g in gradient), "a trained tensor has no gradient to compare"

    def worst(losses: Losses) -> float:
        got = samples_seen(world, losses, monkeypatch)
        return max(deviation(g, w) for g, w in zip(got, want, strict=True))

    assert worst(world.model.losses) < 1e-5, "a record's gradient in a padded batch is not its own gradient"
    assert worst(lambda batch: world.model.losses(batch) / len(batch["input_ids"])) > 0.1, "a mean loss went unnoticed"
    assert worst(lambda batch: world.model.losses(batch).flip(0).cumsum(0)) > 0.1, "mixed records went unnoticed"


# --- the clip ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.5, 1.5], ids=["some records clipped", "clip near the largest"])
@pytest.mark.parametrize(("family", "adapter", "head"), CASES)
def test_an_sgd_step_is_the_jointly_clipped_sum_over_the_public_divisor(
    family: str, adapter: str, head: str, share: float, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder(family), family, adapter, head)
    gradients = [alone(world, record) for record in world.records]
    clip = share * float(np.median([norm(g) for g in gradients]))
    before = [p.detach().double().clone() for p in world.trained]
    with PrivateSteps(world.model.module, SGD(world.trained, lr=1.0), plan(clip, divisor=4.0)) as steps:
        steps.step([world.batch()], world.model.losses)
    moved = [b - p.detach().double() for b, p in zip(before, world.trained, strict=True)]
    assert deviation(moved, [g / 4.0 for g in clipped_sum(gradients, clip)]) < 1e-5


def test_the_clip_is_of_the_gradient_behind_the_public_metric(model_folder: Callable[[str], str]) -> None:
    """The fault: the gradient is clipped first and mapped then, so that a step is not as long as the clip allows."""
    world = fresh_world(model_folder("bert"), "bert", "lora-metric", "frozen")
    layers = layers_of(world.model.module)
    V = [factors_of(world.model.adapter, layer)["V"].double() for layer in layers.values()]
    gradients = [alone(world, record) for record in world.records]
    # Behind the map a gradient has nothing left of length in the directions of V but what 1 - 0.9² leaves.
    for gradient in gradients:
        for part, own in zip(gradient, V, strict=True):
            assert float((part.double() @ own.T).norm()) < 0.25 * float(part.double().norm())
    clip = 0.1 * min(norm(g) for g in gradients)
    before = [p.detach().double().clone() for p in world.trained]
    with PrivateSteps(world.model.module, SGD(world.trained, lr=1.0), plan(clip, divisor=1.0)) as steps:
        steps.step([world.batch()], world.model.losses)
    moved = [b - p.detach().double() for b, p in zip(before, world.trained, strict=True)]
    assert deviation(moved, clipped_sum(gradients, clip)) < 1e-5, "what was clipped is not what is sent"


def test_the_clip_is_joint_and_the_check_tells_a_clip_per_tensor_apart(
    world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("bert")
    want = clipped_sum([alone(world, record) for record in world.records], 0.2)
    assert deviation(released(world, [world.records], plan(0.2)), want) < 1e-5

    def per_tensor(mechanism: Any) -> None:
        for parameter in mechanism.params:
            sample = parameter.grad_sample
            lengths = sample.flatten(1).norm(dim=1).clamp(min=1e-12)
            parameter.summed_grad = torch.einsum("i,i...", (0.2 / lengths).clamp(max=1), sample)

    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", per_tensor)
    assert deviation(released(world, [world.records], plan(0.2)), want) > 0.1, "a clip per tensor went unnoticed"


@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_how_a_logical_batch_is_cut_changes_nothing(family: str, adapter: str, head: str, world_of: WorldOf) -> None:
    world = world_of(family, adapter, head)
    want = clipped_sum([alone(world, record) for record in world.records], 0.5)
    by_length = length_batches([len(r["input_ids"]) for r in world.records], budget=40)
    assert 1 < len(by_length) < len(world.records), "the budget cuts the batch into no real parts"
    cuts = {
        "one record a part": [[record] for record in world.records],
        "all in one part": [world.records],
        "sorted by length": [[world.records[i] for i in group] for group in by_length],
    }
    for cut, parts in cuts.items():
        assert deviation(released(world, parts, plan(0.5)), want) < 1e-5, f"{cut}: another result"


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_order_and_any_cut_give_the_same_step(data: st.DataObject, world_of: WorldOf) -> None:
    world = world_of("bert")
    order = data.draw(st.permutations(range(len(world.records))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(order) - 1))))
    parts = [
        [world.records[i] for i in order[a:b]] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True) if b > a
    ]
    assert deviation(released(world, parts, plan(0.5)), released(world, [world.records], plan(0.5))) < 1e-5


@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_under_bfloat16_a_record_still_counts_at_most_the_clip(
    family: str, adapter: str, head: str, world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(family, adapter, head, "bfloat16")
    dtypes = {g.dtype for gradient in samples_seen(world, world.model.losses, monkeypatch) for g in gradient}
    assert torch.bfloat16 in dtypes, "no bfloat16 gradient reached the clip, so its rounding is not tested"
    clip = 0.5 * min(norm(alone(world, record)) for record in world.records)
    norms = [norm(released(world, [[record]], plan(clip))) for record in world.records]
    assert max(norms) <= clip * (1 + 1e-5), "a bfloat16 record counts more than the clip"
    assert min(norms) >= clip * (1 - 1e-3), "a record longer than the clip was cut too short"

    def clip_in_bfloat16(mechanism: Any) -> None:
        for parameter in mechanism.params:
            parameter.grad_sample = parameter.grad_sample.bfloat16()
        lengths = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in mechanism.params]).norm(dim=0)
        for parameter in mechanism.params:
            cut = torch.einsum("i,i...", (clip / lengths).clamp(max=1), parameter.grad_sample)  # all in bfloat16
            parameter.summed_grad = cut.float()

    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", clip_in_bfloat16)
    rounded = [norm(released(world, [[record]], plan(clip))) for record in world.records]
    assert max(rounded) > clip * (1 + 1e-5), "norms rounded to bfloat16 went unnoticed"


def test_under_bfloat16_the_step_stays_near_the_clipped_sum(world_of: WorldOf) -> None:
    world = world_of("bert", precision="bfloat16")
    want = clipped_sum([alone(world, record) for record in world.records], 0.5)
    assert deviation(released(world, [world.records], plan(0.5)), want) < 0.02


# --- sensitivity ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_factor", [1.0, 1e6], ids=["plain", "one extreme loss"])
@pytest.mark.parametrize(("family", "adapter", "head"), CASES)
def test_one_record_changes_the_sum_by_at_most_the_clip(
    family: str, adapter: str, head: str, loss_factor: float, world_of: WorldOf
) -> None:
    world = world_of(family, adapter, head)
    lengths = sorted(len(r["input_ids"]) for r in world.records)
    assert lengths[-1] > 3 * lengths[0], "no record is much longer than another"
    clip = float(np.median([norm(alone(world, record)) for record in world.records]))
    ratio = sensitivity(world, clip, world.marked_times(loss_factor))
    assert 0.99 < ratio <= 1 + 1e-5, f"one record moved the sum by {ratio:.6f} clip norms"


@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_under_bfloat16_one_record_changes_the_sum_by_the_clip_up_to_rounding(
    family: str, adapter: str, head: str, world_of: WorldOf
) -> None:
    # Without a record the batch has another shape, and the forward pass of the others may round otherwise.
    world = world_of(family, adapter, head, "bfloat16")
    assert sensitivity(world, 0.05, world.model.losses) <= 1.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_sensitivity_check_finds_a_mean_over_the_tokens_of_the_batch(family: str, world_of: WorldOf) -> None:
    world = with_one_long_record(world_of(family, "lora", "frozen"))
    # At a clip that the records hardly reach, only a batch-mate's influence can exceed it.
    clip = max(norm(alone(world, record)) for record in world.records)
    assert sensitivity(world, clip, world.model.losses) <= 1 + 1e-5
    with token_mean_loss():
        assert sensitivity(world, clip, world.model.losses) > 1.05, "a loss that couples records went unnoticed"


def test_the_sensitivity_check_finds_a_clip_at_twice_the_bound(world_of: WorldOf) -> None:
    world = world_of("bert")
    with clip_doubled():
        assert sensitivity(world, 0.1, world.model.losses) > 1.05


# --- what is trained --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "adapter", "head"), CASES)
def test_exactly_the_trained_factors_carry_gradients_and_move(
    family: str, adapter: str, head: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = fresh_world(model_folder(family), family, adapter, head)
    named = dict(world.model.module.named_parameters())
    promised = {id(p) for factors in world.model.trained().values() for p in factors.values()}
    before = {name: p.detach().clone() for name, p in named.items()}
    carrying: set[str] = set()
    real = dpsgd.ClipAndNoise.clip_and_accumulate

    def spy(mechanism: Any) -> None:
        carrying.update(n for n, p in named.items() if getattr(p, "grad_sample", None) is not None)
        real(mechanism)

    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", spy)
    with PrivateSteps(world.model.module, SGD(world.trained, lr=0.1), plan()) as steps:
        steps.step([world.batch()], world.model.losses)
    moved = {name for name, p in named.items() if not torch.equal(p.detach(), before[name])}
    assert carrying == {name for name, p in named.items() if id(p) in promised}
    assert moved == carrying, "a frozen tensor moved, or a trained one did not"
    assert any("head" in name for name in carrying) == (head == "trained")
    assert any("lora_A" in name for name in carrying) == (adapter == "lora")


# --- noise ------------------------------------------------------------------------------------------------------------
def test_noise_is_independent_gaussian_of_the_plans_size_also_on_empty_batches(world_of: WorldOf) -> None:
    given = noise_only(world_of("bert"), NOISY, 40)
    assert sum(flat(gradient).numel() for gradient in given) >= 50_000
    assert pytest.approx(3.0 * 0.5 / 7.0) == NOISY.gradient_noise_std
    assert noise_faults(given, 3.0 * 0.5 / 7.0) == set()


def _too_much_and_too_little_in_turn(tensors: int) -> Callable[..., Tensor]:
    calls = iter(range(10**9))
    return lambda total, std: add_private_noise(total, std * (0.5**0.5 if next(calls) // tensors % 2 else 1.5**0.5))


def _seeded_noise(total: Tensor, std: float, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return total + torch.randn(total.shape, generator=draw, dtype=torch.float64) * std


def _same_on_every_step(tensors: int) -> Callable[..., Tensor]:
    calls = iter(range(10**9))
    return lambda total, std: _seeded_noise(total, std, next(calls) % tensors)


def _uniform_of_the_right_size(total: Tensor, std: float) -> Tensor:
    return total + (torch.rand(total.shape, dtype=torch.float64) - 0.5) * 12**0.5 * std


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_too_much_and_too_little_in_turn, "standard deviation of a step"),
        (lambda n: _seeded_noise, "tensors"),
        (_same_on_every_step, "steps"),
        (lambda n: _uniform_of_the_right_size, "shape"),
        (lambda n: lambda total, std: add_private_noise(total, std) + 0.05 * std, "mean"),
    ],
    ids=["uneven", "one draw a shape", "one draw a step", "uniform", "biased"],
)
def test_the_noise_check_finds(
    fault: Callable[[int], Callable[..., Tensor]], found: str, world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("bert")
    monkeypatch.setattr(dpsgd, "add_private_noise", fault(len(world.trained)))
    assert found in noise_faults(noise_only(world, NOISY, 40), NOISY.gradient_noise_std)


@pytest.mark.parametrize("fault", [noise_halved, noise_on_every_second_step])
def test_the_noise_check_finds_too_little(fault: Callable[[], Any], world_of: WorldOf) -> None:
    with fault():
        given = noise_only(world_of("bert"), NOISY, 40)
    assert "standard deviation" in noise_faults(given, NOISY.gradient_noise_std)


def zero_loss(world: World) -> Losses:
    return lambda batch: world.model.losses(batch) * 0.0


def test_two_sites_with_every_seed_equal_share_no_noise(world_of: WorldOf, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of("bert")

    def site() -> Tensor:
        same_seeds()
        return flat(released(world, [world.records], NOISY, zero_loss(world)))

    first, second = site(), site()
    # Noise lies on a grid: two numbers are equal with a chance of 0.28 grid steps over its deviation, at most 3e-4.
    assert (first == second).double().mean() < 0.01, "two sites drew the same noise for a coordinate"
    assert not related(first, second)

    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total + torch.randn(total.shape) * std)
    assert related(site(), site()), "noise that follows torch's seed went unnoticed"


@pytest.fixture
def play_round(toy_settings: dict[str, Any], tmp_path: Path) -> Callable[[str, int], Round]:
    """Return a function that lets a named site of so many records do round 1 of one and the same run."""
    return SiteRounds(toy_settings, tmp_path).play


def test_sites_of_one_run_share_neither_noise_nor_batches(play_round: Callable[[str, int], Round]) -> None:
    size = 100
    first, second = play_round("here", size), play_round("there", size)
    assert first.chosen != second.chosen
    assert not related(first.inclusion(size), second.inclusion(size)), "two sites took the same records"
    idle, other = play_round("idle", 0), play_round("other", 0)
    assert (idle.change == 0).double().mean() < 0.01, "a site without a record must send noise in every coordinate"
    assert not related(idle.change, other.change), "two sites sent the same noise"

    with shared_seed():
        first, second = play_round("a", size), play_round("b", size)
        idle, other = play_round("c", 0), play_round("d", 0)
    assert related(first.inclusion(size), second.inclusion(size)), "batches that follow a seed went unnoticed"
    assert related(idle.change, other.change), "noise that follows a seed went unnoticed"


def test_a_site_without_a_record_in_the_batch_moves_as_much_as_its_noise(
    play_round: Callable[[str, int], Round],
) -> None:
    change = play_round("empty", 0).change / (4**0.5 * 20.0 * 0.5 / 25.0)  # sqrt(steps) sigma C / (q n)
    total, count = float(change.pow(2).sum()), change.numel()
    assert min(stats.chi2.cdf(total, count), stats.chi2.sf(total, count)) > 5e-7  # false alarm 1e-6


# --- a release without a step ---------------------------------------------------------------------------------------
def test_a_release_is_what_a_step_would_hand_over_and_moves_nothing(world_of: WorldOf) -> None:
    world = world_of("bert")
    before = values(world.model.module)
    optimizer = SGD(reversed(world.trained), lr=1.0)
    with PrivateSteps(world.model.module, optimizer, plan(0.5, divisor=4.0)) as steps:
        got = steps.release([world.batch()], world.model.losses)
        names = [id(p) for p in steps.trained]
    assert names == [id(p) for p in world.trained], "the order is not the module's"
    assert unchanged(world.model.module, before)
    want = clipped_sum([alone(world, record) for record in world.records], 0.5)
    assert deviation(got, [g / 4.0 for g in want]) < 1e-5


def test_a_release_carries_the_same_noise_as_a_step(world_of: WorldOf) -> None:
    world = world_of("bert")
    with PrivateSteps(world.model.module, Recorder(world.trained), NOISY) as steps:
        given = [[g.double() for g in steps.release([], world.model.losses)] for _ in range(20)]
    assert noise_faults(given, NOISY.gradient_noise_std) == set()


POISONS = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
@pytest.mark.usefixtures("silence")
def test_a_record_that_is_not_finite_contributes_zero_and_the_others_count(
    family: str, adapter: str, head: str, poison: float, world_of: WorldOf
) -> None:
    world = world_of(family, adapter, head)
    losses, others, poisoned = world.marked_times(poison), world.records[:-1], world.records[-1]
    want = clipped_sum([alone(world, record) for record in others], 0.5)
    for parts in ([world.records], [others, [poisoned]], [[record] for record in world.records]):
        assert deviation(released(world, parts, plan(0.5), losses), want) < 1e-5
    only_poison = released(world, [[poisoned, poisoned]], plan(0.5), losses)
    assert all((g == 0).all() for g in only_poison), "the poisoned record contributed something"


def test_the_check_finds_that_the_stock_clip_lets_a_nan_through(
    world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("bert")
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    want = clipped_sum([alone(world, record) for record in world.records[:-1]], 0.5)
    got = released(world, [world.records], plan(0.5), world.marked_times(float("nan")))
    assert not deviation(got, want) < 1e-5


@pytest.mark.parametrize("large", [1e12, 1e30], ids=["large", "its square is beyond float32"])
@pytest.mark.usefixtures("silence")
def test_a_large_but_finite_loss_counts_one_clip_norm(large: float, world_of: WorldOf) -> None:
    world = world_of("bert")
    got = released(world, [world.records[-1:]], plan(0.5), world.marked_times(large))
    assert norm(got) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("poison", POISONS)
def test_a_batch_of_only_poison_is_noise_only(
    poison: float, world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("bert")
    drawn: list[Tensor] = []

    def remembered(total: Tensor, std: float) -> Tensor:
        drawn.append(add_private_noise(total, std))
        return drawn[-1]

    monkeypatch.setattr(dpsgd, "add_private_noise", remembered)
    got = released(world, [world.records], NOISY, lambda batch: world.model.losses(batch) * poison)
    assert deviation(got, [noise / NOISY.expected_batch_size for noise in drawn]) < 1e-6
    assert flat(got).isfinite().all()


# --- the divisor ------------------------------------------------------------------------------------------------------
def divisors(world: World) -> list[float]:
    """Return by which number batches of different realised size were divided."""
    gradients = [alone(world, record) for record in world.records]
    return [
        norm(clipped_sum(gradients[:size], 0.5))
        / norm(released(world, [world.records[:size]], plan(0.5, divisor=10.0)))
        for size in (1, 2, 4, 7)
    ]


def test_the_divisor_is_the_public_constant_whatever_the_batch(
    world_of: WorldOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of("bert")
    assert divisors(world) == pytest.approx([10.0] * 4, rel=1e-5)

    real = dpsgd.ClipAndNoise.clip_and_accumulate

    def realised(mechanism: Any) -> None:
        mechanism.expected_batch_size = len(mechanism.params[0].grad_sample)
        real(mechanism)

    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", realised)
    assert divisors(world) == pytest.approx([1.0, 2.0, 4.0, 7.0], rel=1e-5), "a realised divisor went unnoticed"


def test_an_empty_batch_is_divided_by_the_same_constant(world_of: WorldOf, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of("bert")
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total + 1.0)
    for parts in ([], [world.records], [[record] for record in world.records]):
        got = released(world, parts, plan(0.5, divisor=8.0), zero_loss(world))
        assert all(torch.allclose(g, torch.full_like(g, 1 / 8)) for g in got)

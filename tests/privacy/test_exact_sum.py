"""The sum of clipped gradients: exact, so that no order and no division shows, and at most a clip for each record."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedveil.common.errors import ConfigError, MechanismError
from fedveil.privacy import dpsgd, grid
from fedveil.privacy.plan import gaussian_plan

SIZES = ((40, 7), (13,))
RECORDS = 60


def gradients(records: int, size: Sequence[int], seed: int) -> Tensor:
    """Return gradients of very different lengths, some of which the clip shortens, and one that is not finite."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(records, *size, generator=draw)
    found *= 10.0 ** torch.randint(-6, 4, (records, *[1] * len(size)), generator=draw)
    found[3].view(-1)[5] = float("nan")
    return found


def mechanism(clip: float, noise: float) -> Any:
    held = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    return dpsgd.ClipAndNoise(
        torch.optim.SGD(held, 0.0), noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=1
    )


def summed(parts: Sequence[Sequence[Tensor]], clip: float = 0.7, noise: float = 0.8) -> Tensor:
    """Return the sum of a step, in whole steps of its grid, as one row."""
    own = mechanism(clip, noise)
    for part in parts:
        for parameter, samples in zip(own.params, part, strict=True):
            parameter.grad_sample = samples
        own.clip_and_accumulate()
    return torch.cat([parameter.summed_grad.flatten() for parameter in own.params]) / own.step_of_sum


def divided(of: Sequence[Tensor], parts: int, seed: int) -> list[list[Tensor]]:
    """Return the records in another order, in so many parts of unlike sizes."""
    order = torch.randperm(len(of[0]), generator=torch.Generator().manual_seed(seed))
    cuts = [round(len(order) * (part / parts) ** 2) for part in range(parts + 1)]
    return [[each[order[a:b]] for each in of] for a, b in pairwise(cuts)]


def test_number_order_and_division_of_parts_show_in_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    of = [gradients(RECORDS, size, i) for i, size in enumerate(SIZES)]

    def sums() -> list[Tensor]:
        return [summed(divided(of, parts, seed)) for seed, parts in enumerate((1, 2, 8, 60), start=1)]

    first, *others = sums()
    assert torch.equal(first, first.round())
    assert bool(first.any())
    assert all(torch.equal(first, other) for other in others)
    of = [torch.cat([each[:3], each[4:]]) for each in of]  # the stock sum would be no number at all
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    first, *others = sums()
    assert not any(torch.equal(first, other) for other in others), "a sum in float32 went unnoticed"


def furthest(noise: float, clip: float = 1.0) -> Fraction:
    """Return by how many clips, exactly, a record moves the sum at most; some numbers are just below a grid step."""
    step, numbers = grid.sum_grid(clip, noise * clip), SIZES[0][0] * SIZES[0][1] + SIZES[1][0]
    even = [torch.full((1, *size), 1.3 * clip / numbers**0.5) for size in SIZES]
    near = [torch.full((1, *size), 0.9 * step) for size in SIZES]
    drawn = [[gradients(RECORDS, size, i)[k : k + 1] for i, size in enumerate(SIZES)] for k in (0, 7, 9, 11)]
    moved = [summed([one, even], clip, noise) - summed([even], clip, noise) for one in (even, near, *drawn)]
    squares = [Fraction(sum(int(number) ** 2 for number in each)) for each in moved]
    return max(squares) * Fraction(step) ** 2 / Fraction(clip) ** 2


def test_a_record_moves_the_sum_by_one_clip_at_most_and_no_bit_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to nearest, a gradient whose numbers lie above half a step gets longer than the clip."""
    noises = (0.01, 0.8, 3.0, 1e5, 1e8)
    assert all(furthest(noise) <= 1 for noise in noises)
    assert furthest(0.8) > 1 - Fraction(1, 10**5), "no record is at the bound, so it is not tested"
    monkeypatch.setattr(Tensor, "trunc_", Tensor.round_)
    assert max(furthest(noise) for noise in noises) > 1, "rounding to nearest went unnoticed"


def test_a_sum_that_may_not_fit_is_refused_before_it_is_paid_and_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grid.most_units(1.0, grid.sum_grid(1.0, 0.01)) > 10**6
    with pytest.raises(ConfigError, match=r"a sum of 5,000,000 gradients .* is not exact .*noise-multiplier"):
        gaussian_plan(1.0, 1e-3, 0.1, 500_000.0, 1e-5, 8.0)
    monkeypatch.setattr(grid, "most_units", lambda clip, step: RECORDS - 1)
    of = [gradients(RECORDS, size, i) for i, size in enumerate(SIZES)]
    summed([[each[1:] for each in of]])
    with pytest.raises(MechanismError, match="more records than a sum of whole numbers holds"):
        summed(divided(of, 8, 1))

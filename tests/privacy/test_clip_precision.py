"""The clip, the sum and the noise hold in numbers, not only on paper, where float32 is too short for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from audits.sensitivity import MOST
from audits.worlds import plan
from fedveil.common.check import CLIP_NORMS, Interval
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.errors import ConfigError
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan


def noiseless_sum(layer: nn.Linear, records: Tensor, part: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the sum of clipped gradients of the layer's summed output, as it is before the noise, in clips."""
    sums: list[Tensor] = []

    def look(mechanism: Any) -> None:
        sums.extend(p.summed_grad.double().flatten() for p in mechanism.params)
        add_noise(mechanism)

    def parts() -> Iterator[Tensor]:
        yield from records.split(part)

    add_noise = dpsgd.ClipAndNoise.add_noise
    with monkeypatch.context() as patch:
        patch.setattr(dpsgd.ClipAndNoise, "add_noise", look)
        with PrivateSteps(layer, torch.optim.SGD(layer.parameters(), lr=0.0), plan(0.5)) as steps:
            steps.release(parts(), lambda batch: layer(batch).sum(1))
    return torch.cat(sums) / 0.5


def moved_by_the_first(layer: nn.Linear, records: Tensor, part: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return by how many clips the sum moves when the first record is taken away."""
    others = noiseless_sum(layer, records[1:], part, monkeypatch)
    return float((noiseless_sum(layer, records, part, monkeypatch) - others).norm())


def one_of_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> float:
    """A record whose gradient is the same number in all 2,250,000 weights of a layer."""
    return moved_by_the_first(nn.Linear(1500, 1500, bias=False), torch.full((1, 1500), 1.3), 1, monkeypatch)


def one_of_many_parts(monkeypatch: pytest.MonkeyPatch) -> float:
    """A record like 24,000 others, in parts of 8: one sum of 3,000 terms that all point one way."""
    draw = torch.Generator().manual_seed(0)
    records = 5 + 0.5 * torch.randn(24_000, 64, generator=draw)
    return moved_by_the_first(nn.Linear(64, 1, bias=False), records, 8, monkeypatch)


@pytest.mark.parametrize("moved", [one_of_a_large_layer, one_of_many_parts])
def test_a_record_moves_the_sum_by_one_clip_also_where_float32_is_too_short(
    moved: Callable[[pytest.MonkeyPatch], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 - MOST < moved(monkeypatch) < MOST
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    assert not 2 - MOST < moved(monkeypatch) < MOST, "the stock clip in float32 passes: the test tests nothing"


def noise_over_clip(clip: float) -> float:
    """Return the standard deviation of what an empty batch hands to the optimiser, in clips; the plan says 1."""
    layer = nn.Linear(200, 200, bias=False)
    with PrivateSteps(layer, torch.optim.SGD(layer.parameters(), lr=0.0), plan(clip, noise=1.0)) as steps:
        (given,) = steps.release([], lambda batch: layer(batch).sum(1))
    return float(given.double().pow(2).mean().sqrt()) / clip


def test_at_both_ends_of_the_clip_norms_the_noise_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for clip in (CLIP_NORMS[0], 1.0, CLIP_NORMS[1]):
        assert abs(noise_over_clip(clip) - 1) < 0.02, f"noise at a clip norm of {clip:g}"  # 5.6 standard errors
    monkeypatch.setattr("fedveil.common.check.CLIP_NORM", Interval(0.0, 1e300))
    assert abs(noise_over_clip(1e-45) - 1) > 0.02, "float32 holds any noise: there is no need for the bounds"


@pytest.mark.parametrize("wrong", [0.0, -1.0, 7.2e-46, 9e-7, 1.1e6, 1e39, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "setting",
    [
        lambda clip: PrivacyConfig(clip_norm=clip),
        lambda clip: gaussian_plan(clip, 1.0, 0.5, 1.0, 1e-5, 8.0),
    ],
    ids=["the run's", "the plan's"],
)
def test_a_clip_norm_whose_noise_float32_cannot_hold_is_refused(setting: Callable[[float], Any], wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"clip-norm must be from 1e-06 to 1e\+06, .*, not"):
        setting(wrong)
    for end in CLIP_NORMS:
        setting(end)

"""The clip and the sum hold in numbers, not only on paper: large layers and very many parts, where float32 does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from audits.sensitivity import MOST
from audits.worlds import plan
from common.privacy import dpsgd
from common.privacy.dpsgd import PrivateSteps


def noiseless_sum(layer: nn.Linear, records: Tensor, part: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the sum of clipped gradients of the layer's summed output, as it is before the noise, in clips."""
    sums: list[Tensor] = []

    def look(mechanism: Any) -> None:
        sums.extend(p.summed_grad.double().flatten() for p in mechanism.params)
        add_noise(mechanism)

    def parts() -> Iterator[Tensor]:
        yield from records.split(part)

    add_noise = dpsgd._Mechanism.add_noise
    with monkeypatch.context() as patch:
        patch.setattr(dpsgd._Mechanism, "add_noise", look)
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
    moved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 - MOST < moved(monkeypatch) < MOST
    monkeypatch.setattr(dpsgd._Mechanism, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    assert not 2 - MOST < moved(monkeypatch) < MOST, "the stock clip in float32 passes: the test tests nothing"

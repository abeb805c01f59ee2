"""Statistical bands; where nothing else is said, the chance of a false alarm is about one in a million."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor


def out_of_band(statistic: float, degrees: int, chance: float = 1e-6) -> bool:
    """Return whether a chi-square statistic lies outside the two-sided band that ``chance`` misses."""
    return bool(min(stats.chi2.cdf(statistic, degrees), stats.chi2.sf(statistic, degrees)) < chance / 2)


def related(left: Tensor, right: Tensor) -> bool:
    """Return whether two samples of independent numbers correlate: |r| above 6/sqrt(N), a 2e-9 chance by accident."""
    r = float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])
    return not abs(r) < 6 / left.numel() ** 0.5

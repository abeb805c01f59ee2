"""States that a server's rules move."""

from __future__ import annotations

import torch
from torch import Tensor

from fedveil.contrib.rules.soft_threshold import entries_shrunk

OUT, INTO, RANK = 13, 9, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published(z: Tensor, threshold: float) -> Tensor:
    """Return what SoRA's code makes: shrunk by ξ, and then what is below ξ dropped."""
    once = entries_shrunk(z, threshold)
    return torch.where(once.abs() < threshold, 0.0, once)

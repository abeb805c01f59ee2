"""A least-squares problem with an adapter, trained privately in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fedveil.common.adapters import LoRAFrozenA

OUT, IN, RANK = 6, 9, 3


def train_privately(
    adapter: LoRAFrozenA, A: Tensor, x: Tensor, y: Tensor, noise: list[Tensor], rate: float, clip: float
) -> tuple[list[Tensor], float]:
    """Return the change of the weight after every step of DP-SGD on B, and the share of clipped records."""
    B, course, clipped = torch.zeros(OUT, RANK, dtype=torch.float64), [], 0
    for draw in noise:
        total = torch.zeros_like(B)
        for record, target in zip(x, y, strict=True):
            residual = adapter.delta({"A": A, "B": B}) @ record - target
            gradient = adapter.scaling * torch.outer(residual, A @ record)
            clipped += int(gradient.norm() > clip)
            total += gradient * min(1.0, clip / float(gradient.norm()))
        B = B - rate / len(x) * (total + clip * draw)
        course.append(adapter.delta({"A": A, "B": B}))
    return course, clipped / (len(noise) * len(x))


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return tensor(RANK, IN) / 3, tensor(5, IN), tensor(5, OUT), [tensor(OUT, RANK) for _ in range(4)]


def gap(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))

"""Layers, weights and trajectories that adapters are compared on, by formulas and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fedveil.common.adapters import Adapter, Place
from fedveil.common.adapters.attach import initial_factors
from fedveil.common.adapters.base import FreeScale
from fedveil.common.messages.state import Factors
from fedveil.common.starts import STARTS

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
    return {name: t.double() for name, t in initial_factors(adapter, "layer", cast(Any, Layer(W)), 1).items()}


def gradients_at_0(adapter: Adapter, factors: Factors, G: Tensor) -> Factors:
    """Return the gradient of what is trained, without the scale, of an adapter whose scale is free."""
    return cast(FreeScale, adapter.traits.free_scale).gradients(factors, G)


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

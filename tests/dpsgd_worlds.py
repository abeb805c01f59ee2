"""Families of base models and their worlds of DP-SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from audits.worlds import Gradient, World, norm

FAMILIES = [("bert", "lora", "trained"), ("gpt2", "lora", "frozen"), ("llama", "lora-frozen-a", "frozen")]


# --- small worlds -----------------------------------------------------------------------------------------------------
WorldOf = Callable[..., World]


def deviation(got: Gradient, want: Gradient) -> float:
    """Return the greatest distance of a tensor from what it should be, over the joint norm of what it should be."""
    return max(float((a.double() - b).norm()) for a, b in zip(got, want, strict=True)) / norm(want)


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def unchanged(module: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p.detach(), b) for p, b in zip(module.parameters(), before, strict=True))

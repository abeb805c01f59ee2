"""Where random numbers come from.

Two kinds that must never be mixed up:

* **Named streams** (adapter start, partitions, non-private batch order) follow from the run's
  public seed, so that every party can derive the same values.
* **Private randomness** (Poisson sampling, Gaussian noise) comes from the operating system's
  entropy. No function here takes a seed for it; whoever knows every seed of a run learns nothing
  about it (PRIVACY: pitfall 11).
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, *names: object) -> torch.Generator:
    """Return the CPU generator of the public stream called ``names`` under ``seed``."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _entropy(count: int) -> np.ndarray:
    """Return ``count`` uniform 64-bit integers from the operating system."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def private_normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Return N(0, std²) noise as float64 on the CPU, by inverse CDF of 52 random bits a value."""
    bits = (_entropy(math.prod(shape)) >> np.uint64(12)).astype(np.float64)
    # 52 bits and a half fit float64 exactly; one bit more could round up to 1, whose inverse is infinite.
    uniform = torch.from_numpy((bits + 0.5) * 2.0**-52)
    return (torch.special.ndtri(uniform) * std).reshape(shape)


def private_poisson_sample(size: int, rate: float) -> Tensor:
    """Return the indices (int64, ascending) of a Poisson sample: each of ``size`` with chance ``rate``."""
    if rate >= 1.0:
        return torch.arange(size)
    threshold = np.uint64(int(rate * 2.0**64))
    return torch.from_numpy((_entropy(size) < threshold).nonzero()[0])

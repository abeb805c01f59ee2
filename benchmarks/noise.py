"""The speed of private noise, as ratios within one run.

    .venv/bin/python benchmarks/noise.py                     # about 20 seconds on 2 cores

Sizes: the adapter of the plain job (a step at a site), query and value of RoBERTa-large at rank 8, and their whole
weights in a round 0 of Fed-SB. Measured in processor time of one thread, in turns: sums with their noise on the grid
(``add_private_noise``), noise from 52 bits in float64 without a grid, torch's own seeded generator, and the floor:
12 bytes a number from the operating system.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedveil.privacy.randomness import add_private_noise

SIZES = {
    "plain job": (24, 8 * 384),
    "RoBERTa-large, r = 8": (96, 8 * 1024),
    "its round 0": (48, 1024 * 1024),
}
"""Tensors, and numbers in each."""
LIMIT = 6.0
"""Most times the floor; in small tensors what each call costs shows."""


def of_52_bits(total: Tensor) -> Tensor:
    bits = (np.frombuffer(os.urandom(8 * len(total)), dtype=np.uint64) >> np.uint64(12)).astype(np.float64)
    return total + torch.special.ndtri(torch.from_numpy((bits + 0.5) * 2.0**-52))


def seconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return each function's median, in processor time; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for taken, function in zip(times, functions, strict=True):
            began = time.process_time()
            function()
            taken.append(time.process_time() - began)
    return [statistics.median(taken) for taken in times]


def ways(tensors: int, size: int) -> list[Callable[[], object]]:
    total = torch.zeros(size, dtype=torch.float64)
    return [
        lambda: [add_private_noise(total, 0.838) for _ in range(tensors)],
        lambda: [os.urandom(12 * size) for _ in range(tensors)],
        lambda: [of_52_bits(total) for _ in range(tensors)],
        lambda: [torch.randn(size, dtype=torch.float64) for _ in range(tensors)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of the small sizes; the largest is drawn once")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slow = []
    for name, (tensors, size) in SIZES.items():
        numbers = tensors * size
        ours, floor, plain, seeded = seconds(ways(tensors, size), arguments.repeats if numbers < 10**7 else 1)
        print(
            f"{name:20} {numbers:10,} numbers: {ours * 1e3:7.1f} ms, {numbers / ours / 1e6:4.1f} million a second; "
            f"{ours / floor:.2f} x the floor (limit {LIMIT}), {ours / plain:.2f} x 52 bits without a grid, "
            f"{ours / seeded:.2f} x torch.randn"
        )
        slow += [name] * (ours > LIMIT * floor)
    if slow:
        sys.exit(f"noise takes more than {LIMIT} times its entropy: {', '.join(slow)}")


if __name__ == "__main__":
    main()

"""FedSVD's re-factorisation at the server: QR and an r × r core against SVDs of the product.

    .venv/bin/python benchmarks/aggregation.py               # about three minutes on 2 cores

RoBERTa-large's shapes: 24 layers, query and value, d = 1024, rank 8, 100 sites. Measured in one run:
one whole aggregation (mean and re-factorisation), the re-factorisation alone, a randomised SVD of the
product (torch.svd_lowrank, 2 iterations), and the full SVD of the product for a few layers, scaled up.
Also the largest tensor that the aggregation allocates, which must stay far below m × n.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedveil.strategies.fed_svd import FedSVD, refactor
from fedveil.strategies.state import Contribution

LAYERS, WIDTH, RANK = 48, 1024, 8


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor made inside it has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                LargestTensor.numbers = max(LargestTensor.numbers, value.numel())
        return result


def seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--full-layers", type=int, default=2, help="layers whose product gets a full SVD")
    arguments = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    adapter = {
        f"layer.{i}": {
            "A": torch.randn(RANK, WIDTH, generator=draw) / WIDTH**0.5,
            "B": torch.zeros(WIDTH, RANK),
        }
        for i in range(LAYERS)
    }
    sites = [
        Contribution(str(k), 1.0 + k % 7, {n: {"B": torch.randn(WIDTH, RANK, generator=draw)} for n in adapter})
        for k in range(arguments.sites)
    ]
    strategy = FedSVD()
    state = strategy.start(adapter, ("B",))
    whole = seconds(lambda: strategy.server_update(state, sites), 3)
    averaged = FedSVD(period=10).server_update(state, sites).adapter
    pairs = [(averaged[name]["B"], averaged[name]["A"]) for name in averaged]
    ours = seconds(lambda: [refactor(B, A) for B, A in pairs], 5)
    low_rank = seconds(lambda: [torch.svd_lowrank(B @ A, q=RANK, niter=2) for B, A in pairs], 3)
    few = pairs[: arguments.full_layers]
    full = seconds(lambda: [torch.linalg.svd(B @ A, full_matrices=False) for B, A in few], 1) * LAYERS / len(few)
    with LargestTensor():
        strategy.server_update(state, sites)
    print(f"one aggregation, {arguments.sites} sites: {whole * 1e3:9.1f} ms")
    print(f"re-factorisation, {LAYERS} layers:  {ours * 1e3:9.1f} ms")
    print(f"randomised SVD of products:    {low_rank * 1e3:9.1f} ms   {low_rank / ours:7.1f} x ours")
    print(f"full SVD of products:          {full * 1e3:9.1f} ms   {full / ours:7.1f} x ours (from {len(few)} layers)")
    limit = 2 * 4 * LAYERS * arguments.sites * WIDTH * RANK
    print(f"bytes read by the mean: {limit / 1e6:.0f} MB; at 10 GB/s that alone is {limit / 1e10 * 1e3:.1f} ms")
    print(f"largest tensor made: {LargestTensor.numbers:,} numbers; an m × n product has {WIDTH * WIDTH:,}")
    if LargestTensor.numbers >= WIDTH * WIDTH:
        sys.exit("an aggregation made a tensor as large as a product of the factors")


if __name__ == "__main__":
    main()

"""Gain of a second core for a site's private training, beside that for plain matrix products, in one run.

    .venv/bin/python benchmarks/cores.py            # about two minutes on 2 cores

Four ways take turns over the same logical batches of the plain job's records: one process on one thread, the same
without privacy, one process whose products are cut among a thread a core, and workers, a core each (``client.cores``).
Beside them the speed of matrix products on one thread, in one process and in a process a core at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

from fedveil.common.threads import THREADS, begin_process, environment, site_cores

begin_process()

import torch  # noqa: E402 (the environment comes first)
from local_training import build, product_speed  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from fedveil.client.cores import Cores  # noqa: E402
from fedveil.client.optimizers import build_optimizer  # noqa: E402
from fedveil.common.data.sources import train_and_test  # noqa: E402
from fedveil.common.model.device import choose_batch_tokens, denormals_flushed  # noqa: E402
from fedveil.common.model.federated import FederatedModel  # noqa: E402
from fedveil.common.model.plain import plain_step  # noqa: E402
from fedveil.common.model.sharing import unshared  # noqa: E402
from fedveil.common.tasks import Record  # noqa: E402
from fedveil.privacy.dpsgd import PrivateSteps  # noqa: E402
from fedveil.privacy.plan import gaussian_plan  # noqa: E402
from fedveil.strategies.job import configure  # noqa: E402

RECORDS = 310
OWN = 32
"""Records whose arithmetic is counted one by one."""
PRODUCT_SECONDS = 3.0


def products_at_once(count: int) -> float:
    """Return the speed of matrix products, operations a second, of so many processes of one thread together."""
    command = [sys.executable, __file__, "--products"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**environment(), THREADS: "1"}) for _ in range(count)
    ]
    return sum(float(process.communicate()[0]) for process in running)


def private_step(model: FederatedModel, records: list[Record], cores: Cores | None) -> None:
    """Take one private step, on workers where there are any."""
    plan = gaussian_plan(1.0, 0.8, 0.1, float(len(records)), 1e-5, 8.0)
    optimizer = build_optimizer(model.trained(), configure({"recipe": "plain"}).config.training)
    shared = cores.opened(model, "sums", plan) if cores else nullcontext(unshared)
    with model.many_passes(), shared as share, PrivateSteps(model.module, optimizer, plan) as steps:
        steps.share = share
        steps.step(model.fixed_batches(records), model.losses)


def open_step(model: FederatedModel, records: list[Record]) -> None:
    """Take one step without privacy, in batches of like length."""
    trained = [p for factors in model.trained().values() for p in factors.values()]
    optimizer = build_optimizer(model.trained(), configure({"recipe": "plain"}).config.training)
    model.module.train()
    plain_step(model.length_batches(records, choose_batch_tokens(0, model.device)), model, optimizer, trained)


def arithmetic(model: FederatedModel, records: list[Record]) -> float:
    """Return the operations of a record's own tokens, on average."""
    with FlopCounterMode(display=False) as counter:
        for record in records[:OWN]:
            open_step(model, [record])
    return counter.get_total_flops() / OWN


def measured(ways: dict[str, tuple[int, Callable[[], None]]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way, which has so many threads, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, (threads, way) in ways.items():
            torch.set_num_threads(threads)
            began = time.perf_counter()
            with denormals_flushed():
                way()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Run the ways in turn and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="logical batches of each way, after one to warm up")
    parser.add_argument("--products", action="store_true", help="print the speed of products and end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job, count = configure({"recipe": "plain"}), site_cores()
    model = build(job, precision="auto")
    if arguments.products:
        print(product_speed(model, PRODUCT_SECONDS))
        return
    train, _ = train_and_test(job.config.data, job.config.model.task)
    records, cores = model.prepare(train.examples[:RECORDS]), Cores(count)
    seconds = measured(
        {
            "without privacy, one thread": (1, lambda: open_step(model, records)),
            "private, one thread": (1, lambda: private_step(model, records, None)),
            "private, a thread a core": (count, lambda: private_step(model, records, None)),
            "private, a worker a core": (1, lambda: private_step(model, records, cores)),
        },
        arguments.repeats,
    )
    cores.close()
    torch.set_num_threads(1)
    one, all_cores = products_at_once(1), products_at_once(count)
    limit = one / arithmetic(model, records)
    rate = {name: RECORDS / statistics.median(values) for name, values in seconds.items()}
    for name, value in rate.items():
        print(f"{name:28} {value:7.1f} records/s, {100 * value / limit:.0f} % of one core's products")
    gain, products = rate["private, a worker a core"] / rate["private, one thread"], all_cores / one
    print(f"{count} cores: products {products:.2f} x, workers {gain:.2f} x ({gain / products:.2f} of it; aim 0.9)")
    price = [p / o for p, o in zip(seconds["private, one thread"], seconds["without privacy, one thread"], strict=True)]
    print(f"time private / open, one thread {statistics.median(price):.2f} x; load {os.getloadavg()[0]:.1f}")
    tokens = [model.collator.size(record) for record in records]
    fixed = sum(length * model.shapes.rows_of(length) for length, _ in model.shapes.groups(tokens))
    print(f"tokens in fixed shapes {fixed / sum(tokens):.2f} of the records' own")


if __name__ == "__main__":
    main()

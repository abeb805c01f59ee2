"""The speed of a site's training, as ratios within one run, and its need of memory.

    .venv/bin/python benchmarks/local_training.py            # about two minutes on 2 cores

Three loops over the same logical batches of the plain job's records:

* plain: what one writes first. Stock model and attention, float32, batches padded as they come;
* ours without privacy: sorted into parts of like length, the precision that pays on this device;
* ours with privacy: in shapes that follow from each record alone (``common.model.shapes``), through per-record
  gradients, clip and noise;
* the same in parts of like length, as without privacy: what the shapes cost. Not private: records move each other.

The loops take turns, so that a machine whose speed drifts drifts for all. The limit of the first
ratio is what sorting saves in padded tokens times what bfloat16 saves in arithmetic; the limit of
any loop is the arithmetic of a record over the speed of this machine's matrix product, measured in
the same run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedveil.client.optimizers import build_optimizer
from fedveil.common.data.sources import train_and_test
from fedveil.common.model.base import load_base_model
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import choose_batch_tokens
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.plain import plain_step
from fedveil.common.tasks import TASKS, Batch
from fedveil.common.threads import own_threads
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies.job import Job, configure

PLAIN_BATCH = 64
OWN = 64
"""Records whose arithmetic is counted one by one."""
DEAREST, SLOWEST = 1.3, 0.8
"""Limits of the time with privacy over that without, and of records a second in fixed shapes over that in free ones."""


def build(job: Job, *, precision: str) -> FederatedModel:
    """Return a fresh model of the job; ``model_of`` would hand out the same one twice."""
    config = job.config
    train, _ = train_and_test(config.data, config.model.task)
    return FederatedModel(
        load_base_model(config.model.name, config.model.task),
        job.adapter,
        TASKS[config.model.task],
        config.head,
        seed=config.seed,
        label_names=train.label_names,
        label_phrases=train.label_phrases,
        feature_scale=config.model.feature_scale,
        max_length=config.model.max_length,
        precision=precision,
    )


def product_speed(model: FederatedModel, seconds: float = 1.0) -> float:
    """Return the floating-point operations per second of a matrix product of the model's usual shape and precision."""
    width = int(model.base.module.config.hidden_size)
    left = torch.randn(1024, width, device=model.device, dtype=model.precision)
    right = torch.randn(width, 4 * width, device=model.device, dtype=model.precision)
    products, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            result = left @ right
        float(result[0, 0])  # a GPU answers only when it is done
        products += 20
    return products * 2 * 1024 * width * 4 * width / (time.perf_counter() - began)


def site_peak(records: int) -> float:
    """Take two private steps as a simulated site's process does, which holds one model, and return its peak in MiB."""
    torch.set_num_threads(own_threads())
    job = configure({"recipe": "plain"})
    model = build(job, precision="auto")
    train, _ = train_and_test(job.config.data, job.config.model.task)
    tokenised = model.prepare(train.examples)
    for start in (0, records):
        optimizer = build_optimizer(model.trained(), job.config.training)
        plan = gaussian_plan(1.0, 0.8, 0.1, float(records), 1e-5, 8.0)
        with model.many_passes(), PrivateSteps(model.module, optimizer, plan) as steps:
            steps.step(model.fixed_batches(tokenised[start : start + records]), model.losses)
    # Not getrusage: its peak includes what the parent held when it started this process.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Run the three loops in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=620, help="of one logical batch; a site's, as expected")
    parser.add_argument("--repeats", type=int, default=4, help="logical batches per loop, after one to warm up")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(site_peak, arguments.records).result()
    torch.set_num_threads(own_threads())
    job = configure({"recipe": "plain"})
    train, _ = train_and_test(job.config.data, job.config.model.task)

    began = time.perf_counter()
    plain, ours = build(job, precision="float32"), build(job, precision="auto")
    print(f"two models built in {time.perf_counter() - began:.1f} s; forward pass in {ours.precision} on {ours.device}")
    plain.base.module.set_attn_implementation("sdpa")
    records = ours.prepare(train.examples)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(1)).tolist()

    plain.module.train()
    plain_optimizer = build_optimizer(plain.trained(), job.config.training)

    def plain_loop(chosen: list[int]) -> None:
        for start in range(0, len(chosen), PLAIN_BATCH):
            batch = plain.batch([records[i] for i in chosen[start : start + PLAIN_BATCH]])
            F.cross_entropy(plain.module(batch), batch["labels"]).backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()

    tokens = choose_batch_tokens(job.config.training.batch_tokens, ours.device)
    mine = [p for factors in ours.trained().values() for p in factors.values()]
    open_optimizer = build_optimizer(ours.trained(), job.config.training)
    plan = gaussian_plan(1.0, 0.8, 0.1, float(arguments.records), 1e-5, 8.0)

    def open_loop(chosen: list[int]) -> None:
        ours.module.train()
        plain_step(ours.length_batches([records[i] for i in chosen], tokens), ours, open_optimizer, mine)

    def private_step(parts: Iterable[Batch]) -> None:
        # A new one for every step, as a site has in every round: a private optimiser serves one mechanism only.
        optimizer = build_optimizer(ours.trained(), job.config.training)
        with PrivateSteps(ours.module, optimizer, plan) as steps:
            steps.step(parts, ours.losses)

    def private_loop(chosen: list[int]) -> None:
        with ours.many_passes():
            private_step(ours.fixed_batches([records[i] for i in chosen]))

    def sorted_loop(chosen: list[int]) -> None:
        private_step(ours.length_batches([records[i] for i in chosen], tokens))

    loops: dict[str, Callable[[list[int]], None]] = {
        "plain": plain_loop,
        "open": open_loop,
        "private": private_loop,
        "sorted": sorted_loop,
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    padded, sorted_tokens, fixed_tokens, own_tokens = 0, 0, 0, 0
    for repeat in range(arguments.repeats + 1):
        chosen = [order[(repeat * arguments.records + i) % len(order)] for i in range(arguments.records)]
        lengths = [ours.collator.size(records[i]) for i in chosen]
        for name, loop in loops.items():
            began = time.perf_counter()
            loop(chosen)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
        for start in range(0, len(lengths), PLAIN_BATCH):
            padded += max(lengths[start : start + PLAIN_BATCH]) * len(lengths[start : start + PLAIN_BATCH])
        sorted_tokens += sum(max(lengths[i] for i in group) * len(group) for group in length_batches(lengths, tokens))
        fixed_tokens += sum(length * ours.shapes.rows_of(length) for length, _ in ours.shapes.groups(lengths))
        own_tokens += sum(lengths)

    with FlopCounterMode(display=False) as own_counter:
        for i in chosen[:OWN]:
            plain_step(iter([ours.batch([records[i]])]), ours, open_optimizer, mine)
    with FlopCounterMode(display=False) as counter:
        open_loop(chosen)
    needed, speed = counter.get_total_flops() / arguments.records, product_speed(ours)
    rate = {name: arguments.records / statistics.median(values) for name, values in seconds.items()}
    speedup = [p / o for p, o in zip(seconds["plain"], seconds["private"], strict=True)]
    price = [p / o for p, o in zip(seconds["private"], seconds["open"], strict=True)]
    shapes = [s / p for p, s in zip(seconds["private"], seconds["sorted"], strict=True)]
    own = own_counter.get_total_flops() / OWN
    print(f"plain loop           {rate['plain']:7.1f} records/s  (float32, padded as they come)")
    print(f"ours, no privacy     {rate['open']:7.1f} records/s")
    print(f"ours, DP-SGD         {rate['private']:7.1f} records/s")
    print(
        f"DP-SGD / plain       {statistics.median(speedup):7.2f} x  ({min(speedup):.2f} to {max(speedup):.2f}); aim: 3"
    )
    print(
        f"time private / open  {statistics.median(price):7.2f} x  ({min(price):.2f} to {max(price):.2f}); "
        f"at most {DEAREST}"
    )
    print(
        f"fixed / free shapes  {statistics.median(shapes):7.2f} x  ({min(shapes):.2f} to {max(shapes):.2f}) records a "
        f"second, both private; at least {SLOWEST}"
    )
    print(
        f"by the arithmetic of the records' own tokens DP-SGD reaches {100 * rate['private'] * own / speed:.0f} % of "
        f"the speed of matrix products, in free shapes {100 * rate['sorted'] * own / speed:.0f} %"
    )
    print(
        f"limit                {speed / needed:7.1f} records/s: {needed / 1e9:.2f} GFLOP a record, matrix products at "
        f"{speed / 1e9:.0f} GFLOP/s; ours without privacy reaches {100 * rate['open'] * needed / speed:.0f} % of it"
    )
    print(
        f"tokens: {own_tokens} of the records, {sorted_tokens} in sorted parts, {fixed_tokens} in fixed shapes "
        f"({fixed_tokens / sorted_tokens:.2f} x), {padded} padded as they come"
    )
    print(f"peak memory of a simulated site's process: {peak:.0f} MiB, whatever the number of rounds")


if __name__ == "__main__":
    main()

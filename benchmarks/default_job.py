"""The default job as a user types it: its seconds, by phase, and what share of them is its own arithmetic.

    .venv/bin/python benchmarks/default_job.py               # Flower's engine: five to ten minutes on 2 cores
    .venv/bin/python benchmarks/default_job.py --in-process  # without Flower and Ray

``fedveil run`` is a process of its own. A round's seconds are those of the run's own lines; one scoring is timed here,
right after. All else is start, checks, loading, the public start and the report. The arithmetic is counted from
shapes: two operations a weight and token of a pass, four more where a backward pass follows. Over the speed of this
machine's matrix products, measured right before and after, that is the least time that the job could take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from local_training import product_speed

from fedveil.common.data.sources import train_and_test
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.threads import own_threads
from fedveil.server.model import ServerModel
from fedveil.strategies.job import Job, configure, with_recipe

FORWARD, BACKWARD = 2, 4
"""Operations of a weight and token."""
SITES = 4


def main() -> None:
    """Run the job, and print its seconds and the share of its arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-process", action="store_true", help="without Flower's engine")
    engine = ["--in-process"] * parser.parse_args().in_process
    torch.set_num_threads(own_threads())
    job = configure(with_recipe({}, sites=SITES)[0])
    server = ServerModel(job)
    speeds = [product_speed(server.model)]
    with tempfile.TemporaryDirectory() as home:
        command = [str(Path(sys.executable).parent / "fedveil"), "run", "--sites", str(SITES), *engine]
        began, before = time.monotonic(), os.times()
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)
        total, after = time.monotonic() - began, os.times()
        lines = [line for path in Path(home).glob("runs/*/rounds.jsonl") for line in read_lines(RoundLine, path.parent)]
    speeds.append(product_speed(server.model))
    began = time.monotonic()
    server.score(server.start)
    each, scored = time.monotonic() - began, sum(line.accuracy is not None for line in lines)
    rounds = sum(line.seconds or 0.0 for line in lines)
    processor = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    print(
        f"{' '.join(['fedveil run', *engine])}: {total:.0f} s, {processor:.0f} s of processor time that it waited for"
    )
    print(f"  rounds without scoring {rounds - scored * each:.0f} s")
    print(f"  {1 + scored} scorings {(1 + scored) * each:.0f} s")
    print(f"  outside training and scoring {total - rounds - each:.0f} s")
    speed = statistics.mean(speeds)
    least = operations(job, server.model, len(server.records), 1 + scored) / speed
    print(
        f"  matrix products at {' and '.join(f'{one / 1e9:.0f}' for one in speeds)} GFLOP/s on {own_threads()} threads"
    )
    print(f"  its own arithmetic at that speed {least:.0f} s: {least / total:.0%} of the job")


def operations(job: Job, model: FederatedModel, tests: int, scorings: int) -> float:
    """Return the operations of the default job: public texts, features twice, derivatives once, scorings."""
    train, test = train_and_test(job.config.data, job.config.model.task)
    tokens = [sum(len(record["input_ids"]) for record in model.prepare(part.examples)) for part in (train, test)]
    public = getattr(job.origin, "records", 0) * tokens[0] / len(train.examples)  # as long as a record is
    passes = FORWARD * (public + 2 * tokens[0] + scorings * tokens[1] * tests / len(test.examples))
    with_backward = (FORWARD + BACKWARD) * (public + tokens[0])
    linear = [module for module in model.base.module.modules() if isinstance(module, torch.nn.Linear)]
    return sum(module.weight.numel() for module in linear) * (passes + with_backward)


if __name__ == "__main__":
    main()

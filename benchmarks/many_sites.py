"""A thousand sites and more: seconds a site, what the memory grows by from round to round, and the server's peak.

    PYTHONPATH=. .venv/bin/python benchmarks/many_sites.py                          # 1,000 simulated sites, 5 rounds
    PYTHONPATH=. .venv/bin/python benchmarks/many_sites.py --sites 10000 --rounds 2 # 20 minutes on one core
    PYTHONPATH=. .venv/bin/python benchmarks/many_sites.py --replies                # RoBERTa-large's shapes

Simulated sites train a tiny model on four records each, in one process, every one with its ledger. Memory is what the
system cannot drop (RssAnon), after a round.

With ``--replies`` the server alone takes 1,000 replies of RoBERTa-large's shapes (24 layers, query and value, d = 1024,
rank 8, both factors: 3.1 MB each), measures, weighs and averages them: once from the disk, where a run keeps them, and
once from memory. Its peak is taken after each step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from audits.finding import quiet
from audits.tiny_models import save_tiny_model, toy_run, write_reviews
from fedveil.common.messages.round import Task
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import l2_norm
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.server.sites import Exchange
from fedveil.server.spool import on_disk
from fedveil.strategies.base import mean
from fedveil.strategies.state import Contribution

LAYERS, WIDTH, RANK = 48, 1024, 8
RECORDS = 4
"""Of each simulated site."""
MOST_GROWTH = 1.05
"""Memory after the last round over that after the first."""
MOST_SHARE = 0.05
"""Of all replies' bytes, what the server's memory may take: most of it is what Python keeps of 96 tensors a reply."""


def anonymous() -> float:
    """Return the memory of this process that the system cannot drop, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1e3


class Measured(InProcessTransport):
    """Says what each round took."""

    began = 0.0
    memory: list[float]

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Let every site answer, and print seconds and memory."""
        began, processor = time.monotonic(), time.process_time()
        exchange = super().exchange(tasks, timeout)
        taken, number = time.monotonic() - began, next(iter(tasks.values())).round_number
        spent = (time.process_time() - processor) / len(tasks)
        Measured.memory.append(anonymous())
        print(
            f"round {number}: {taken:7.1f} s, {1e3 * spent:6.1f} ms of processor a site, "
            f"{Measured.memory[-1]:7.1f} MB after its last reply",
            flush=True,
        )
        return exchange


def simulated(sites: int, rounds: int) -> None:
    """Run that many sites; end the program where memory grows from round to round."""
    Measured.memory = []
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = toy_run(save_tiny_model("bert", folder / "model"), folder)
        records = write_reviews(folder / "many.csv", RECORDS * sites + 100)
        own = {"data.name": str(records), "rounds": rounds, "evaluate-every": rounds, "training.local-steps": 1}
        noise = {"privacy.noise-multiplier": 2.0, "privacy.epsilon": 100.0}
        began = time.monotonic()
        path = run_in_process({**settings, **own, **noise}, sites, kind=Measured)
        print(f"{sites} sites, {rounds} rounds: {time.monotonic() - began:.1f} s in all")
        ledgers = [file for file in path.rglob("*.sqlite*") if file.is_file()]
        size = sum(file.stat().st_size for file in ledgers)
        print(f"ledgers: {len(ledgers)} files, {size / 1e6:.1f} MB")
    growth = Measured.memory[-1] / Measured.memory[0]
    print(f"memory after round {rounds} over that after round 1: {growth:.3f}")
    if growth > MOST_GROWTH:
        sys.exit(f"memory grows by more than {MOST_GROWTH:g}")


def reply(number: int) -> AdapterState:
    """Return what one site sends."""
    draw = torch.Generator().manual_seed(number)
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    return {f"layer.{i}": {n: torch.randn(s, generator=draw) for n, s in shapes.items()} for i in range(LAYERS)}


def replies(sites: int) -> None:
    """Take and average replies, from the disk and from memory; end the program where the disk saves nothing."""
    size = 4 * 2 * LAYERS * WIDTH * RANK / 1e6
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for name, folder in (("disk", Path(scratch)), ("memory", None)):
            before, began, processor, parts, peak = anonymous(), time.monotonic(), time.process_time(), [], 0.0
            for number in range(sites):
                sent = reply(number)
                parts.append(Contribution(f"site-{number}", 1.0, on_disk(sent, folder) if folder else sent))
                peak = max(peak, anonymous() - before)
            lengths = [l2_norm(part.state) for part in parts]
            peak = max(peak, anonymous() - before)
            total = mean(parts)
            peak = max(peak, anonymous() - before)
            print(
                f"{name}: {sites} of {size:.1f} MB; at most {peak:.1f} MB of memory, {peak / size:.1f} of them; "
                f"{time.monotonic() - began:.1f} s, {time.process_time() - processor:.1f} s of processor; "
                f"lengths {sum(lengths):.6f}, mean {l2_norm(total):.9f}",
                flush=True,
            )
            if folder and peak > MOST_SHARE * sites * size:
                sys.exit(f"replies on the disk take more memory than {MOST_SHARE:g} of their size")
            del parts, total, sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replies", action="store_true", help="the server alone, at RoBERTa-large's shapes")
    arguments = parser.parse_args()
    if arguments.replies:
        replies(arguments.sites)
    else:
        simulated(arguments.sites, arguments.rounds)


if __name__ == "__main__":
    main()

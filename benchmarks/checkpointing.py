"""Memory and seconds of a private step under ``model.checkpointing``, as ratios within one run.

    .venv/bin/python benchmarks/checkpointing.py             # about two minutes on 1 core

Each way runs in a process of its own: a step on records as long as a pass takes, after one that pays for what later
ones find ready. Seconds are processor time of one thread; memory is how far the peak is above the
loaded model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "MiniLM, 6 layers, 4 records of 511 tokens": ("all-MiniLM-L6-v2", "classification", "query,value", 511, 4),
    "SmolLM2-135M, 30 layers, 1 record of 511 tokens": ("SmolLM2-135M-Instruct", "causal-lm", "q_proj,v_proj", 511, 1),
}
MOST_SECONDS, MOST_MEMORY = 2.0, 0.75
"""Limits on the ratios of with to without."""
RUNS, STEPS = 1, 2


def peak(*, anew: bool = False) -> float:
    """Return the peak of this process's memory in MiB, on Linux; ``anew`` restarts it at the present use."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def measured(case: str, again: bool) -> tuple[float, float]:
    """Return a step's seconds and the peak's growth in MiB."""
    import torch

    from fedveil.common.adapters import ADAPTERS
    from fedveil.common.config.sections import HeadConfig
    from fedveil.common.model.base import load_base_model
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.starts import STARTS
    from fedveil.common.tasks import TASKS
    from fedveil.privacy.dpsgd import PrivateSteps
    from fedveil.privacy.plan import gaussian_plan

    torch.set_num_threads(1)
    name, task, targets, length, rows = CASES[case]
    model = FederatedModel(
        load_base_model(name, task),
        ADAPTERS["lora"](8, 8.0, tuple(targets.split(",")), STARTS["kaiming"]()),
        TASKS[task],
        HeadConfig("trained" if task == "classification" else "frozen", "random"),
        seed=1,
        label_names=("bad", "good"),
        max_length=length,
        device="cpu",
        precision="float32",
        checkpointing=again,
    )
    invent = model.collator.inventor(model.base, model.max_length)
    batch = model.fixed_batch([invent(length, i, i % 2) for i in range(rows)], length + 1, rows)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    plan = gaussian_plan(1.0, 1.0, 1.0, float(rows), 1e-5, 1.0)
    before, seconds = peak(anew=True), []
    with model.many_passes(), PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), plan) as steps:
        for _ in range(STEPS):
            began = time.process_time()
            steps.release([batch], model.losses)
            seconds.append(time.process_time() - began)
    return seconds[-1], peak() - before


def main() -> int:
    if len(sys.argv) == 3:
        print(json.dumps(measured(sys.argv[1], sys.argv[2] == "again")))
        return 0
    failed = False
    for case in CASES:
        found: dict[str, list[tuple[float, float]]] = {"once": [], "again": []}
        for _ in range(RUNS):
            for way, rows in found.items():
                run = subprocess.run([sys.executable, __file__, case, way], capture_output=True, text=True, check=True)
                seconds, mib = json.loads(run.stdout.splitlines()[-1])
                rows.append((seconds, mib))
        (slow, small), (fast, large) = (map(min, zip(*found[way], strict=True)) for way in ("again", "once"))
        within = slow / fast <= MOST_SECONDS and small / large <= MOST_MEMORY
        failed = failed or not within
        print(
            f"{case}: {slow / fast:.2f} times the seconds ({fast:.2f} to {slow:.2f}; limit {MOST_SECONDS}), "
            f"{small / large:.2f} times the memory ({large:.0f} to {small:.0f} MiB; limit {MOST_MEMORY})"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Processor time of a private step over that of an open one on the same records, for every adapter.

    .venv/bin/python benchmarks/adapters.py                  # about six minutes on 1 core

The model and the records are the plain job's, the rank is 8. Both steps take the records in the same batches, whose
shapes follow from each record alone, so the ratio is what the gradient of each record, clip and noise cost. What the
shapes cost beside that is the same for all adapters but ``none``, and ``benchmarks/local_training.py`` measures it.

The two steps take turns, and the ratio is the median over repeats, after a first that pays for what later ones find
ready. Seconds are processor time of one thread, so that a machine which does other things as well still gives ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedveil.client.optimizers import build_optimizer
from fedveil.common.adapters import ADAPTERS
from fedveil.common.data.sources import train_and_test
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.plain import plain_step
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies.job import Job, configure

RANK = 8
DEAREST = 1.15
"""Limit of a private step's time over that of an open one."""
Pairs = list[tuple[float, float]]
"""Seconds of a private step and of an open one, by repeat."""


def measured(name: str, job: Job, base: BaseModel, train: Dataset, count: int, repeats: int) -> Pairs:
    """Let the two steps take turns on ``count`` records under the adapter called ``name``."""
    config = job.config
    model = FederatedModel(
        # An adapter is put into the base in place.
        replace(base, module=copy.deepcopy(base.module)),
        ADAPTERS[name](RANK, float(RANK), job.adapter.target_modules, STARTS["orthonormal"]()),
        TASKS[config.model.task],
        config.head,
        seed=config.seed,
        label_names=train.label_names,
        label_phrases=train.label_phrases,
        feature_scale=config.model.feature_scale,
        max_length=config.model.max_length,
    )
    order = torch.randperm(len(train.examples), generator=torch.Generator().manual_seed(1)).tolist()
    with model.many_passes():
        records = model.featurise(model.prepare([train.examples[i] for i in order[:count]]))
    trained = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = build_optimizer(model.trained(), config.training)
    plan = gaussian_plan(1.0, 0.8, 0.1, float(count), 1e-5, 8.0)

    def private() -> None:
        # A new optimiser for every step, as a site has in every round: it serves one mechanism only.
        with plan.steps(model, build_optimizer(model.trained(), config.training)) as steps:
            steps.step(plan.parts(model, records), model.losses)

    def opened() -> None:
        with model.many_passes():
            plain_step(model.fixed_batches(records), model, optimizer, trained)

    def seconds(step: Callable[[], None]) -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    model.module.train()
    return [(seconds(private), seconds(opened)) for _ in range(repeats + 1)][1:]


def table(names: Sequence[str], measure: Callable[[str], Pairs]) -> bool:
    """Print a row for each adapter as soon as it is measured; return whether all are within the limit."""
    within = True
    print("| adapter | private, ms | open, ms | private / open | limit | holds |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for name in names:
        pairs = measure(name)
        private, opened = (1000 * statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        ratios = sorted(mine / theirs for mine, theirs in pairs)
        ratio = statistics.median(ratios)
        within = within and ratio <= DEAREST
        print(
            f"| `{name}` | {private:.1f} | {opened:.1f} | {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {DEAREST} | {'yes' if ratio <= DEAREST else 'no'} |",
            flush=True,
        )
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", action="append", choices=list(ADAPTERS), help="of all that are measured by default"
    )
    parser.add_argument("--records", type=int, default=160, help="of one step")
    parser.add_argument("--repeats", type=int, default=4, help="steps of each kind, after one to warm up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = configure({"recipe": "plain"})
    config = job.config
    train, _ = train_and_test(config.data, config.model.task)
    base = load_base_model(config.model.name, config.model.task)

    def measure(name: str) -> Pairs:
        return measured(name, job, base, train, arguments.records, arguments.repeats)

    return 0 if table(arguments.adapter or list(ADAPTERS), measure) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A few real steps on public test records, timed: what a round will take on this machine.

No site's record is used. Memory is this process's peak, which is about what a worker needs: it holds the
same model, and one forward pass is limited by ``training.batch-tokens`` and not by the batch.
"""

from __future__ import annotations

import heapq
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedveil.client.optimizers import build_optimizer
from fedveil.client.unfolding import step_parts
from fedveil.common.config.phases import Schedule
from fedveil.common.config.run import RunConfig
from fedveil.common.data.sources import public_test
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Batch, Record
from fedveil.common.tasks.base import unfolds
from fedveil.common.tasks.examples import Dataset
from fedveil.common.threads import own_threads, site_cores
from fedveil.privacy.plan import Plan, gaussian_plan
from fedveil.privacy.randomness import stream
from fedveil.privacy.steps import nothing
from fedveil.privacy.together import Together
from fedveil.server.model import ServerModel

Trained: TypeAlias = Mapping[str, Mapping[str, nn.Parameter]]
"""Trained tensors by layer and factor."""
MOST_RECORDS = 512
MOST_UNFOLDED = 32
"""As ``MOST_RECORDS``, where each is unfolded, which may take as long as many passes."""
SCORED_RECORDS = 128
FEW_RECORDS = 8
CHUNKS = 8
"""Steps that the measured records are divided among."""
NO_NOISE = 1e-9
"""Noise over clip of the measured steps: too little to change the mean gradient's length."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, on how many public records."""

    records: int
    threads: int
    """Of one worker process."""
    device: str
    step_seconds: float
    """Of a step, whatever its batch."""
    record_seconds: float
    """More for each record of the batch."""
    score_seconds: float
    """Of scoring the public test records once."""
    peak_mib: float
    """Peak memory of this process."""
    accelerator_mib: float
    """Peak memory on the GPU; 0 without one."""
    alignment: tuple[float, float] | None
    """Length of the mean clipped gradient over the clip norm at the start, and its upper end; see ``alignment_of``.
    None where nothing is clipped."""
    feature_seconds: float = 0.0
    """Of computing one record's features, once in a run, or its Jacobian;
    0 where neither is kept."""
    scored_seconds: float = 0.0
    """Of scoring one public test record; a record's features for rounds of the head alone take about as long."""
    load: float = 0.0
    """Of the machine in the minute before: how many processes computed, or waited for a core."""

    def site_seconds(self, steps: int, expected_batch: float) -> float:
        """Return the time of one site's round."""
        return steps * (self.step_seconds + expected_batch * self.record_seconds)


def calibrate(server_model: ServerModel, config: RunConfig, workers: int) -> Calibration:
    """Take a few steps of the configured model on up to 512 public test records and time them.

    ``workers`` processes will train at once, each with its share of the cores. The model's state returns to its start.
    """
    load = os.getloadavg()[0]
    model, threads = server_model.model, torch.get_num_threads()
    order = torch.randperm(len(server_model.records), generator=stream(config.seed, "calibration")).tolist()
    records = [server_model.records[i] for i in order[: MOST_UNFOLDED if unfolds(model.task) else MOST_RECORDS]]
    count = max(1, min(CHUNKS, len(records) // 2))
    chunks, few = [records[i::count] for i in range(count)], records[:FEW_RECORDS]
    worker_threads = min(own_threads(), max(1, site_cores() // workers))
    torch.set_num_threads(worker_threads)
    try:
        model.write(server_model.start)
        if config.timeline.with_inputs("jacobians"):
            featuring, short, steps = _linearised(model, few, chunks, config)
        else:
            featuring = _feature_seconds(server_model, config)
            short, steps = _steps(model, few, chunks, model.trained(), config)
    finally:
        torch.set_num_threads(threads)
    more = len(records) - count * len(few)
    long = sum(seconds for seconds, _ in steps)
    per_record = max(0.0, long - count * short) / more if more > 0 else long / len(records)
    scoring = _scoring_seconds(model, records[:SCORED_RECORDS])
    model.write(server_model.start)
    cuda = model.device.type == "cuda"
    return Calibration(
        records=len(records),
        threads=worker_threads,
        device=str(model.device),
        step_seconds=max(0.0, short - len(few) * per_record),
        record_seconds=per_record,
        score_seconds=scoring * len(server_model.records),
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        accelerator_mib=torch.cuda.max_memory_allocated(model.device) / 2**20 if cuda else 0.0,
        alignment=alignment_of([mean for _, mean in steps]) if _clips(config) else None,
        feature_seconds=featuring,
        scored_seconds=scoring,
        load=load,
    )


def _scoring_seconds(model: FederatedModel, records: Sequence[Record]) -> float:
    """Return the time of scoring one record."""
    began = time.perf_counter()
    model.score(records)
    return (time.perf_counter() - began) / len(records)


def round_seconds(
    calibration: Calibration, steps: int, batches: Sequence[float], workers: int, scored: float = 1.0
) -> tuple[float, float]:
    """Return the mean time of a round: simulated here on ``workers`` processes, and with a machine for each site.

    Sites are taken in order by the next free worker. Both times include scoring the global model in ``scored`` of the
    rounds.
    """
    here, apart = _shared([calibration.site_seconds(steps, batch) for batch in batches], workers)
    scoring = scored * calibration.score_seconds
    return here + scoring, apart + scoring


def feature_seconds(
    calibration: Calibration, schedule: Schedule, sizes: Sequence[int], workers: int
) -> tuple[float, float]:
    """Return the time of what a run computes of records ahead of their steps, as ``round_seconds`` does."""
    jacobians, features = (
        sum(phase.computations() for phase in schedule.with_inputs(kind)) for kind in ("jacobians", "features")
    )
    under_adapter = calibration.scored_seconds if schedule.has_adapter else calibration.feature_seconds
    each = jacobians * calibration.feature_seconds + features * under_adapter
    return _shared([each * size for size in sizes], workers)


def _shared(sites: Sequence[float], workers: int) -> tuple[float, float]:
    """Return when the last site is done: on ``workers`` processes, each taking the next site, and all at once."""
    busy = [0.0] * workers
    for seconds in sites:
        heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy), max(sites)


def _feature_seconds(server_model: ServerModel, config: RunConfig) -> float:
    """Return how long one public test record's features take; 0 where more than the head is trained."""
    model = server_model.model
    if not model.head_only:
        return 0.0
    examples = public_test(config.data, config.model.task).examples[:MOST_RECORDS]
    with model.many_passes():
        model.featurise(model.prepare(examples[:FEW_RECORDS]))  # the first passes pay for what later ones find ready
        records = model.prepare(examples)
        began = time.perf_counter()
        model.featurise(records)
        return (time.perf_counter() - began) / len(records)


def _linearised(
    model: FederatedModel, few: Sequence[Record], chunks: Sequence[Sequence[Record]], config: RunConfig
) -> tuple[float, float, list[tuple[float, Tensor]]]:
    """Return the seconds of one record's derivatives, and as ``_steps`` of steps on them."""
    from fedveil.client.linearised import Computation, Keeping, linearised

    sizes, joined = [len(chunk) for chunk in chunks], [record for chunk in chunks for record in chunk]
    public = Dataset("public", (), ())
    first = Keeping(Computation("few", 1, 0, "", ""), {}, "", public, nothing)
    with linearised(model, few, first):
        pass  # the first passes pay for what later ones find ready
    began = time.perf_counter()
    with linearised(model, joined, replace(first, of=Computation("all", 1, 0, "", ""))) as (vectors, trained):
        each = (time.perf_counter() - began) / len(joined)
        left = iter(vectors)
        return each, *_steps(model, vectors[: len(few)], [list(islice(left, size)) for size in sizes], trained, config)


def _steps(
    model: FederatedModel,
    few: Sequence[Record],
    chunks: Sequence[Sequence[Record]],
    trained: Trained,
    config: RunConfig,
) -> tuple[float, list[tuple[float, Tensor]]]:
    """Return the seconds of a step on few records, and what ``_step`` returns of each chunk."""
    _step(model, few, trained, config)  # the first step pays for what later ones find ready
    short = min(_step(model, few, trained, config)[0] for _ in range(2))
    return short, [_step(model, chunk, trained, config) for chunk in chunks]


def _clips(config: RunConfig) -> bool:
    """Return whether a site's steps clip each record."""
    return config.privacy.mechanism.charged


def _step(
    model: FederatedModel, records: Sequence[Record], trained: Trained, config: RunConfig
) -> tuple[float, Tensor]:
    """Take one step's work on ``records``; return its seconds and the flat mean of clipped gradients (if they are)."""
    from fedveil.privacy.dpsgd import PrivateSteps  # it brings Opacus, which a plan without times does not need

    optimizer = build_optimizer(trained, config.training)
    model.module.train()
    began = time.perf_counter()
    if not _clips(config):
        open_plan = config.privacy.mechanism.exposing_plan(config.privacy, config.training)
        with open_plan.steps(model, optimizer) as steps:
            steps.step(_parts(open_plan, model, records), model.losses)
        return time.perf_counter() - began, torch.zeros(0)
    plan = gaussian_plan(config.privacy.clip_norm, NO_NOISE, 1.0, float(len(records)), 1e-6, 1.0)
    with PrivateSteps(model.module, optimizer, plan) as clipping:
        released = clipping.release(_parts(plan, model, records), model.losses)
    seconds = time.perf_counter() - began
    return seconds, torch.cat([gradient.flatten() for gradient in released]).double().cpu() / plan.event.clip_norm


def _parts(plan: Plan, model: FederatedModel, records: Sequence[Record]) -> Iterable[Batch | Together]:
    """Return a step's batches, in what time it takes to make rows of its records where their task does."""
    return step_parts(plan, model, records, plan.coins(stream(0, "calibration")), nothing, hides=False)


def alignment_of(means: Sequence[Tensor]) -> tuple[float, float]:
    """Return the length of the expected gradient, and that length raised by two standard errors of its square.

    The product of two independent means has the squared length as its expectation. The length of one mean over
    n records would be too long by about 1 / n in the square, because the records' own directions do not average
    out. The standard error is the jackknife's over the means; with fewer than three it is not known, and the
    upper end is that of a perfect alignment, 1.

    Args:
        means: mean clipped gradients over the clip norm, of disjoint sets of records of about one size; flat.
    """
    products = torch.stack(list(means)) @ torch.stack(list(means)).T
    count, apart = len(means), products - torch.diag(products.diag())
    if count < 3:
        return math.sqrt(max(0.0, float(apart.sum()))) / math.sqrt(max(1, count * (count - 1))), 1.0
    square = float(apart.sum()) / (count * (count - 1))
    without = (apart.sum() - 2 * apart.sum(1)) / ((count - 1) * (count - 2))
    error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
    return math.sqrt(max(0.0, square)), min(1.0, math.sqrt(max(0.0, square + 2 * error)))

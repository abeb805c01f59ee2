"""Canaries where steps run on vectors: rounds of the head alone, of a linearised model, and round 0 of a probe.

In a round of the head alone a site steps on features that it keeps; a canary moves one number of the head. A probe's
site releases the way that its head went, in many steps for one charge.
A linearised round's site steps on derivatives that it keeps; a canary's derivatives lie along one number of the
adapter. Batches, clip, noise and price are the ones of a site. A coin decides which records are in, and every record is
in every step (rate 1), because at small rates no audit of this size sees anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from audits.canary import PART, compared
from audits.faults import DOUBLED, EVERY_SECOND, HALVED, SOUND, UNCLIPPED, Fault, noise_on_steps
from audits.shell import each_of
from audits.tiny_site import tiny_run
from fedveil.client.head_alone import head_on_features
from fedveil.client.linearised import Computation, Derivatives, Keeping, below_head, linearised
from fedveil.common.findings import Finding
from fedveil.common.messages.state import HEAD
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES, SCALES, TANGENTS
from fedveil.contrib.starts.probe import Probe
from fedveil.privacy.accounting import epsilon
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies.job import configure

LABELS = 64
"""Of the head; each has as many canaries as the model's features are wide."""
STEPS, NOISE, LENGTH = 9, 1.5, 5.0
DELTA = 1e-5
ROUNDS = 4
"""Each is a canary's chance for each number that is trained, whose work grows with the square of their count."""
_OF, _SOURCE = Computation("canaries", 1, 0, "", ""), Dataset("canaries", (), ())


def charged_once() -> AbstractContextManager[Any]:
    """Charge all steps of a probe as one."""
    release = Probe.release
    return patch.object(Probe, "release", lambda own, least_noise=0.0: replace(release(own, least_noise), count=1))


CHARGED_ONCE = Fault("a probe charged as one step", charged_once)
LAST_STEP = Fault("noise on the last step of a probe alone", lambda: noise_on_steps(lambda step: step == STEPS - 1))


@contextmanager
def _canaries(model: FederatedModel, axes: Tensor, length: float) -> Iterator[list[Record]]:
    """Yield records of these axes of the head's weight, and let the model take them for its own meanwhile."""
    head, width = cast(torch.nn.Linear, model.module.head), model.module.width

    def losses(part: Tensor) -> Tensor:
        inputs, rows = torch.nn.functional.one_hot(part % width, width).float(), (part // width)[:, None]
        # Less the head of nothing, so that the bias has no gradient and the canary one axis.
        return -length * (head(inputs) - head(torch.zeros_like(inputs))).gather(1, rows)[:, 0]

    with ExitStack() as stack:
        for name, stand_in in (
            ("featurise", lambda records, before_pass: records),
            ("fixed_batches", lambda records: torch.tensor([r["axis"] for r in records], dtype=torch.long).split(PART)),
            ("losses", losses),
        ):
            stack.enter_context(patch.object(model, name, stand_in))
        stack.enter_context(patch("fedveil.common.starts.public_metric.MADE", 16))
        yield [{"axis": axis} for axis in axes.tolist()]


def audit_probe(folder: Path, fault: Fault = SOUND) -> Finding:
    """Let a site answer round 0 of runs with a probe, with ``fault`` built in."""
    own: dict[str, Any] = {
        "adapter.name": "lora-metric",
        "adapter.start": "probe",
        "strategy": "fedavg-lora",
        "adapter.rank": 2,
    }
    figures: dict[str, Any] = {"steps": STEPS, "noise-multiplier": NOISE, "sample-rate": 1.0}
    job = configure({**tiny_run(folder), **own, **{f"start.{name}": value for name, value in figures.items()}})
    start = cast(Probe, job.origin)
    model = job.model(tuple(f"label {i}" for i in range(LABELS)))
    size = model.head["weight"].numel()
    whole = gaussian_plan(start.clip_norm, NOISE, 1.0, size, DELTA, 100.0)
    present = torch.rand(ROUNDS, size) < 0.5
    ways = list[Tensor]()
    with fault.plant():
        for row in present:
            with _canaries(model, row.nonzero().flatten(), LENGTH * start.clip_norm) as records:
                released = start.privatise(model, records, start.plan(whole, size))[HEAD]
            ways.append(released["weight"].flatten())
        claimed = epsilon([start.release()], DELTA)
    scores = torch.cat(ways).double().numpy() * size / (start.way * start.clip_norm)
    return compared("canaries of a probe", fault, scores, present.flatten().numpy(), claimed)


def audit_head(folder: Path, fault: Fault = SOUND) -> Finding:
    """Let a site take rounds of steps on the head alone, on features that it keeps, with ``fault`` built in."""
    job = configure({**tiny_run(folder), "strategy": "fedavg-lora"})
    model = job.model(tuple(f"label {i}" for i in range(LABELS)))
    weight = model.head["weight"]
    size = weight.numel()
    plan = gaussian_plan(1.0, NOISE, 1.0, float(size), DELTA, 100.0)
    present = torch.rand(ROUNDS, size) < 0.5
    ways = list[Tensor]()
    with fault.plant():
        for row in present:
            keeping = Keeping(_OF, {}, "site", _SOURCE, lambda: None)
            begun = weight.detach().clone()
            with (
                _canaries(model, row.nonzero().flatten(), LENGTH) as records,
                head_on_features(model, records, keeping) as (seen, trained),
                plan.steps(model, torch.optim.SGD(trained[HEAD].values(), lr=1.0)) as steps,
            ):
                for _ in range(STEPS):
                    steps.step(model.fixed_batches([seen[i] for i in plan.sample(len(seen))]), model.losses)
            ways.append((weight.detach() - begun).flatten())
        claimed = epsilon([plan.release(STEPS)], DELTA)
    scores = torch.cat(ways).double().numpy() * size / STEPS
    return compared("canaries of the head", fault, scores, present.flatten().numpy(), claimed)


def audit_linearised(folder: Path, fault: Fault = SOUND) -> Finding:
    """Let a site take rounds of steps on kept derivatives, with ``fault`` built in."""
    job = configure({**tiny_run(folder), "strategy": "fedavg-lora", "phases": "2 adapter on jacobians"})
    model = job.model(("bad", "good"))
    size = sum(p.numel() for p in model.below_head().values())
    plan = gaussian_plan(1.0, NOISE, 1.0, float(size), DELTA, 100.0)
    scores, coins = list[np.ndarray](), list[np.ndarray]()
    with fault.plant():
        for _ in range(ROUNDS):
            present = torch.rand(size) < 0.5
            way = _way(model, _vectors(model, present.nonzero().flatten(), 2 * LENGTH), plan)
            scores.append(-way.double().numpy() * size / STEPS)
            coins.append(present.numpy())
    claimed = epsilon([plan.release(STEPS)], DELTA)
    return compared("canaries of derivatives", fault, np.concatenate(scores), np.concatenate(coins), claimed)


def _vectors(model: FederatedModel, axes: Tensor, length: float) -> tuple[Record, ...]:
    """Return records whose derivatives lie along these axes; half of their length is the gradient's, at even odds."""
    size, width = sum(p.numel() for p in model.below_head().values()), model.module.width
    alone = torch.nn.functional.one_hot(axes, size).half()[:, None]
    return tuple(
        {FEATURES: torch.zeros(width), TANGENTS: row, SCALES: torch.tensor([length]), "labels": 0} for row in alone
    )


def _way(model: FederatedModel, records: tuple[Record, ...], plan: Any) -> Tensor:
    """Return how far the adapter goes in one round of steps with learning rate 1."""
    kept = {"site": Derivatives(_OF, below_head(model), _SOURCE, records)}
    keeping = Keeping(_OF, kept, "site", _SOURCE, lambda: None)
    with linearised(model, records, keeping) as (seen, trained):
        step = trained[TANGENTS]["step"]
        with plan.steps(model, torch.optim.SGD([step], lr=1.0)) as steps:
            for _ in range(STEPS):
                steps.step(model.fixed_batches([seen[i] for i in plan.sample(len(seen))]), model.losses)
        return step.detach().clone()


CASES: dict[Callable[[Path, Fault], Finding], tuple[Fault, ...]] = {
    audit_head: (HALVED, EVERY_SECOND, DOUBLED, UNCLIPPED),
    audit_probe: (HALVED, EVERY_SECOND, LAST_STEP, DOUBLED, UNCLIPPED, CHARGED_ONCE),
    audit_linearised: (HALVED, EVERY_SECOND, DOUBLED),
}
"""Each audit with the faults that it must find."""


def audit_vectors(folder: Path) -> Sequence[Finding]:
    """Audit each as it is, then with each fault."""
    return each_of(CASES, folder)

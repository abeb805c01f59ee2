"""The rehearsals of a process's model, and the most time that every round of a run may take.

Before the first charge of a run every kind of round that is still to come is rehearsed (``client.rehearsal``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from fedveil.client.budget import evaluation_releases
from fedveil.client.cache import RecordCache
from fedveil.client.linearised import check_memory, contrasts
from fedveil.client.local_training import columns_of, hides_failures
from fedveil.client.rehearsal import (
    rehearse,
    rehearse_columns,
    rehearse_features,
    rehearse_head,
    rehearse_initial,
    rehearse_linearised,
)
from fedveil.client.site import Site
from fedveil.client.timing import Timing
from fedveil.common.config.phases import Inputs
from fedveil.common.messages.round import TrainTask
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import PaidStart
from fedveil.common.tasks.base import unfolds
from fedveil.privacy.together import units_at_once
from fedveil.strategies.job import Job

PLAIN, INITIAL, FEATURED = "plain steps", "round 0", "features"
ON_JACOBIANS, ON_FEATURES = "steps on Jacobians", "the head's steps on features"
"""What a model rehearses, in this order."""
STEPS: Mapping[Inputs, str] = {"jacobians": ON_JACOBIANS, "features": ON_FEATURES}
"""Steps that pass no record through the model."""


@dataclass
class Rehearsals:
    """What of private training the current model is known to do rightly, and how fast; all of made-up records."""

    cache: RecordCache
    """Drops features that were computed before features are rehearsed."""
    timings: dict[str, Timing] = field(default_factory=dict)
    """By the names above."""

    def forget(self) -> None:
        """Let everything be rehearsed again."""
        self.timings = {}

    def forecasts(self, job: Job, site: Site, model: FederatedModel, task: TrainTask) -> list[tuple[float, float]]:
        """Let the model rehearse the rest of the run, and return ``forecast`` of its rounds, the task's own last.

        A later round that would be refused is refused now: the rounds before it would be paid for, and buy nothing.

        The public size counts, since how many records there are must decide nothing that shows; ``fedveil site check``
        and a start refuse fewer than there are.

        Raises:
            ModelError: it cannot be trained privately.
        """
        schedule = job.config.timeline
        if schedule.with_inputs("jacobians"):
            check_memory(model, job.config.privacy.rows_of_unit * site.public_size)
        if not job.mechanism.rehearsed:
            return [(math.inf, 0.0)] if hides_failures(job) else []
        kinds = kinds_of_rounds(job, site, model, task)
        self._rehearse(job, model, kinds)
        return [self.forecast(job, site, model, number, steps.name) for number, steps in reversed(kinds.items())]

    def forecast(self, job: Job, site: Site, model: FederatedModel, number: int, steps: str) -> tuple[float, float]:
        """Return the most seconds of a round, and those of them that a step needs to be left when it begins a pass.

        Args:
            job: what is run.
            site: who answers.
            model: as it was rehearsed.
            number: the round's.
            steps: what its steps through the model are called, if it makes any.
        """
        config, start, inputs = job.config, paid_start(job, number), inputs_of(job, model, number)
        cheap = steps if start or model.head_only else STEPS.get(inputs, steps)
        timing = self.timings[INITIAL if start else cheap]
        if cheap != steps:
            timing = replace(timing, score=self.timings[steps].score)  # records are scored as they are
        paid = start.release() if start else None
        passed = paid.count * start.passes if paid and start else config.training.local_steps
        count, rate = passed, paid.event.sample_rate if paid else job.sample_rate
        scored = site.public_size if number and evaluation_releases(job, site, 1) else 0
        each = config.privacy.rows_of_unit
        at_once = fewest_at_once(job, model, start)
        worst, reserve = timing.worst(count, rate * site.public_size, scored, each, at_once), timing.reserve(count)
        if inputs != "examples":  # a new process computes them of all records first, in whatever round it is
            passes = contrasts(model) if inputs == "jacobians" else 1
            ahead = self.timings[steps if inputs == "jacobians" else FEATURED]
            worst += passes * ahead.worst(1, float(each * site.public_size), 0)
            reserve += ahead.reserve(1)
        return worst, reserve

    def _rehearse(self, job: Job, model: FederatedModel, kinds: Mapping[int, Steps]) -> None:
        """Let the model rehearse what it has not, for these rounds.

        What changes how the model computes, such as how it attends or which shapes it takes, has all that passed
        before it pass again: another kind of round is to be no question that makes a rehearsed one untrue.
        """
        inputs = {inputs_of(job, model, number) for number in kinds}
        wanted: dict[str, Callable[[], Timing]] = {steps.name: steps.rehearse for steps in kinds.values()}
        if start := paid_start(job, min(kinds)):
            wanted[INITIAL] = partial(rehearse_initial, model, start)
        if "features" in inputs:
            wanted[FEATURED] = partial(self._featured, model)
        if "jacobians" in inputs:
            wanted[ON_JACOBIANS] = partial(rehearse_linearised, model)
        if not model.head_only and any(job.config.timeline.at(n).inputs == "features" for n in kinds if n):
            wanted[ON_FEATURES] = partial(rehearse_head, model)
        while missing := next((name for name in wanted if name not in self.timings), ""):
            before = _ways(model)
            try:
                timing = wanted[missing]()
            finally:  # also where it fails: the next task may be for a round that has passed
                now = _ways(model)
                if any(now[way] != what for way, what in before.items()):
                    self.forget()
            self.timings[missing] = timing

    def _featured(self, model: FederatedModel) -> Timing:
        """Let features be rehearsed, and drop those that were computed before."""
        self.cache.set_aside(vectors=False)
        return rehearse_features(model)


@dataclass(frozen=True)
class Steps:
    """Steps through the model of one kind."""

    name: str
    """Of their own: what passed for others would train in shapes, or through factors, that nothing has looked at."""
    rehearse: Callable[[], Timing]


def kinds_of_rounds(job: Job, site: Site, model: FederatedModel, task: TrainTask) -> dict[int, Steps]:
    """Return a task's round, and of the rounds after it the first of each phase and of each kind of steps.

    Before round 1 nothing says which columns a strategy chooses: then the steps are those of the whole adapter.

    Raises:
        ProtocolError, PolicyRefusal: as for ``columns_of``, of any of these rounds.
    """
    first, schedule = task.round_number, job.config.timeline
    found = {first: steps_of(job, site, model, task)}
    seen = {(found[first].name, schedule.computation(first)[0] if first else -1)}
    for number in range(first + 1, schedule.rounds + 1):
        steps = steps_of(job, site, model, replace(task, round_number=number)) if first else found[first]
        kind = steps.name, schedule.computation(number)[0]
        if kind not in seen:
            seen.add(kind)
            found[number] = steps
    return found


def steps_of(job: Job, site: Site, model: FederatedModel, task: TrainTask) -> Steps:
    """Return the steps of a task's round through the model."""
    chosen, _ = columns_of(site, job, task, model)
    if chosen is not None:
        widths = {layer: {name: len(columns) for name, columns in chosen[layer].items()} for layer in sorted(chosen)}
        return Steps(f"steps on columns: {widths}", partial(rehearse_columns, model, chosen))
    return Steps(PLAIN, partial(rehearse, model))


def paid_start(job: Job, number: int) -> PaidStart | None:
    """Return what is paid for in a round, if that is number 0."""
    return job.origin if not number and isinstance(job.origin, PaidStart) else None


def inputs_of(job: Job, model: FederatedModel, number: int) -> Inputs:
    """Return what the steps of a round are on; round 0 is the start's own."""
    if number:
        return job.config.timeline.at(number).inputs
    start = paid_start(job, number)
    return "features" if model.head_only or (start and start.on_features) else "examples"


def fewest_at_once(job: Job, model: FederatedModel, start: PaidStart | None) -> int:
    """Return how many units of several rows a step passes together at least, by what it trains."""
    if not job.unit.grouped and not unfolds(model.task):
        return sys.maxsize
    with start.opened(model) if start else nullcontext():
        return units_at_once(sum(p.numel() for p in model.module.parameters() if p.requires_grad))


def _ways(model: FederatedModel) -> dict[str, object]:
    """Return what a rehearsal may change of how the model computes records of other rehearsals."""
    of_vectors = {str(tangents): shapes for tangents, shapes in model.vector_shapes.items()}
    return {"attention": model.attention, "lowers": model.lowers, "shapes": model.shapes, **of_vectors}

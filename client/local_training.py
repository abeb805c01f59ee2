"""One site's part of a round, start to end; the only training loop.

Order matters: what the server sent is checked first, then the round is priced and charged to the
ledger on disk, or written down there as an exposure, and only then a record is touched. Which records a
step takes, how they pass, and what clips and noises is the plan's, which the mechanism has made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from fedveil.client.budget import enter_round, evaluation_releases, note_failure, shares_noise
from fedveil.client.deadline import Deadline
from fedveil.client.evaluation import noised_correct
from fedveil.client.failures import failures_of
from fedveil.client.head_alone import head_on_features
from fedveil.client.linearised import Computation, Derivatives, Keeping, forget_records, linearised
from fedveil.client.optimizers import build_optimizer, set_learning_rate
from fedveil.client.outgoing import own_words
from fedveil.client.site import Site
from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.common.log import about
from fedveil.common.messages.columns import Chosen, check_chosen, narrowed
from fedveil.common.messages.round import NoisedCount, TrainResult, TrainTask, same_fingerprint
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint, merge
from fedveil.common.model.device import denormals_flushed
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import PaidStart, UnpaidStart
from fedveil.common.starts.gradient import BATCH_TOKENS
from fedveil.common.tasks import Record
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.privacy.randomness import stream
from fedveil.privacy.secure_sum.masks import Words
from fedveil.privacy.steps import Around
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")


def train_round(
    site: Site,
    job: Job,
    model: FederatedModel,
    records: Sequence[Record] | Callable[[], Sequence[Record]],
    task: TrainTask,
    deadline: Deadline | None = None,
    kept: MutableMapping[str, Derivatives] | None = None,
    masked: Callable[[Words], bytes] | None = None,
) -> TrainResult:
    """Do one round and return what the server is sent; in round 0, the statistic that the start is made from.

    Args:
        site: the site's name, public size and ledger.
        job: the run's checked configuration.
        model: this process's model; its adapter state is overwritten.
        records: the site's records, as the model takes them, or what makes them once they are paid for.
        task: what the server sent.
        deadline: when the answer is to leave; None: as soon as it is there.
        kept: what this process keeps of a linearised run, by site; None: nothing.
        masked: puts this site's masks on a vector of a secure sum, once; None: it is none.

    Raises:
        ProtocolError: the task does not fit this run or this model; nothing was charged.
        BudgetExhausted: the round would exceed the site's budget; nothing was charged or trained.
        PolicyRefusal: a rule of the site's steward forbids the round; nothing was charged or trained.
    """
    check_task(task, job, model)
    chosen, rank = columns_of(site, job, task, model)
    deadline = deadline or Deadline()
    words: Words | None = None
    counted, failure, failures = None, None, failures_of(job, deadline)
    plan, spending = enter_round(site, job, task, deadline)
    try:
        with model.many_passes(), denormals_flushed():
            prepared = records() if callable(records) else records
            records = model.featurise(prepared, failures.deadline.check)
    except Exception as error:
        records, failure = [], failures.caught(error)  # paid for already, as a step that fails
    if not task.round_number:
        contribution, failed = _statistic(records, job, model, plan, deadline, site)
    else:
        received = job.strategy.install(merge(model.start, task.basis), task.state)
        model.write(received)
        if evaluation_releases(job, site, 1):
            noise = site.policy.metrics_noise
            with denormals_flushed():
                counted = NoisedCount(noised_correct(model, records, noise), noise)
        known = {} if kept is None else kept
        words, failed = _local_steps(records, job, model, task, received, plan, deadline, site, known)
        trained = {
            layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
            for layer, factors in model.trained().items()
        }
        if masked is not None and words is None:
            # Its noise is a part of what the sum needs: it must not leave as it is.
            raise MechanismError("a round of a secure sum has no vector: nothing is sent")
        trained, received = narrowed(trained, chosen), narrowed(received, chosen)
        contribution = plan.outgoing(trained, received) if words is None else {}
    failure = failure or failed
    result = TrainResult(
        *(task.run, task.round_number, site.name, plan.told_size(site.public_size), contribution),
        *(spending, counted),
    )
    if task.round_number:
        result = replace(result, rank=rank)
    if words is not None:
        if masked is None:
            raise MechanismError("the vector of a secure sum has no mask: nothing of it can be sent")
        result = replace(result, words=masked(words))
    if failure is not None:
        _note_noise(failure, site, task, deadline)
    return result


@denormals_flushed()
def _statistic(
    records: Sequence[Record], job: Job, model: FederatedModel, plan: Plan, deadline: Deadline, site: Site
) -> tuple[AdapterState, str | None]:
    """Return what the start is made from, and why it is noise alone if it is; as _local_steps does it."""
    origin, size = job.origin, len(records)
    model.write(model.start)
    if isinstance(origin, UnpaidStart):
        order = torch.randperm(size, generator=stream(job.config.seed, "initial-gradient", site.name)).tolist()
        chosen = order[: max(1, round(origin.sample_rate * size))]
        return origin.measure(model, model.length_batches([records[i] for i in chosen], BATCH_TOKENS)), None
    paid, own = cast(PaidStart, origin), cast(PrivacyPlan, plan)  # pay_round refuses any other, and has paid for it
    try:
        return paid.privatise(model, records, own, deadline.check), None
    except Exception as error:
        failure = own_words(error)
        return paid.privatise(model, [], own), failure


def check_task(task: TrainTask, job: Job, model: FederatedModel) -> None:
    """Raise ProtocolError unless the task fits this run, this base model and this adapter start."""
    if bool(task.offers) != shares_noise(job):
        raise ProtocolError("a task has the keys of a secure sum, or lacks them, against privacy.mode")
    if not task.round_number and job.origin.asked != "sites":
        raise ProtocolError(f"the server asks for round 0, in which the start {job.origin.name!r} asks no site")
    wanted = job.frozen_for(job.start(model.start), task.round_number)
    # In round 0 nothing of it is needed; what comes all the same would be kept for the rounds after it.
    due = task.basis or (task.round_number and wanted)
    if due and not same_fingerprint(task.basis_fingerprint, fingerprint(task.basis)):
        raise ProtocolError("the factors that are sent once are not those that the server says it sent")
    if task.round_number > job.config.rounds:
        raise ProtocolError(f"the task is for round {task.round_number}, the run has {job.config.rounds}")
    if not same_fingerprint(task.base_fingerprint, model.base.fingerprint):
        same, quantised = "the same weights", job.config.model.quantise
        if quantised != "none":
            same += f", and for model.quantise {quantised!r} the same version of bitsandbytes,"
        raise ProtocolError(
            f"the server's base model is {task.base_fingerprint[:12]}, this site's {model.base.name!r} is "
            f"{model.base.fingerprint[:12]}: install {same} on both sides"
        )
    if not same_fingerprint(task.start_fingerprint, job.start_fingerprint(model.start)):
        raise ProtocolError(
            "the adapter's start differs from the server's: seed, rank, targets, public text or versions differ"
        )


def columns_of(site: Site, job: Job, task: TrainTask, model: FederatedModel) -> tuple[Chosen | None, int]:
    """Return the columns that the site trains in a task's round, checked to be the adapter's, and its declared rank.

    Raises:
        ProtocolError: what was received chooses none that the adapter has.
        PolicyRefusal: the site does not train so many.
    """
    if not task.round_number:
        return None, 0
    chosen, rank = site.trained_columns(job, task.state, task.round_number)
    if chosen is not None:
        check_chosen(chosen, model.start)
    return chosen, rank


@denormals_flushed()
def _local_steps(
    records: Sequence[Record],
    job: Job,
    model: FederatedModel,
    task: TrainTask,
    received: AdapterState,
    plan: Plan,
    deadline: Deadline,
    site: Site,
    kept: MutableMapping[str, Derivatives],
) -> tuple[Words | None, str | None]:
    """Take the round's steps, and return what is sent in place of the trained tensors, if anything is, and why not.

    If they fail where that must not show, they are taken on no record, and the second is why.

    The rehearsal has seen every shape pass, and what fails on one record is left out. Should a step fail all the same,
    such as for memory that others took meanwhile, a refusal would show it, so noise is sent. That is no part of the
    claim: from a whole sum to none is further than one clip.
    """
    failures = failures_of(job, deadline)
    try:
        return _take_steps(records, job, model, task, plan, site, failures.deadline, kept), None
    except Exception as error:
        why = failures.caught(error)
        model.write(received)
        return _take_steps([], job, model, task, plan, site, Deadline(), kept), why


def _take_steps(
    records: Sequence[Record],
    job: Job,
    model: FederatedModel,
    task: TrainTask,
    plan: Plan,
    site: Site,
    deadline: Deadline,
    kept: MutableMapping[str, Derivatives],
) -> Words | None:
    config = job.config.training
    first = (task.round_number - 1) * config.local_steps
    with _trainable(records, job, model, task, site, deadline, kept) as (seen, trained):
        optimizer = build_optimizer(trained, config, job.config.site_head_rate)
        batches = plan.batches(model, seen, stream(job.config.seed, "batches", site.name), first)
        with plan.steps(model, optimizer, Around(deadline.check)) as steps:
            for step in range(config.local_steps):
                deadline.check()  # steps that draw no record have no pass, and take their noise's time all the same
                set_learning_rate(optimizer, job.config.site_rate(task.round_number, step))
                chosen = next(batches)
                steps.step(plan.parts(model, [seen[i] for i in chosen]), model.losses)
            return steps.words


@contextmanager
def _trainable(
    records: Sequence[Record],
    job: Job,
    model: FederatedModel,
    task: TrainTask,
    site: Site,
    deadline: Deadline,
    kept: MutableMapping[str, Derivatives],
) -> Iterator[tuple[Sequence[Record], Mapping[str, Mapping[str, nn.Parameter]]]]:
    """Yield the records that the steps take, and what they train, by layer and factor."""
    schedule, number = job.config.timeline, task.round_number
    inputs = "examples" if model.head_only else schedule.at(number).inputs
    if inputs == "examples":  # or the features that such a model's records have
        chosen, _ = columns_of(site, job, task, model)
        with model.columns_alone(chosen):
            yield records, model.trained()
        return
    keeping = Keeping(Computation.of_task(task, schedule), kept, site.name, site.data, deadline.check)
    with (head_on_features if inputs == "features" else linearised)(model, records, keeping) as both:
        yield both
    if schedule.ends_computation(number):
        forget_records(kept, site.name)


def _note_noise(reason: str, site: Site, task: TrainTask, deadline: Deadline) -> None:
    """Say at the site, in its log and its ledger, that noise alone is sent."""
    where = about(task.run, task.round_number)
    log.error("the round failed after its charge, and noise alone is sent: %s", reason, extra=where)
    note_failure(site, task, reason, deadline)

"""One site's part of a round, start to end; the only training loop.

Order matters: what the server sent is checked first, then the round is priced and charged to the
ledger on disk, or written down there as an exposure, and only then a record is touched. Which records a
step takes, how they pass, and what clips and noises is the plan's, which the mechanism has made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from fedveil.client.budget import enter_round, evaluation_releases, note_failure, shares_noise
from fedveil.client.deadline import Deadline
from fedveil.client.evaluation import noised_correct
from fedveil.client.head_alone import head_on_features
from fedveil.client.linearised import Computation, Derivatives, Keeping, forget_records, linearised
from fedveil.client.optimizers import build_optimizer, set_learning_rate
from fedveil.client.outgoing import own_words
from fedveil.client.site import Site
from fedveil.client.unfolding import step_parts
from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.common.log import about
from fedveil.common.messages.columns import Chosen, check_chosen, narrowed
from fedveil.common.messages.formats import FLOAT32
from fedveil.common.messages.round import NoisedCount, TrainResult, TrainTask, same_fingerprint
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import fingerprint, merge
from fedveil.common.model.alone import columns_alone
from fedveil.common.model.device import denormals_flushed
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.sharing import Share, unshared
from fedveil.common.starts import PaidStart, UnpaidStart
from fedveil.common.starts.gradient import BATCH_TOKENS
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import unfolds
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.privacy.randomness import stream
from fedveil.privacy.secure_sum.masks import Words
from fedveil.privacy.steps import nothing
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")


@dataclass(frozen=True)
class _Round:
    """One training round of one site, once it is charged."""

    site: Site
    job: Job
    model: FederatedModel
    task: TrainTask
    plan: Plan
    kept: MutableMapping[str, Derivatives]
    """What the process keeps of rounds on features or Jacobians, by site."""


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
        site, job, task: who trains, by which configuration, and what the server sent.
        model: this process's model; its adapter state is overwritten.
        records: the site's records, as the model takes them, or what makes them once they are paid for.
        deadline: when the answer is to leave; None: as soon as it is there.
        kept: what this process keeps of a linearised run, by site; None: nothing.
        masked: puts this site's masks on a vector of a secure sum, once; None: the run has no secure sum.

    Raises:
        ProtocolError: the task does not fit this run or this model; nothing was charged.
        BudgetExhausted: the round would exceed the site's budget; nothing was charged or trained.
        PolicyRefusal: a rule of the site's steward forbids the round; nothing was charged or trained.
    """
    check_task(task, job, model)
    chosen, rank = columns_of(site, job, task, model)
    deadline = deadline or Deadline()
    plan, spending = enter_round(site, job, task, deadline.check_prepared)
    deadline.begin_round()
    # Where a failure is refused, a late answer is better than none.
    before_pass = deadline.check if hides_failures(job) else nothing
    examples, failure = _featurised(records, job, model, before_pass)
    if task.round_number:
        this = _Round(site, job, model, task, plan, {} if kept is None else kept)
        result, failed = _trained(examples, this, chosen, before_pass, masked)
    else:
        model.shown = task.basis
        statistic, failed = _statistic(examples, job, model, plan, before_pass, site)
        model.shown = None
        result = _result(site, task, plan, statistic)
    if failure := failure or failed:
        where = about(task.run, task.round_number)
        log.error("the round failed after its charge, and noise alone is sent: %s", failure, extra=where)
        note_failure(site, task, failure, deadline.left() / 2)  # half: the row itself takes its time too
    return replace(result, spending=spending, rank=rank)


def _featurised(
    records: Sequence[Record] | Callable[[], Sequence[Record]],
    job: Job,
    model: FederatedModel,
    before_pass: Callable[[], None],
) -> tuple[Sequence[Record], str | None]:
    """Return records as the steps take them, or none and why: they are paid for, as a step that fails is."""
    try:
        with model.many_passes(), denormals_flushed():
            return model.featurise(records() if callable(records) else records, before_pass), None
    except Exception as error:
        return [], _hidden(error, job)


def hides_failures(job: Job) -> bool:
    """Return whether a failure after the charge is answered by noise alone: a refusal would tell of the records."""
    return job.mechanism.conceals


def _hidden(error: Exception, job: Job) -> str:
    """Return what the site's own log says of an error that the answer hides; raise one that is refused."""
    if hides_failures(job):
        return own_words(error)
    raise error


def _result(site: Site, task: TrainTask, plan: Plan, contribution: AdapterState) -> TrainResult:
    """Return what is sent of a round, without its price."""
    size = plan.told_size(site.public_size)
    return TrainResult(task.run, task.round_number, site.name, size, contribution, None, precision=task.precision)


def _trained(
    records: Sequence[Record],
    this: _Round,
    chosen: Chosen | None,
    before_pass: Callable[[], None],
    masked: Callable[[Words], bytes] | None,
) -> tuple[TrainResult, str | None]:
    """Train a round on columns that are ``chosen``; return what is sent of it, and why it is noise alone if it is."""
    site, job, model, task = this.site, this.job, this.model, this.task
    received = job.strategy.install(merge(model.start, task.basis), task.state)
    model.write(received)
    counted = None
    if evaluation_releases(job, site, 1):
        noise = site.policy.metrics_noise
        with denormals_flushed():
            counted = NoisedCount(noised_correct(model, records, noise), noise)
    words, failed = _local_steps(records, this, received, before_pass)
    if words is None and masked is not None:
        # Its noise is a part of what the sum needs: it must not leave as it is.
        raise MechanismError("a round of a secure sum has no vector: nothing is sent")
    if words is not None and masked is None:
        raise MechanismError("the vector of a secure sum has no mask: nothing of it can be sent")
    if words is not None and masked is not None:
        return replace(_result(site, task, this.plan, {}), words=masked(words), noised_correct=counted), failed
    trained = {
        layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
        for layer, factors in job.sent(task.round_number, model.trained()).items()
    }
    before = narrowed(received, chosen)
    contribution = this.plan.outgoing(narrowed(trained, chosen), before)
    if task.precision != FLOAT32:  # of what is released, and of what was received
        contribution = {
            layer: {name: tensor - before[layer][name].float().cpu() for name, tensor in factors.items()}
            for layer, factors in contribution.items()
        }
    return replace(_result(site, task, this.plan, contribution), noised_correct=counted), failed


@denormals_flushed()
def _statistic(
    records: Sequence[Record],
    job: Job,
    model: FederatedModel,
    plan: Plan,
    before_pass: Callable[[], None],
    site: Site,
) -> tuple[AdapterState, str | None]:
    """Return what the start is made from, and why it is noise alone if it is; as _local_steps does it."""
    origin, size = job.origin, len(records)
    model.write(model.start)
    if isinstance(origin, UnpaidStart):
        order = torch.randperm(size, generator=stream(job.config.seed, "initial-gradient", site.name)).tolist()
        chosen = order[: max(1, round(origin.sample_rate * size))]
        return origin.measure(model, model.length_batches([records[i] for i in chosen], BATCH_TOKENS)), None
    # pay_round refuses any other, and has paid for it
    paid, priced = cast(PaidStart, origin), cast(PrivacyPlan, plan)
    try:
        return paid.privatise(model, records, priced, before_pass), None
    except Exception as error:
        failure = own_words(error)
        return paid.privatise(model, [], priced), failure


def check_task(task: TrainTask, job: Job, model: FederatedModel) -> None:
    """Raise ProtocolError unless the task fits this run, this base model and this adapter start."""
    if bool(task.offers) != shares_noise(job):
        raise ProtocolError("a task has the keys of a secure sum, or lacks them, against privacy.mode")
    if not task.round_number and job.origin.asked != "sites":
        raise ProtocolError(f"the server asks for round 0, in which the start {job.origin.name!r} asks no site")
    due = task.basis or job.brought_layout(model.start, job.start(model.start), task.round_number)
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
        PolicyRefusal: the site does not train that many.
    """
    if not task.round_number:
        return None, 0
    chosen, rank = site.trained_columns(job, task.state, task.round_number)
    if chosen is not None:
        check_chosen(chosen, model.start)
    return chosen, rank


@denormals_flushed()
def _local_steps(
    records: Sequence[Record], this: _Round, received: AdapterState, before_pass: Callable[[], None]
) -> tuple[Words | None, str | None]:
    """Take the round's steps, and return what is sent in place of the trained tensors, if anything is, and why not.

    If they fail where that must not show, they are taken on no record, and the second is why.

    The rehearsal has seen every shape pass, and what fails on one record is left out. Should a step fail all the same,
    such as for memory that others took meanwhile, a refusal would show it, so noise is sent. That is no part of the
    claim: from a whole sum to none is further than one clip.
    """
    try:
        return _take_steps(records, this, before_pass), None
    except Exception as error:
        failure = _hidden(error, this.job)
        this.model.write(received)
        return _take_steps([], this, nothing), failure


def _take_steps(records: Sequence[Record], this: _Round, before_pass: Callable[[], None]) -> Words | None:
    job, model, config = this.job, this.model, this.job.config.training
    first = (this.task.round_number - 1) * config.local_steps
    with _trainable(records, this, before_pass) as (inputs, trained):
        optimizer = build_optimizer(trained, config, job.config.site_head_rate)
        batches = this.plan.batches(model, inputs, stream(job.config.seed, "batches", this.site.name), first)
        coins = this.plan.coins(stream(job.config.seed, "coins", this.site.name, first))
        with _shared(this) as share, this.plan.steps(model, optimizer, before_pass) as steps:
            if isinstance(steps, PrivateSteps):
                steps.share = share
            for step in range(config.local_steps):
                before_pass()  # steps that draw no record have no pass, and take their noise's time all the same
                set_learning_rate(optimizer, job.config.site_rate(this.task.round_number, step))
                batch = [inputs[i] for i in next(batches)]
                parts = step_parts(this.plan, model, batch, coins, before_pass, hides=hides_failures(job))
                steps.step(parts, model.losses)
            return steps.words


@contextmanager
def _shared(this: _Round) -> Iterator[Share]:
    """Yield what shares the passes of a round's steps: those through the model that a sum without order is made of."""
    inputs = this.job.config.timeline.at(this.task.round_number).inputs
    alone = this.model.head_only or inputs != "examples" or unfolds(this.model.task)
    if alone or not isinstance(this.plan, PrivacyPlan):
        yield unshared
        return
    with this.model.many_passes(), this.model.sharing.opened(this.model, "sums", this.plan) as share:
        yield share


@contextmanager
def _trainable(
    records: Sequence[Record], this: _Round, before_pass: Callable[[], None]
) -> Iterator[tuple[Sequence[Record], Mapping[str, Mapping[str, nn.Parameter]]]]:
    """Yield the records that the steps take, and what they train, by layer and factor."""
    site, model, task, schedule = this.site, this.model, this.task, this.job.config.timeline
    inputs = "examples" if model.head_only else schedule.at(task.round_number).inputs
    if inputs == "examples":  # or the features that such a model's records have
        chosen, _ = columns_of(site, this.job, task, model)
        with columns_alone(model, chosen):
            yield records, model.trained()
        return
    keeping = Keeping(Computation.of_task(task, schedule), this.kept, site.name, site.data, before_pass)
    with (head_on_features if inputs == "features" else linearised)(model, records, keeping) as trainable:
        yield trainable
    if schedule.ends_computation(task.round_number):
        forget_records(this.kept, site.name)

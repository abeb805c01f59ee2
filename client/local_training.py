"""One site's part of a round, start to end; the only training loop.

Order matters: what the server sent is checked first, then the round is priced and charged to the
ledger on disk, and only then a record is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from client.optimizers import build_optimizer, set_learning_rate
from client.site import Site
from common.batching import length_batches
from common.errors import DataError, ProtocolError
from common.initial_gradient import mean_gradient, private_gradient
from common.messages import Spending, TrainResult, TrainTask, same_fingerprint
from common.model import FederatedModel
from common.privacy.accounting import Release
from common.privacy.dpsgd import PrivateSteps, rounding_margin
from common.privacy.ledger import Ledger
from common.privacy.plan import PrivacyPlan
from common.randomness import private_poisson_sample, stream
from common.schedule import learning_rate
from common.tasks import Batch, Record
from common.tensors import fingerprint, merge, start_fingerprint
from strategies import Job
from strategies.base import GradientSource

INITIAL_BATCH_TOKENS = 1024
"""Tokens of one forward pass in round 0: per-record gradients of whole layers are large."""


def train_round(site: Site, job: Job, model: FederatedModel, records: Sequence[Record], task: TrainTask) -> TrainResult:
    """Train one round and return what the strategy sends.

    Args:
        site: the site's name, public size and ledger.
        job: the run's checked configuration.
        model: this process's model; its adapter state is overwritten.
        records: the site's records, tokenised.
        task: what the server sent.

    Raises:
        ProtocolError: the task does not fit this run or this model; nothing was charged.
        BudgetExhausted: the round would exceed the site's budget; nothing was charged or trained.
    """
    check_task(task, job, model)
    plan, spending = None, None
    if job.config.privacy.on:
        plan = plan_of(job, site)
        spending = charge(site, plan, plan.release(job.config.training.local_steps), task)
    model.write(job.strategy.install(merge(model.start, task.basis), task.state))
    _take_steps(records, job, model, task.round_number, site, plan)
    trained = {
        layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
        for layer, factors in model.trained().items()
    }
    return TrainResult(
        task.run, task.round_number, site.name, site.public_size, job.strategy.contribution(trained), spending
    )


def initial_round(
    site: Site, job: Job, model: FederatedModel, records: Sequence[Record], task: TrainTask
) -> TrainResult:
    """Answer round 0: one full gradient of the adapted layers, privatised and charged while privacy is on.

    Arguments and errors as in train_round; also ProtocolError if the strategy asks sites for no gradient.
    """
    check_task(task, job, model)
    source = job.strategy.gradient
    if source is None or source.public_data:
        raise ProtocolError(f"the server asks for an initial gradient, which {job.strategy.name!r} does not use here")
    spending, size = None, len(records)
    model.write(model.start)
    if job.config.privacy.on:
        plan = plan_of(job, site)
        initial = dataclasses.replace(
            plan,
            clip_norm=source.clip_norm,
            noise_multiplier=source.noise_multiplier,
            sample_rate=source.sample_rate,
            expected_batch_size=source.sample_rate * site.public_size,
        )
        spending = charge(site, initial, initial_release(source), task)
        chosen = private_poisson_sample(size, source.sample_rate).tolist()
        gradient = private_gradient(model, _parts(records, chosen, model, INITIAL_BATCH_TOKENS), initial)
    else:
        order = torch.randperm(size, generator=stream(job.config.seed, "initial-gradient", site.name)).tolist()
        chosen = order[: max(1, round(source.sample_rate * size))]
        gradient = mean_gradient(model, _parts(records, chosen, model, INITIAL_BATCH_TOKENS))
    return TrainResult(task.run, 0, site.name, site.public_size, gradient, spending)


def initial_release(source: GradientSource) -> Release:
    """Return what round 0 costs a site."""
    return Release(source.noise_multiplier, source.sample_rate, 1, kind="initialisation")


def plan_of(job: Job, site: Site) -> PrivacyPlan:
    """Return the site's plan for the whole run, with room for a paid initialisation."""
    config, source = job.config, job.strategy.gradient
    before = [initial_release(source)] if source and not source.public_data else []
    return PrivacyPlan.for_run(config.privacy, config.training, config.total_steps, site.public_size, before)


def check_task(task: TrainTask, job: Job, model: FederatedModel) -> None:
    """Raise ProtocolError unless the task fits this run, this base model and this adapter start."""
    wanted = job.strategy.basis(job.strategy.start(model.start))
    if task.round_number and wanted and not same_fingerprint(task.basis_fingerprint, fingerprint(task.basis)):
        raise ProtocolError("the factors that are sent once are not those that the server says it sent")
    if task.round_number > job.config.rounds:
        raise ProtocolError(f"the task is for round {task.round_number}, the run has {job.config.rounds}")
    if not same_fingerprint(task.base_fingerprint, model.base.fingerprint):
        raise ProtocolError(
            f"the server's base model is {task.base_fingerprint[:12]}, this site's {model.base.name!r} is "
            f"{model.base.fingerprint[:12]}: install the same weights on both sides"
        )
    if not same_fingerprint(task.start_fingerprint, start_fingerprint(model.start)):
        raise ProtocolError("the adapter's start differs from the server's: seed, rank, targets or versions differ")


def charge(site: Site, plan: PrivacyPlan, release: Release, task: TrainTask) -> Spending:
    """Write the round's cost to the site's ledger, durably, and return it for the report."""
    site.ledger_path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(site.ledger_path) as ledger:
        charged = ledger.charge(
            site.dataset_id,
            [release],
            run=task.run,
            round_number=task.round_number,
            delta=plan.delta,
            max_epsilon=plan.max_epsilon,
            clip_norm=plan.clip_norm,
        )
    return Spending(
        kind=release.kind,
        sample_rate=plan.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        steps_round=charged.steps_round,
        steps_total=charged.steps_total,
        delta=plan.delta,
        epsilon_round=charged.epsilon_increment,
        epsilon_total=charged.epsilon_after,
        epsilon_budget=plan.max_epsilon,
        epsilon_remaining=charged.epsilon_remaining,
        accountant=charged.accountant,
    )


def _take_steps(
    records: Sequence[Record], job: Job, model: FederatedModel, round_number: int, site: Site, plan: PrivacyPlan | None
) -> None:
    config = job.config.site_training
    parameters = [p for factors in model.trained().values() for p in factors.values()]
    first = (round_number - 1) * config.local_steps
    peak, total = config.learning_rate, job.config.total_steps
    optimizer = build_optimizer(model.trained(), config)
    model.module.train()
    if plan is not None:
        with PrivateSteps(model.module, optimizer, plan, noise_margin=rounding_margin(model.precision)) as steps:
            for step in range(config.local_steps):
                set_learning_rate(optimizer, learning_rate(config.schedule, peak, first + step, total))
                chosen = private_poisson_sample(len(records), plan.sample_rate).tolist()
                steps.step(_parts(records, chosen, model, config.batch_tokens), model.losses)
        return
    batches = _epochs(len(records), config.sample_rate, stream(job.config.seed, "batches", site.name, round_number))
    for step in range(config.local_steps):
        set_learning_rate(optimizer, learning_rate(config.schedule, peak, first + step, total))
        plain_step(_parts(records, next(batches), model, config.batch_tokens), model, optimizer, parameters)


def plain_step(
    parts: Iterator[Batch], model: FederatedModel, optimizer: Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """Take one step on the mean loss of a batch given in parts; no privacy."""
    optimizer.zero_grad(set_to_none=True)
    seen = 0
    for part in parts:
        losses = model.losses(part)
        losses.sum().backward()
        seen += len(losses)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= seen
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _parts(records: Sequence[Record], chosen: Sequence[int], model: FederatedModel, budget: int) -> Iterator[Batch]:
    for group in length_batches([len(records[i]["input_ids"]) for i in chosen], budget):
        yield model.batch([records[chosen[i]] for i in group])


def _epochs(size: int, sample_rate: float, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of the same expected size as the private sampler's, without replacement inside an epoch."""
    if not size:
        raise DataError("this site has no records to train on")
    count = max(1, min(size, round(sample_rate * size)))
    pending: list[int] = []
    while True:
        while len(pending) < count:
            pending += torch.randperm(size, generator=generator).tolist()
        yield pending[:count]
        pending = pending[count:]

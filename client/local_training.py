"""One site's part of a round, start to end; the only training loop.

Order matters: what the server sent is checked first, then the round is priced and charged to the
ledger on disk, and only then a record is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from client.optimizers import build_optimizer, learning_rate
from client.site import Site
from common.batching import length_batches
from common.errors import ProtocolError
from common.messages import Spending, TrainResult, TrainTask
from common.model import FederatedModel
from common.privacy.dpsgd import PrivateSteps
from common.privacy.ledger import Ledger
from common.privacy.plan import PrivacyPlan
from common.randomness import private_poisson_sample, stream
from common.tasks import Batch, Record
from common.tensors import start_fingerprint
from common.types import AdapterState
from strategies import Job


def train_round(
    site: Site, job: Job, model: FederatedModel, start: AdapterState, records: Sequence[Record], task: TrainTask
) -> TrainResult:
    """Train one round and return what the strategy sends.

    Args:
        site: the site's name, public size and ledger.
        job: the run's checked configuration.
        model: this process's model; its adapter state is overwritten.
        start: the adapter's seeded start, as read from the freshly built model.
        records: the site's records, tokenised.
        task: what the server sent.

    Raises:
        ProtocolError: the task does not fit this run or this model; nothing was charged.
        BudgetExhausted: the round would exceed the site's budget; nothing was charged or trained.
    """
    check_task(task, job, model, start)
    plan, spending = None, None
    if job.config.privacy.on:
        plan = PrivacyPlan.for_run(job.config.privacy, job.config.training, job.config.total_steps, site.public_size)
        spending = charge_round(site, job, plan, task)
    model.write(job.strategy.install(start, task.state))
    _take_steps(records, job, model, task.round_number, site, plan)
    trained = {
        layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
        for layer, factors in model.trained().items()
    }
    return TrainResult(
        task.run, task.round_number, site.name, site.public_size, job.strategy.contribution(trained), spending
    )


def check_task(task: TrainTask, job: Job, model: FederatedModel, start: AdapterState) -> None:
    """Raise ProtocolError unless the task fits this run, this base model and this adapter start."""
    if task.round_number > job.config.rounds:
        raise ProtocolError(f"the task is for round {task.round_number}, the run has {job.config.rounds}")
    if task.base_fingerprint != model.base.fingerprint:
        raise ProtocolError(
            f"the server's base model is {task.base_fingerprint[:12]}, this site's {model.base.name!r} is "
            f"{model.base.fingerprint[:12]}: install the same weights on both sides"
        )
    if task.start_fingerprint != start_fingerprint(start):
        raise ProtocolError("the adapter's start differs from the server's: seed, rank, targets or versions differ")


def charge_round(site: Site, job: Job, plan: PrivacyPlan, task: TrainTask) -> Spending:
    """Write the round's cost to the site's ledger, durably, and return it for the report."""
    site.ledger_path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(site.ledger_path) as ledger:
        charge = ledger.charge(
            site.dataset_id,
            [plan.release(job.config.training.local_steps)],
            run=task.run,
            round_number=task.round_number,
            delta=plan.delta,
            max_epsilon=plan.max_epsilon,
            clip_norm=plan.clip_norm,
        )
    return Spending(
        sample_rate=plan.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        steps_round=charge.steps_round,
        steps_total=charge.steps_total,
        delta=plan.delta,
        epsilon_round=charge.epsilon_increment,
        epsilon_total=charge.epsilon_after,
        epsilon_budget=plan.max_epsilon,
        epsilon_remaining=charge.epsilon_remaining,
        accountant=charge.accountant,
    )


def _take_steps(
    records: Sequence[Record], job: Job, model: FederatedModel, round_number: int, site: Site, plan: PrivacyPlan | None
) -> None:
    config = job.config.training
    parameters = [p for factors in model.trained().values() for p in factors.values()]
    optimizer = build_optimizer(parameters, config)
    first = (round_number - 1) * config.local_steps
    model.module.train()
    if plan is not None:
        with PrivateSteps(model.module, optimizer, plan) as steps:
            for step in range(config.local_steps):
                _set_rate(optimizer, learning_rate(config, first + step, job.config.total_steps))
                chosen = private_poisson_sample(len(records), plan.sample_rate).tolist()
                steps.step(_parts(records, chosen, model, config.batch_tokens), model.losses)
        return
    batches = _epochs(len(records), config.sample_rate, stream(job.config.seed, "batches", site.name, round_number))
    for step in range(config.local_steps):
        _set_rate(optimizer, learning_rate(config, first + step, job.config.total_steps))
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


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _parts(records: Sequence[Record], chosen: Sequence[int], model: FederatedModel, budget: int) -> Iterator[Batch]:
    for group in length_batches([len(records[i]["input_ids"]) for i in chosen], budget):
        yield model.batch([records[chosen[i]] for i in group])


def _epochs(size: int, sample_rate: float, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of the same expected size as the private sampler's, without replacement inside an epoch."""
    count = max(1, min(size, round(sample_rate * size)))
    pending: list[int] = []
    while True:
        while len(pending) < count:
            pending += torch.randperm(size, generator=generator).tolist()
        yield pending[:count]
        pending = pending[count:]

"""One site's part of a round, start to end; the only training loop.

Order matters: what the server sent is checked first, then the round is priced and charged to the
ledger on disk, or written down there as one without privacy, and only then a record is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from client.budget import evaluation_releases, note_exposure, pay_initialisation, pay_round
from client.evaluation import noised_correct
from client.optimizers import build_optimizer, set_learning_rate
from client.site import Site
from common.batching import epoch_batches, length_batches
from common.device import choose_batch_tokens
from common.errors import ProtocolError
from common.initial_gradient import mean_gradient, private_gradient, record_bytes
from common.messages import NoisedCount, TrainResult, TrainTask, same_fingerprint
from common.model import FederatedModel
from common.privacy.dpsgd import PrivateSteps, rounding_margin
from common.privacy.plan import PrivacyPlan
from common.randomness import private_poisson_sample, stream
from common.schedule import learning_rate
from common.tasks import Batch, Record
from common.tensors import fingerprint, merge, start_fingerprint
from strategies import Job

INITIAL_BATCH_TOKENS = 1024
"""Tokens of one forward pass in round 0, which is one batch: small parts cost it little time."""
INITIAL_BATCH_BYTES = 2**30
"""Of the records' gradients of one such pass. A record's is as large as the adapted layers (RoBERTa-large, query and
value: 201 MB), however short it is; a site that runs out of memory has paid, and pays again when it is asked again."""


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
        PolicyRefusal: a rule of the site's steward forbids the round; nothing was charged or trained.
    """
    check_task(task, job, model)
    plan, spending, counted = None, None, None
    if job.config.privacy.on:
        plan, spending = pay_round(site, job, task)
    else:
        note_exposure(site, job, task)
    model.write(job.strategy.install(merge(model.start, task.basis), task.state))
    if plan and evaluation_releases(job, site, 1):
        noise = site.policy.metrics_noise
        counted = NoisedCount(noised_correct(model, records, noise), noise)
    _take_steps(records, job, model, task.round_number, site, plan)
    trained = {
        layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
        for layer, factors in model.trained().items()
    }
    return TrainResult(
        *(task.run, task.round_number, site.name, site.public_size, job.strategy.contribution(trained)),
        *(spending, counted),
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
        plan, spending = pay_initialisation(site, job, source, task)
        chosen = private_poisson_sample(size, source.sample_rate).tolist()
        most = max(1, INITIAL_BATCH_BYTES // record_bytes(model))
        gradient = private_gradient(model, _parts(records, chosen, model, INITIAL_BATCH_TOKENS, most), plan)
    else:
        note_exposure(site, job, task)
        order = torch.randperm(size, generator=stream(job.config.seed, "initial-gradient", site.name)).tolist()
        chosen = order[: max(1, round(source.sample_rate * size))]
        gradient = mean_gradient(model, _parts(records, chosen, model, INITIAL_BATCH_TOKENS))
    return TrainResult(task.run, 0, site.name, site.public_size, gradient, spending)


def check_task(task: TrainTask, job: Job, model: FederatedModel) -> None:
    """Raise ProtocolError unless the task fits this run, this base model and this adapter start."""
    wanted = job.strategy.basis(job.strategy.start(model.start))
    # In round 0 nothing is due; what comes all the same would be kept for the rounds after it.
    due = task.basis or (task.round_number and wanted)
    if due and not same_fingerprint(task.basis_fingerprint, fingerprint(task.basis)):
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


def _take_steps(
    records: Sequence[Record], job: Job, model: FederatedModel, round_number: int, site: Site, plan: PrivacyPlan | None
) -> None:
    config = job.config.site_training
    parameters = [p for factors in model.trained().values() for p in factors.values()]
    first = (round_number - 1) * config.local_steps
    peak, total = config.learning_rate, job.config.total_steps
    optimizer = build_optimizer(model.trained(), config)
    budget = choose_batch_tokens(config.batch_tokens, model.device)
    model.module.train()
    if plan is not None:
        with PrivateSteps(model.module, optimizer, plan, noise_margin=rounding_margin(model.precision)) as steps:
            for step in range(config.local_steps):
                set_learning_rate(optimizer, learning_rate(config.schedule, peak, first + step, total))
                chosen = private_poisson_sample(len(records), plan.sample_rate).tolist()
                steps.step(_parts(records, chosen, model, budget), model.losses)
        return
    # One order for the whole run: a round goes on where the last one ended.
    order = stream(job.config.seed, "batches", site.name)
    batches = epoch_batches([len(record["input_ids"]) for record in records], config.sample_rate, order, first)
    for step in range(config.local_steps):
        set_learning_rate(optimizer, learning_rate(config.schedule, peak, first + step, total))
        plain_step(_parts(records, next(batches), model, budget), model, optimizer, parameters)


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


def _parts(
    records: Sequence[Record], chosen: Sequence[int], model: FederatedModel, budget: int, most: float = math.inf
) -> Iterator[Batch]:
    for group in length_batches([len(records[i]["input_ids"]) for i in chosen], budget, most):
        yield model.batch([records[chosen[i]] for i in group])

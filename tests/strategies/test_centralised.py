"""One site, one round is centralised training of the same adapter, for every strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.local_training import train_round
from fedveil.client.site import Site
from fedveil.common.data.sources import train_and_test
from fedveil.common.messages.round import TrainResult, TrainTask
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import clone, entries, start_fingerprint
from fedveil.common.model.base import load_base_model
from fedveil.common.model.batching import epoch_batches
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import TASKS, Record
from fedveil.privacy.randomness import stream
from fedveil.strategies import STRATEGIES
from fedveil.strategies.base import chooses
from fedveil.strategies.job import Job, configure
from fedveil.strategies.state import Contribution

Changes = dict[str, Any]
STEPS, RATE = 5, 0.3
PLAIN: Changes = {
    "privacy.mode": "none",
    "rounds": 2,
    "training.local-steps": STEPS,
    "training.sample-rate": RATE,
    "training.optimizer": "sgd",
    "training.learning-rate": 0.5,
    "head-rate": 2.5,
    "schedule": "linear",
}


def build(job: Job) -> FederatedModel:
    config = job.config
    return FederatedModel(
        load_base_model(config.model.name, config.model.task),
        job.adapter,
        TASKS[config.model.task],
        config.head,
        seed=config.seed,
        label_names=("bad", "good"),
        feature_scale=config.model.feature_scale,
        max_length=config.model.max_length,
        device="cpu",
        precision="float32",
    )


@pytest.fixture
def world(toy_settings: Changes, tmp_path: Path) -> Callable[..., tuple[Job, FederatedModel, Site, list[Record]]]:
    """Return a function from changed settings to a job, its model, one site, and the site's records."""

    def make(**changes: Any) -> tuple[Job, FederatedModel, Site, list[Record]]:
        job = configure({**toy_settings, **PLAIN, **{k.replace("__", "."): v for k, v in changes.items()}})
        model = build(job)
        data = train_and_test(job.config.data, job.config.model.task)[0]
        data = replace(data, examples=data.examples[:47])
        site = Site("only", data, "only", 47, tmp_path / "ledger.sqlite")
        return job, model, site, model.prepare(data.examples)

    return make


def federated_round(
    job: Job, model: FederatedModel, site: Site, records: list[Record], round_number: int
) -> tuple[TrainResult, AdapterState]:
    """Return what the site sends, and the server's adapter after it."""
    state = job.start(model.start)
    task = TrainTask(
        run="1",
        round_number=round_number,
        state=job.strategy.downlink(state),
        basis={},
        basis_fingerprint="",
        base_fingerprint=model.base.fingerprint,
        start_fingerprint=start_fingerprint(model.start),
    )
    result = train_round(site, job, model, records, task)
    update = job.strategy.server_update(state, [Contribution(site.name, site.public_size, result.contribution)])
    return result, update.adapter


def centralised(
    job: Job, model: FederatedModel, records: list[Record], round_number: int, *, stream_name: str = "only"
) -> AdapterState:
    """Train by hand: whole batches, mean loss, torch's optimiser, a learning rate from its formula."""
    model.write(model.start)
    peak, head_rate = job.config.training.learning_rate, job.config.site_head_rate
    named = [(n, p) for n, p in model.module.named_parameters() if p.requires_grad]
    trained = [{"params": [p], "times": head_rate if n.startswith("head.") else 1.0} for n, p in named]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[job.config.training.optimizer]
    optimizer = kind(trained, lr=peak)
    total, first = job.config.rounds * STEPS, (round_number - 1) * STEPS
    lengths = [len(record["input_ids"]) for record in records]
    order = list(islice(epoch_batches(lengths, RATE, stream(1, "batches", stream_name)), first + STEPS))[first:]
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - (first + step) / total) * group["times"]
        optimizer.zero_grad()
        batch = model.batch([records[i] for i in chosen])
        F.cross_entropy(model.module(batch), batch["labels"]).backward()
        optimizer.step()
    return clone(model.read())


def gap(left: AdapterState, right: AdapterState) -> float:
    """Return the largest difference of the numbers in ``left`` from those at the same places in ``right``."""
    return max(float((tensor - right[layer][name]).abs().max()) for layer, name, tensor in entries(left))


def weights(job: Job, state: AdapterState) -> AdapterState:
    deltas: dict[str, dict[str, Tensor]] = {k: {"W": job.adapter.delta(v)} for k, v in state.items() if k != HEAD}
    return {**deltas, **({HEAD: state[HEAD]} if HEAD in state else {})}


# Others train a part of the adapter in a round, or of a record's pass.
@pytest.mark.parametrize("strategy", [name for name, row in STRATEGIES.items() if not chooses(row)])
@pytest.mark.parametrize("round_number", [1, 2])
def test_one_site_one_round_is_centralised_training(
    world: Callable[..., Any], strategy: str, round_number: int
) -> None:
    job, model, site, records = world(strategy=strategy)
    result, adapter = federated_round(job, model, site, records, round_number)
    wanted = centralised(job, build(job), records, round_number)
    assert gap(result.contribution, wanted) < 1e-6, "the site trained something else than a plain loop does"
    assert gap(weights(job, adapter), weights(job, wanted)) < 1e-6, "the server changed the only site's model"
    assert gap(result.contribution, model.start) > 1e-3, "training changed hardly anything: nothing is proved"


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_it_is_also_with_adam_a_frozen_head_and_batches_cut_into_parts(world: Callable[..., Any], head: str) -> None:
    job, model, site, records = world(
        training__optimizer="adam",
        **{"training.learning-rate": 0.01, "training.batch-tokens": 40, "head.policy": head},
    )
    result, _ = federated_round(job, model, site, records, 1)
    assert (HEAD in result.contribution) == (head == "trained")
    # Adam divides by the root of small squares, which enlarges the last bits of a sum taken in parts.
    assert gap(result.contribution, centralised(job, build(job), records, 1)) < 1e-4


@pytest.mark.parametrize(
    ("fault", "by_hand"),
    [
        ("other batches", {"stream_name": "another"}),
        ("another round", {"round_number": 2}),
    ],
)
def test_a_loop_on_other_batches_or_of_another_round_differs(
    world: Callable[..., Any], fault: str, by_hand: Changes
) -> None:
    job, model, site, records = world()
    result, _ = federated_round(job, model, site, records, 1)
    wanted = centralised(job, build(job), records, **{"round_number": 1, **by_hand})
    assert gap(result.contribution, wanted) > 1e-3, f"{fault} give the same model: the comparison has no teeth"


def test_a_round_starts_from_what_the_server_sent_and_not_from_what_the_model_held(world: Callable[..., Any]) -> None:
    job, model, site, records = world()
    first, _ = federated_round(job, model, site, records, 1)
    again, _ = federated_round(job, model, site, records, 1)
    assert gap(first.contribution, again.contribution) == 0.0, "something of the first round stayed in the model"


def test_a_run_without_privacy_states_no_spending_and_charges_nothing(world: Callable[..., Any]) -> None:
    job, model, site, records = world()
    result, _ = federated_round(job, model, site, records, 1)
    assert result.spending is None
    with Ledger(site.ledger_path) as ledger:
        assert ledger.entries() == []
        assert [(e.run, e.round_number, e.steps) for e in ledger.exposures()] == [("1", 1, STEPS)]

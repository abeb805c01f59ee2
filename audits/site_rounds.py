"""Rounds of whole sites: which records each step took, and that sites of one run share neither batches nor noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from audits.bands import out_of_band, related
from audits.faults import SOUND, Fault, same_seeds
from audits.finding import judged
from fedveil.client.local_training import train_round
from fedveil.client.site import Site
from fedveil.common.findings import Finding
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.tensors import entries, fingerprint, start_fingerprint
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.strategies.job import configure

RECORDS, RATE, STEPS = 60, 0.25, 100
CLIP, NOISE = 0.5, 20.0


@dataclass(frozen=True)
class Round:
    """One site's round: what it sent less what it received, and which records each step took."""

    change: Tensor
    chosen: list[list[int]]

    def inclusion(self, size: int) -> Tensor:
        """Return a 0/1 table, shape (steps, size), of who was in which batch."""
        table = torch.zeros(len(self.chosen), size, dtype=torch.float64)
        for row, chosen in zip(table, self.chosen, strict=True):
            row[chosen] = 1.0
        return table


class SiteRounds:
    """Lets sites do round 1 of one and the same run, every seedable generator set alike before each.

    Args:
        settings: of the run, whose optimiser here is plain descent at rate 1.
        folder: where ledgers go.
        steps: in the round.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, steps: int = 4) -> None:
        job = configure(
            {
                **settings,
                "training.optimizer": "sgd",
                "training.learning-rate": 1.0,
                "head-rate": 1.0,
                "schedule": "constant",
                "training.local-steps": steps,
                "training.sample-rate": RATE,
                "privacy.clip-norm": CLIP,
                "privacy.noise-multiplier": NOISE,
            }
        )
        self._job, self._folder = job, folder
        self._model = job.model(("bad", "good"))
        state = job.start(self._model.start)
        basis = job.basis(state)
        self._task = TrainTask(
            run="1",
            round_number=1,
            state=job.strategy.downlink(state),
            basis=basis,
            basis_fingerprint=fingerprint(basis),
            base_fingerprint=self._model.base.fingerprint,
            start_fingerprint=start_fingerprint(self._model.start),
        )

    def play(self, name: str, size: int) -> Round:
        """Return the round of a new site called ``name`` that has ``size`` records, and declares 100."""
        chosen: list[list[int]] = []
        data = Dataset(name, tuple(TextExample(text="the film was", label=i % 2) for i in range(size)), ("bad", "good"))
        site = Site(name, data, name, 100, self._folder / f"{name}.sqlite")
        records = self._model.prepare(data.examples)
        numbers = {id(record): number for number, record in enumerate(records)}
        cut = FederatedModel.fixed_batches

        def spy(model: FederatedModel, batch: Sequence[Record], *rest: Any) -> Any:
            chosen.append([numbers[id(record)] for record in batch])
            return cut(model, batch[:0], *rest)  # who is drawn counts here, and costs no pass

        same_seeds()
        with patch.object(FederatedModel, "fixed_batches", spy):
            result = train_round(site, self._job, self._model, records, self._task)
        start = self._model.start
        before = torch.cat([start[layer][factor].flatten() for layer, factor, _ in entries(result.contribution)])
        after = torch.cat([tensor.flatten() for _, _, tensor in entries(result.contribution)])
        return Round((after - before).double(), chosen)


def sampler_faults(table: Tensor, rate: float) -> set[str]:
    """Return what is wrong with Poisson samples: rate, equal chances, independent records, independent draws.

    Args:
        table: 0/1, shape (draws, records): who was in which sample.
        rate: each record's chance.
    """
    draws, size = table.shape
    z = (table - rate) / (rate * (1 - rate)) ** 0.5
    faults, count = set(), size * draws
    if abs(float(z.sum())) / count**0.5 > 5:  # 6e-7
        faults.add("rate")
    # Each record's count over draws, and each draw's size, standardised: sums of squares are chi-square.
    if out_of_band(float((z.sum(0) / draws**0.5).pow(2).sum()), size):
        faults.add("chance of a record")
    if out_of_band(float((z.sum(1) / size**0.5).pow(2).sum()), draws):
        faults.add("size of a batch")
    pairs = (z.T @ z / draws**0.5)[*torch.triu_indices(size, size, offset=1)]
    if float(pairs.abs().max()) > 9:  # products of rare draws are skewed; two records tied together reach 45
        faults.add("two records")
    if abs(float((z[:-1] * z[1:]).sum())) / ((draws - 1) * size) ** 0.5 > 6:
        faults.add("two draws")
    return faults


def audit_sites(settings: dict[str, Any], folder: Path, fault: Fault = SOUND) -> Finding:
    """Compare two sites with records, and two without, with ``fault`` built in; ``folder`` must be empty."""
    rounds = SiteRounds(settings, folder, STEPS)
    with fault.plant():
        first, second = (rounds.play(name, RECORDS) for name in ("here", "there"))
        idle, other = (rounds.play(name, 0) for name in ("idle", "other"))
    wrong = sampler_faults(first.inclusion(RECORDS), RATE)
    if related(first.inclusion(RECORDS), second.inclusion(RECORDS)):
        wrong.add("two sites took the same records")
    if related(idle.change, other.change):
        wrong.add("two sites drew the same noise")
    return judged(
        "two sites' rounds",
        fault.name,
        bool(wrong),
        {"batches": STEPS, "records": RECORDS, "wrong": ", ".join(sorted(wrong)) or "nothing"},
    )

"""A site's held-out rows that models may be scored on: those that its ledger was never charged for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedveil.client.ledger.file import withdrawn_in
from fedveil.client.ledger.holds import WITHDRAWN
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.node import ledger_of
from fedveil.client.policy import Policy
from fedveil.common.config.flat import Scalar
from fedveil.common.data.sources import MOST_SLICES
from fedveil.common.errors import ConfigError, DataError, PolicyRefusal
from fedveil.common.model.device import denormals_flushed
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.cells import read_if_any
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.roles import SLICE, Column
from fedveil.deploy.own_rows import OwnRows, read_own_rows
from fedveil.deploy.site_check import check_readable
from fedveil.experiments.site_scores import ModelScore, Scorer, score_model


@dataclass(frozen=True)
class SiteRows:
    """The held-out rows that models are scored on, and by whose rules."""

    settings: Mapping[str, Scalar]
    policy: Policy
    rule: str
    data: Dataset
    charged: int
    """Held-out rows that are not among the data, because the ledger was charged for them."""
    column: str
    """Of the slices; empty: there are none."""

    def score(self, model: str, scorer: Scorer) -> ModelScore:
        """Return a model's score on these rows."""
        counts = TASKS[self.policy.task].counted
        with torch.no_grad(), denormals_flushed():
            return score_model(model, self.data.examples, scorer, counts=counts, sliced=bool(self.column))


def rows_to_score(settings: Mapping[str, Scalar], policy: Policy, column: str) -> SiteRows:
    """Return the held-out rows without those that the ledger was ever charged for; errors as for evaluate_site."""
    if "data" not in settings:
        raise ConfigError("this site plays a part of a job's data: it has no row of its own to be held out")
    if (dataset := policy.dataset_of(settings, str(settings["site"]))) in withdrawn_in(ledger_of(settings)):
        raise PolicyRefusal(WITHDRAWN.format(dataset))
    beside = [Column(replace(SLICE, section="--", read=read_if_any), column)] if column else []
    own = read_own_rows(settings, policy, beside)
    if not str(own.rule):
        raise ConfigError(
            "no rule holds rows out: add held-out-column, held-out-share or held-out-file to the site's 'node'"
        )
    data, charged = _never_charged(own, settings)
    slices = {example.slice for example in data.examples}
    if len(slices) > MOST_SLICES:
        raise DataError(f"--slice: column {column!r} has {len(slices)} values: name one with at most {MOST_SLICES}")
    return SiteRows(settings, policy, str(own.rule), data, charged, column)


def _never_charged(own: OwnRows, settings: Mapping[str, Scalar]) -> tuple[Dataset, int]:
    """Return the held-out rows that the ledger knows neither by row, by words, nor by person, and how many it knows."""
    check_readable(own.held_out, str(own.rule.file or settings["data"]))
    data = own.held_out.dataset
    with Ledger(ledger_of(settings)) as ledger:
        key = ledger.key
        hashes = [record_hashes(replace(data, examples=(example,)), key) for example in data.examples]
        known = ledger.known(frozenset().union(*hashes))
    rest = tuple(e for e, own_hashes in zip(data.examples, hashes, strict=True) if known.isdisjoint(own_hashes))
    charged = len(data.examples) - len(rest)
    if not rest:
        raise DataError(
            f"the ledger was charged for all {charged} held-out rows: no score of them would be of new rows"
        )
    return replace(data, examples=rest), charged

"""A private vote of the sites' records for one of M public alternatives: one release of noised counts, before round 1.

A record's ballot is a vector of M numbers, of which one is 1. It is the gradient of a linear map of that vector, so a
site clips, sums and noises ballots by the steps that it trains by: adding or removing a record moves the counts by one
clip, whatever M is. Of a person all ballots are one vector, clipped as a whole. Counts add up, so the sites' mean is
that of all their records, and what the server makes of it costs nothing more.

A record votes by itself, in the shape that follows from it alone, and of equal alternatives for that of the lowest
number. What is voted on is public: the server shows it with the task of round 0 (``Start.shown``).
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedveil.common.log import place_of
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.starts.paid import PaidStart
from fedveil.common.tasks import TASKS, Batch, Record
from fedveil.common.tasks.base import owner_of
from fedveil.common.tasks.featured import FEATURES, FeatureCollator
from fedveil.common.words import percent_text
from fedveil.privacy.plan import PrivacyPlan

log = logging.getLogger("fedveil.site")
VOTES = "votes"
"""What the counts are called in what a site sends."""
SPOILT = -1
"""The vote of a record that could not be computed: for nothing."""


@dataclass(frozen=True)
class Vote(PaidStart):
    """A start that the server makes from how many records vote for each alternative; all of a site's do."""

    votes: ClassVar[bool] = True
    on_losses: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """One for each alternative."""
        return len(self.alternatives)

    @property
    @abstractmethod
    def alternatives(self) -> tuple[str, ...]:
        """Names of what is voted on, in order; they follow from the settings."""

    @abstractmethod
    def choose(self, model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[int]:
        """Site: return for each record the number of the alternative that it votes for, or ``SPOILT``.

        A vote follows from the record and from what is public; ``before_pass`` as in ``privatise``.
        """

    @property
    def unfit(self) -> str:
        """Say who pays for a vote."""
        return "is a vote, a release that privacy.mode 'dp-sgd' alone pays for: choose another"

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``counts``, shape (alternatives,)."""
        del model
        return {VOTES: {"counts": (len(self.alternatives),)}}

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return a context in which nothing more takes a gradient: a vote needs none."""
        del model
        return nullcontext()

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return the counts of one sample's votes, clipped, noised, over a public divisor."""
        drawn = [records[i] for i in next(plan.draws(records))]
        cast = ballots(drawn, self.choose(model, drawn, before_pass), len(self.alternatives))
        with _counting(model, len(self.alternatives)) as box:

            def counted(batch: Batch) -> Tensor:
                """Return what has each record's ballot as its gradient."""
                said = box(batch[FEATURES])[:, 0]
                return said[: batch.records] if isinstance(batch, FixedBatch) else said

            optimizer = torch.optim.SGD(box.parameters(), lr=0.0)
            with plan.steps(model, optimizer, before_pass) as steps:
                (counts,) = steps.release(plan.parts(model, cast), counted)
            return {VOTES: {"counts": counts[0].detach().float().cpu()}}

    def found(self, statistic: AdapterState, rank: int, noise: float) -> str:
        """Return each alternative's share of the votes, and the noise."""
        del rank
        shares = zip(self.alternatives, statistic[VOTES]["counts"].tolist(), strict=True)
        said = ", ".join(f"{name} {percent_text(share)}" for name, share in shares)
        return f"votes of the records, of their public number: {said}; standard deviation {percent_text(noise)} each"


def ballots(records: Sequence[Record], votes: Sequence[int], alternatives: int) -> list[Record]:
    """Return a record of each vote: a vector of ``alternatives`` numbers, and whose it is."""
    every = torch.eye(alternatives)
    nothing = torch.zeros(alternatives)
    return [
        {FEATURES: nothing if vote == SPOILT else every[vote], "labels": 0, **owner_of(record)}
        for record, vote in zip(records, votes, strict=True)
    ]


@contextmanager
def _counting(model: FederatedModel, alternatives: int) -> Iterator[nn.Linear]:
    """Let one linear map of ballots take a gradient, and nothing else, and take records as ballots; put all back."""
    before = [(p, p.requires_grad) for p in model.module.parameters()]
    collator, shapes = model.collator, model.shapes
    model.module.requires_grad_(False)
    model.collator = FeatureCollator(TASKS["classification"], alternatives)
    model.shapes = model.collator.shapes(model.base, model.max_length, 0)
    box = nn.Linear(alternatives, 1, bias=False, device=model.device)
    model.module.add_module(VOTES, box)
    try:
        yield box
    finally:
        delattr(model.module, VOTES)
        model.collator, model.shapes = collator, shapes
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@torch.no_grad()
def of_least_loss(
    model: FederatedModel,
    records: Sequence[Record],
    states: Sequence[AdapterState],
    before_pass: Callable[[], None],
) -> list[int]:
    """Return for each record the number of the adapter state, written over the model, under which it loses least."""
    least, votes = torch.full((len(records),), math.inf, dtype=torch.float64), torch.full((len(records),), SPOILT)
    model.module.train()
    with model.many_passes():
        for number, state in enumerate(states):
            model.write(state)
            for batch, group in model.fixed_groups(records):
                losses, places = _losses(model, batch, before_pass), torch.tensor(group)
                better = losses < least[places]  # never for what is not a number
                least[places] = torch.where(better, losses, least[places])
                votes[places] = torch.where(better, number, votes[places])
    return [int(vote) for vote in votes]


def _losses(model: FederatedModel, batch: FixedBatch, before_pass: Callable[[], None]) -> Tensor:
    """Return losses, float64; if the pass fails, each record passes alone in it, and one that fails again has NaN."""
    before_pass()
    try:
        return model.losses(batch).double().cpu()
    except Exception as error:
        if batch.records == 1:
            log.warning("a record could not be computed and votes for nothing: %s", place_of(error))
            return torch.full((1,), math.nan, dtype=torch.float64)
        return torch.cat([_losses(model, batch.alone(row), before_pass) for row in range(batch.records)])

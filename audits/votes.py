"""A private vote: how far one record can move the noiseless counts, in clip norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest.mock import patch

import torch

from audits.faults import SOUND, Fault, zero_noise
from audits.finding import judged
from audits.sensitivity import MOST
from audits.worlds import World, minus, norm
from fedveil.common.findings import Finding
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.contrib.starts import vote
from fedveil.contrib.starts.shared import Shared
from fedveil.contrib.starts.vote import VOTES, Vote, of_least_loss
from fedveil.privacy import dpsgd
from fedveil.privacy.plan import gaussian_plan

ALTERNATIVES = 4
LEAST = 1 - 1e-5
"""Clip norms by which some record must move the counts: with less, nothing was voted."""


@dataclass(frozen=True)
class OfDraws(Shared, Vote):
    """A vote for one of four drawn states of what the model trains, by least loss."""

    name: ClassVar[str] = "of-draws"
    needs = Vote.needs

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Return numbers."""
        return tuple(map(str, range(ALTERNATIVES)))

    def choose(self, model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[int]:
        """Return the votes."""
        return of_least_loss(model, records, drawn(model), before_pass)


def drawn(model: FederatedModel, count: int = ALTERNATIVES) -> list[AdapterState]:
    """Return states of what the model trains, the first as it is at its start."""
    draw = torch.Generator().manual_seed(11)
    names = {layer: tuple(factors) for layer, factors in model.trained().items()}
    own = {layer: {name: model.start[layer][name] for name in names[layer]} for layer in names if layer in model.start}
    return [
        {
            layer: {n: t + 0.5 * number * torch.randn(t.shape, generator=draw) for n, t in factors.items()}
            for layer, factors in own.items()
        }
        for number in range(count)
    ]


def _twice(records: Sequence[Record], votes: Sequence[int], alternatives: int) -> list[Record]:
    return [*_once(records, votes, alternatives), *_once(records, votes, alternatives)]


_once = vote.ballots
COUNTED_TWICE = Fault("a vote counted twice", lambda: patch.object(vote, "ballots", _twice))
"""Each of the two ballots is as long as the clip."""


def _of_neighbours(own: OfDraws, model: FederatedModel, records: Sequence[Record], before_pass: object) -> list[int]:
    del own, model, before_pass
    return [len(records) % ALTERNATIVES] * len(records)


BY_NEIGHBOURS = Fault("a vote that follows from the others", lambda: patch.object(OfDraws, "choose", _of_neighbours))


def audit_votes(world: World, fault: Fault = SOUND) -> Finding:
    """Take each record away in turn from what a site releases: the counts move by one clip, and by no more."""
    model, records = world.model, world.records
    start, plan = OfDraws(), gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 50.0)
    moves = []
    with patch.object(dpsgd, "add_private_noise", zero_noise), fault.plant():

        def counts(chosen: Sequence[Record]) -> list[torch.Tensor]:
            return [start.privatise(model, chosen, replace(plan))[VOTES]["counts"].double()]

        everyone = counts(records)
        moves = [norm(minus(everyone, counts([*records[:i], *records[i + 1 :]]))) for i in range(len(records))]
    return judged(
        "sensitivity of a vote",
        fault.name,
        not (max(moves) <= MOST and min(moves) >= LEAST),
        {
            "model": type(model.base.module).__name__,
            "clips moved by one record, at most": max(moves),
            "at least": min(moves),
        },
    )

"""Prompts whose completions are rewarded: how far one moves the sum with what is written to it, and whose coins decide.

In the first part each record has coins of its own, the same whoever else is there, and is taken away in turn. So a
completion that others move shows as more than a clip. In the second the coins are those of a site, with every seed of
the process known: what is written must be other words again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from audits.faults import SOUND, Fault, same_seeds
from audits.finding import judged
from audits.sensitivity import MOST
from audits.unfolded import summed
from audits.worlds import World, fresh_world, minus, norm, plan
from fedveil.client import unfolding
from fedveil.common.findings import Finding
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import Coins
from fedveil.common.tasks.text import TOKENS
from fedveil.contrib.tasks import rollouts
from fedveil.contrib.tasks.grpo import GRPO, MASK
from fedveil.privacy import randomness
from fedveil.privacy.steps import nothing

CLIP = 1e-3
"""Below the length of every gradient but 0."""


def coins_of(record: Record) -> Coins:
    """Return coins that follow from a record's prompt."""
    draw = torch.Generator().manual_seed(hash(tuple(record[TOKENS])) >> 1)
    return lambda count: torch.rand(count, generator=draw, dtype=torch.float64)


class OwnCoins(GRPO):
    """GRPO as it is, with the coins of each record its own."""

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        """Return the rows of a record, by its own coins."""
        del coins
        return super().unfold(model, record, coins_of(record))


def rollout_world(folder: str) -> World:
    """Return a world of prompts and answers, of which one is the longest; ``folder`` holds a tiny Llama."""
    world = fresh_world(folder, "llama", "lora-frozen-a", "frozen", task=GRPO.name)
    by_length = sorted(world.records, key=lambda record: sum(record[MASK]))
    longest = by_length.pop()
    shorter = [record for record in by_length if sum(record[MASK]) < sum(longest[MASK])]
    return World(world.model, [*shorter, longest])


@contextmanager
def neighbours_seen() -> Iterator[None]:
    """Prompts as long as the longest of the step, whose padding is no padding to the model."""
    widths, unfolded, decode = [0], unfolding.unfolded, rollouts.decode

    def noting(model: FederatedModel, records: Sequence[Record], *given: Any, **more: Any) -> list[Record]:
        widths.append(max((sum(record[MASK]) for record in records), default=0))
        return unfolded(model, records, *given, **more)

    def padding(decoder: Any, tokens: Tensor, mask: Tensor, *given: Any) -> Tensor:
        more = max(0, widths[-1] - tokens.shape[1])
        return decode(decoder, F.pad(tokens, (more, 0)), F.pad(mask, (more, 0), value=1), *given)

    with patch.object(unfolding, "unfolded", noting), patch.object(rollouts, "decode", padding):
        yield


@contextmanager
def one_seed() -> Iterator[None]:
    """Coins of one public generator for all records of a step, as of a library that seeds its sampler."""
    unfolded, unfold, steps = unfolding.unfolded, GRPO.unfold, [torch.Generator()]

    def seeding(*given: Any, **more: Any) -> list[Record]:
        steps.append(torch.Generator().manual_seed(5))
        return unfolded(*given, **more)

    def shared(task: GRPO, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        del coins
        return unfold(task, model, record, lambda n: torch.rand(n, generator=steps[-1], dtype=torch.float64))

    with patch.object(unfolding, "unfolded", seeding), patch.object(GRPO, "unfold", shared):
        yield


NEIGHBOUR = Fault("a completion that sees a neighbour", neighbours_seen)
ONE_SEED = Fault("one seed for all completions of a step", one_seed)
FAULTS = (NEIGHBOUR, ONE_SEED)


def audit_rollouts(world: World, fault: Fault = SOUND) -> Finding:
    """Take each record away in turn; then look whether known seeds make known completions."""
    own, worst = world.model.task, 0.0
    with fault.plant():
        world.model.task = OwnCoins()
        everyone = summed(world, world.records, plan(CLIP))
        for i in range(len(world.records)):
            others = [*world.records[:i], *world.records[i + 1 :]]
            worst = max(worst, norm(minus(everyone, summed(world, others, plan(CLIP)))) / CLIP)
        world.model.task = own
        known = _written(world) == _written(world)
    return judged(
        "sensitivity by prompt",
        fault.name,
        known or not worst <= MOST,
        {
            "model": type(world.model.base.module).__name__,
            "clips moved by one record, at most": worst,
            "completions": "known by the seeds" if known else "not known by the seeds",
        },
    )


def _written(world: World) -> list[Any]:
    same_seeds()
    rows = unfolding.unfolded(world.model, world.records, randomness.private_uniform, nothing, hides=False)
    return [row[TOKENS] for row in rows]

"""Sensitivity: how far one record can move the noiseless sum, in clip norms, on models of every family."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.worlds import Losses, World, alone, example_of, minus, norm, plan, released
from fedveil.common.findings import Finding
from fedveil.privacy import dpsgd

MOST = 1 + 1e-5
"""Clip norms by which one record may move the sum, and the rounding of a float32 forward pass."""


def sensitivity(world: World, clip: float, losses: Losses) -> float:
    """Return max over records x of ||sum(D) - sum(D - x)|| / C, each sum from one padded batch."""
    everyone = released(world, [world.records], plan(clip), losses)
    changes = []
    for i in range(len(world.records)):
        others = [record for j, record in enumerate(world.records) if j != i]
        changes.append(norm(minus(everyone, released(world, [others], plan(clip), losses))) / clip)
    return max(changes)


def whole_sum(world: World, clip: float, order: Sequence[int]) -> Tensor:
    """Return the sum of the records' gradients before the noise, in whole steps, each passing alone in an order."""
    sums: list[Tensor] = []

    def look(own: dpsgd.ClipAndNoise) -> None:
        sums.extend(parameter.summed_grad.flatten() for parameter in own.params)
        add_noise(own)

    add_noise = dpsgd.ClipAndNoise.add_noise
    with patch.object(dpsgd.ClipAndNoise, "add_noise", look):
        released(world, [[world.records[i]] for i in order], plan(clip))
    return torch.cat(sums)


def order_shows(world: World, clip: float) -> bool:
    """Return whether the order of the records moves a bit of their sum."""
    numbers = range(len(world.records))
    first, *others = (whole_sum(world, clip, order) for order in (numbers, numbers[::-1], [*numbers[3:], *numbers[:3]]))
    return not all(torch.equal(first, other) for other in others)


def with_one_long_record(world: World) -> World:
    """Return the world with six short records and one of twelve words, which a mean over tokens favours."""
    words, task = "warm story very quite dull a scene with actor and the tired film", world.model.task
    long = example_of(task.name, words if task.by_token else "the film", words, 1)
    short = [example_of(task.name, "film" if task.by_token else "the film", "was", 0)] * 6
    return World(world.model, world.model.prepare([long, *short]))


def audit_sensitivity(world: World, fault: Fault = SOUND) -> Finding:
    """Take each record away in turn, at a clip that most records exceed and at one that none does.

    At the second, a record moves the sum by more than a clip only if it moves what others contribute. The sum must not
    follow from the order in which records are added, either: cores share them.
    """
    worst, shows = 0.0, False
    for records in (world, with_one_long_record(world)):
        lengths = [norm(alone(records, record)) for record in records.records]
        for clip in (float(np.median(lengths)), max(lengths)):
            with fault.plant():
                worst = max(worst, sensitivity(records, clip, records.model.losses))
                shows = order_shows(records, clip) or shows
    return judged(
        "sensitivity",
        fault.name,
        shows or not worst <= MOST,
        {
            "model": type(world.model.base.module).__name__,
            "clips moved by one record, at most": worst,
            "the order of records": "shows" if shows else "shows in no bit",
        },
    )

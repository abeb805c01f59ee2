"""The sum of all sites' masked vectors: one contribution, checked as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.privacy.events import Event
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secure_sum import check_headroom, total
from fedveil.privacy.secure_sum.masks import Words
from fedveil.server.admission import ROOM
from fedveil.server.plausible import SLACK
from fedveil.server.terms import paid_plan
from fedveil.strategies.job import Job
from fedveil.strategies.state import Contribution, ServerState

ALL = "the sum of all sites"
"""What the contribution of a sum is called."""


def words_of(results: Mapping[int, TrainResult]) -> Iterable[Words]:
    """Yield the vectors of results."""
    return (np.frombuffer(result.words, dtype="<u4").astype(np.uint32) for result in results.values())


def other_releases(job: Job, results: Mapping[int, TrainResult]) -> dict[int, str]:
    """Return the nodes that were charged for another release than the run's, or the others: masks would not cancel."""
    events = {node: result.spending.event for node, result in results.items() if result.spending}
    fitting = [event for node, event in events.items() if _is_run_s(job, event, results[node].public_size)]
    usual = max(fitting, key=fitting.count) if fitting else None
    return {
        node: "the spending's release is another than the run's, and all sites of a sum pay for the same"
        for node in results
        if usual is None or events.get(node) != usual
    }


def _is_run_s(job: Job, event: Event, public_size: int) -> bool:
    """Return whether an event is the run's, up to what two versions of an accountant make of the noise."""
    own = job.plan(job.config.total_steps, public_size).event
    noise = own.noise_multiplier
    return abs(event.noise_multiplier - noise) <= ROOM * noise and event.having(noise_multiplier=noise) == own


def summed_contribution(
    job: Job,
    results: Mapping[int, TrainResult],
    vectors: Iterable[Words],
    layout: Layout,
    state: ServerState,
    round_number: int,
) -> Contribution | str:
    """Return what all sites of an attempt make of the model, as one site with all records would; or why nothing.

    Args:
        job: the run.
        results: of all sites of the sum.
        vectors: what they have sent, or what that adds up to.
        layout: names and shapes of what is summed.
        state: what the sites started from.
        round_number: of the round.
    """
    sizes = sum(result.public_size for result in results.values())
    plan = paid_plan(job, next(iter(results.values())))
    event = next(result.spending.event for result in results.values() if result.spending)
    own = type(plan)(event, event.sample_rate * sizes, plan.delta, plan.max_epsilon)
    try:
        check_headroom(own.expected_batch_size, event.clip_norm, own.noise_std, len(results))
    except ConfigError as error:
        return str(error)
    summed = total(vectors, own.noise_std)
    longest = longest_sum(own, len(results), summed.numel())
    if not float(summed.norm()) <= longest:
        return (
            f"the sum's length {float(summed.norm()):.3g} is above {longest:.3g}, the most that the settings allow: a "
            "site sent what is no vector of it, or the sites were told different things"
        )
    gradient = _shaped(summed / own.expected_batch_size, layout)
    return Contribution(ALL, sizes, _stepped(job, state, gradient, round_number))


def _stepped(job: Job, state: ServerState, gradient: AdapterState, round_number: int) -> AdapterState:
    """Return all that sites train after one plain step; what is frozen is no part of the sum, and stays."""
    config, rate = job.config, job.config.site_rate(round_number, 0)
    whole = narrowed(state.adapter, job.trained_columns(state))
    moved = {
        layer: {name: before for name, before in factors.items() if state.trains(layer, name)}
        for layer, factors in whole.items()
    }
    moved = {layer: factors for layer, factors in moved.items() if factors}
    for layer, factors in gradient.items():
        own_rate = rate * (config.site_head_rate if layer == HEAD else 1.0)
        before = whole[layer]
        moved[layer] = {name: (before[name].double() - own_rate * tensor).float() for name, tensor in factors.items()}
    return moved


def longest_sum(plan: PrivacyPlan, sites: int, numbers: int) -> float:
    """Return how long a sum may be, before the divisor: all clips in one direction, and all sites' noise, with slack.

    Args:
        plan: of one site with the records of all.
        sites: of the sum.
        numbers: that are summed.
    """
    return SLACK * (plan.event.clip_norm * plan.expected_batch_size + plan.noise_std * math.sqrt(sites * numbers))


def _shaped(numbers: Tensor, layout: Layout) -> AdapterState:
    """Return a vector as tensors, in the canonical order of layers and factors."""
    places = [(layer, name, layout[layer][name]) for layer in sorted(layout) for name in sorted(layout[layer])]
    sizes = [math.prod(shape) for _, _, shape in places]
    state: AdapterState = {}
    for (layer, name, shape), part in zip(places, torch.split(numbers, sizes), strict=True):
        state.setdefault(layer, {})[name] = part.view(shape)
    return state

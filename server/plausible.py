"""Bounds on how far a site's contribution may lie from what the site received, by the run's public settings.

One site that sends huge but finite numbers would ruin the average for all. Two facts bound an
honest one, whatever its records are:

* Adam moves no coordinate by more than ``max(1, (1 - β₁)/√(1 - β₂))`` learning rates a step
  (Kingma & Ba 2015, section 2.1).
* A private step's gradient is a sum of vectors of norm at most C plus noise of norm about σC√d,
  over the expected batch b: at most about C (1 + σ√d / b). σ is what the site says: a policy or a
  small budget may ask for far more than the run. Who says more weighs less by its square
  (``aggregation``), so a lie about it buys nothing.

The head moves ``head-rate`` times as far as the rest: what of a record's C lies in it, and its own noise. The adapter's
noise is counted at the adapter's rate, so sites of unlike ranks, which have one head and unlike many numbers beside it,
are held to the same bounds.

Both are met with room (``SLACK``), for large Poisson batches; what is above is not counted. Plain SGD
without privacy has no such bound. There a contribution is measured against the median of the round,
if at least three sites answered, and against the usual length of a change, as the server's Adam
remembers it (``optimizer.usual_change``): where most sites have nothing left to learn, one that has is no liar.
How much of the average a contribution within the bound may be is
``aggregation``'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.formats import FORMATS
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import count, l2_norm
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

SLACK = 10.0
MEDIANS = 100.0
"""How many times the round's median an update may be where nothing else bounds it."""


def update_norm(job: Job, result: TrainResult, state: ServerState) -> float:
    """Return the L2 norm of a contribution minus what the adapter holds in its place (0 where it holds nothing)."""
    before = held_by(job, result, state)
    change: AdapterState = {}
    for layer, factors in result.contribution.items():
        old = before.get(layer, {})
        change[layer] = {name: tensor - old[name] if name in old else tensor for name, tensor in factors.items()}
    return l2_norm(change)


def held_by(job: Job, result: TrainResult, state: ServerState) -> AdapterState:
    """Return what a contribution is a change of: the part of the adapter that the site trains.

    Nothing in round 0, which brings a gradient.
    """
    return narrowed(state.adapter, job.trained_columns(state, result.rank)) if result.round_number else {}


def honest_norm(job: Job, plan: Plan, result: TrainResult, state: ServerState) -> float:
    """Return about how large ``update_norm`` can be by the settings alone; infinite if nothing follows from them.

    Args:
        job: the run.
        plan: the least that the site does to its records in this round.
        result: the site's answer; only its round, the noise that it states and the number of its tensors'
            elements are used.
        state: what the site started from.
    """
    event = result.spending.event if result.spending else None
    if result.round_number == 0:
        return plan.longest_gradient(count(result.contribution), event) * job.origin.way
    if any(name not in state.adapter.get(layer, {}) for layer, f in result.contribution.items() for name in f):
        return math.inf
    config, training = job.config, job.config.training
    if isinstance(plan, PrivacyPlan) and plan.noises_rounds:
        return plan.longest_gradient(count(result.contribution), event)
    rates = (config.site_rate(result.round_number, step) for step in range(training.local_steps))
    head = count({layer: f for layer, f in result.contribution.items() if layer == HEAD})
    fastest = max(1.0, config.site_head_rate) if head else 1.0
    # So many numbers of the adapter would be moved as far by noise of one size.
    numbers = math.ceil(count(result.contribution) - head + config.site_head_rate**2 * head)
    decay = training.weight_decay * fastest * l2_norm(state.adapter)
    if training.optimizer in ("adam", "adamw"):
        step = max(1.0, (1 - training.momentum) / math.sqrt(1 - training.beta2)) * math.sqrt(numbers)
    else:
        clipped = plan.longest_gradient(0, event)
        if not math.isfinite(clipped):
            return math.inf
        noised = plan.longest_gradient(numbers, event) - clipped
        step = (fastest * clipped + noised) / (1 - training.momentum if training.optimizer == "momentum" else 1.0)
    return sum(rates) * (step + decay)


def largest_norm(job: Job, plan: Plan, result: TrainResult, state: ServerState) -> float:
    """Return the bound on ``update_norm``; ``max-update-norm``, if set, is a bound of its own. Else as honest_norm.

    A change that was rounded on its way (``wire.precision``) may be longer than the site's own.
    """
    room = 1 + FORMATS[job.config.wire.precision].room
    return room * min(job.config.max_update_norm or math.inf, SLACK * honest_norm(job, plan, result, state))


def oversized(sizes: Mapping[str, int], ratio: float) -> dict[str, str]:
    """Return the sites that declare more than ``ratio`` times the median size, with the reason; both are by name.

    Such a figure is rather a slip than a size. Fewer than three sites have no middle to be measured against.
    """
    middle = median(sizes.values()) if len(sizes) >= 3 else math.inf
    return {
        site: f"the site declares the public size {size}, above {ratio:g} times the sites' median {middle:g} "
        "(max-size-ratio)"
        for site, size in sizes.items()
        if size > ratio * middle
    }


def implausible(norms: Mapping[int, float], bounds: Mapping[int, float], usual: float = 0.0) -> dict[int, str]:
    """Return the nodes whose update is too large, with the reason.

    Args:
        norms: of the updates, by node.
        bounds: what the settings allow, by node.
        usual: the usual length of a change; 0: not known.
    """
    known = max(usual, median(norms.values()) if len(norms) >= 3 else 0.0)
    middle = known if known or len(norms) >= 3 else math.inf
    reasons = {}
    for node, norm in norms.items():
        bound = bounds[node]
        if not norm <= bound:
            reasons[node] = f"the update's norm {norm:.3g} is above {bound:.3g}, the most that the settings allow"
        elif math.isinf(bound) and not norm <= MEDIANS * middle:
            what = "the usual change's" if usual and middle == usual else "the round's median"
            reasons[node] = f"the update's norm {norm:.3g} is above {MEDIANS:g} times {what} {middle:.3g}"
    return reasons

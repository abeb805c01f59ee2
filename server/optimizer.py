"""The server's own optimiser: FedAdam on the sites' averaged change (Reddi et al. 2021, alg. 2, FedOpt).

What the strategy's average would change the model by is taken as a gradient, and Adam makes the
step. With one local step of plain SGD this is Adam on the whole federation's batch: sites cannot
drift apart within a round, and under privacy the noise of all sites is averaged before anything
divides by it, instead of every site's Adam scaling its own noise up to full steps.

It sees averages of noised contributions only: post-processing, at no privacy cost. Moments are
kept per coordinate and each layer counts its own steps: a strategy that writes a layer's factors in other
coordinates drops what belongs to the old ones (``settle``), and that layer starts without moments.

Where sites train columns of a factor, each column counts its own steps, and one that no site trained stays: neither it
nor its moments change. Its first moment would move it on otherwise, and under privacy most of that is noise. Adam
divides out how large a change is, and with that the weight of the sites that trained a column. So a column's step is
multiplied by their share of all weight: what few sites train moves as they weigh, as in the plain mean.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fedveil.common.config.run import RunConfig
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge, subtract
from fedveil.strategies.state import Moments, ServerState

BETA1, BETA2 = 0.9, 0.999
"""Adam's usual constants."""


def server_step(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    """Return the state after the server's step from ``before`` towards what the strategy's average says.

    With ``server.optimizer = "none"`` that is ``averaged`` itself. Otherwise, with
    ``g = before - averaged`` and t the steps since the layer's moments began, ``m ← β₁ m + (1 - β₁) g``,
    ``v ← β₂ v + (1 - β₂) g²`` and ``x ← x - η m̂ / (√v̂ + τ)``, where m̂ and v̂ are corrected for their start
    at zero. τ is ``server.adam-tau``, and large (1e-3): without noise the first steps would otherwise move every
    coordinate by the full η. η follows ``schedule`` over the rounds; the head's is ``head-rate`` times that.
    What sites do not train (frozen factors, the map of the head's features) has no moments, and is what the average
    says. With ``adam-restarted`` the adapter has no moments of earlier rounds either: the control of a strategy that
    drops them because it turns the factors.

    A column's step is multiplied by its share of the weight (``ServerState.active``).

    Computed in float64; the result has the adapter's dtype.
    """
    # To the bit, which a mean of equal parts, or one with noise on all of it, is not: sites keep the features of an
    # adapter that rests, and derivatives around a head.
    still = {k: factors for k, factors in before.adapter.items() if _rests(config, before.round_number + 1, k)}
    averaged = replace(averaged, adapter=merge(averaged.adapter, still)) if still else averaged
    if config.server.optimizer == "none":
        return averaged
    if config.server.optimizer == "momentum":
        return _heavy_ball(config, before, averaged)
    if config.server.optimizer == "adam-restarted":
        before = replace(before, optimizer=before.optimizer.without(before.adapter.keys() - {HEAD}))
    return _adam(config, before, averaged)


def _adam(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    server, rate = config.server, config.server_rate(before.round_number + 1)
    adapter: AdapterState = {}
    first: AdapterState = {}
    second: AdapterState = {}
    steps: dict[str, int] = {}
    old, clocks = before.optimizer, _clocks(before, averaged)
    for layer, change in _changes(config, before, averaged).items():
        eta = rate * (config.head_rate if layer == HEAD else 1.0)
        steps[layer] = t = 1 + old.steps.get(layer, 0)
        adapter[layer], first[layer], second[layer] = {}, {}, {}
        for name, g in change.items():
            x, g = before.adapter[layer][name], g.double()
            old_m = old.first[layer][name] if t > 1 else torch.zeros_like(g)
            old_v = old.second[layer][name] if t > 1 else torch.zeros_like(g)
            clock, active = clocks.get(layer, {}).get(name), averaged.active.get(layer, {}).get(name)
            m = BETA1 * old_m + (1 - BETA1) * g
            v = BETA2 * old_v + (1 - BETA2) * g.square()
            step = (m / _seen(BETA1, t, clock)) / ((v / _seen(BETA2, t, clock)).sqrt() + server.adam_tau)
            first[layer][name], second[layer][name] = _where(active, m, old_m), _where(active, v, old_v)
            if active is not None:
                step = active * step
            adapter[layer][name] = _where(active, (x.double() - eta * step).to(x.dtype), x)
    moments = Moments(first, second, steps, clocks)
    return replace(averaged, adapter=merge(averaged.adapter, adapter), optimizer=moments)


def usual_change(state: ServerState) -> float:
    """Return the root of the summed second moments of the server's Adam, corrected for their start at zero.

    That is the root of the mean squared length of the rounds' mean changes. 0 before the first step, and of any other
    optimiser.
    """
    moments = state.optimizer
    return math.sqrt(
        math.fsum(
            float(tensor.sum()) / (1 - BETA2 ** moments.steps[layer])
            for layer, factors in moments.second.items()
            if moments.steps.get(layer)
            for tensor in factors.values()
        )
    )


def _clocks(before: ServerState, averaged: ServerState) -> AdapterState:
    """Return the steps of each column of what is trained by columns, this one counted."""
    clocks = before.optimizer.clocks
    return {
        layer: {
            name: clocks.get(layer, {}).get(name, torch.zeros(len(shares), dtype=torch.float64)) + (shares > 0).double()
            for name, shares in columns.items()
        }
        for layer, columns in averaged.active.items()
    }


def _seen(beta: float, t: int, clock: Tensor | None) -> float | Tensor:
    """Return ``1 - β^t``, of each column by its own clock where there are clocks; a column without a step stays."""
    if clock is None:
        return 1 - beta**t
    return torch.tensor([1 - beta ** max(1, int(own)) for own in clock.tolist()], dtype=torch.float64)


def _where(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` with the columns of ``old`` that are not active."""
    return new if active is None else torch.where(active > 0, new, old)


def _rests(config: RunConfig, number: int, layer: str) -> bool:
    """Return whether a layer, or the head, stays as it is in a round."""
    return not (config.timeline.trains_head(number) if layer == HEAD else config.timeline.trains_adapter(number))


def _changes(config: RunConfig, before: ServerState, averaged: ServerState) -> AdapterState:
    """Return ``before - averaged`` of every tensor that sites train; a layer without one is left out.

    So is an adapter or a head that the round does not train: a step of its moments would move it from where the other
    was fitted to it.
    """
    changes, number = subtract(before.adapter, averaged.adapter), before.round_number + 1
    whole = {layer: change for layer, change in changes.items() if not _rests(config, number, layer)}
    trained = {layer: {n: g for n, g in change.items() if before.trains(layer, n)} for layer, change in whole.items()}
    return {layer: change for layer, change in trained.items() if change}


def _heavy_ball(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    """Return the state after ``v ← μ v + g``, ``x ← x - η v``; all else as in ``server_step``.

    It keeps the metric in which the gradient was clipped and noised, where Adam would put one of its own in its place.
    """
    server, moments = config.server, before.optimizer
    rate = config.server_rate(before.round_number + 1)
    adapter: AdapterState = {}
    velocity: AdapterState = {}
    steps: dict[str, int] = {}
    for layer, change in _changes(config, before, averaged).items():
        eta = rate * (config.head_rate if layer == HEAD else 1.0)
        steps[layer] = 1 + moments.steps.get(layer, 0)
        adapter[layer], velocity[layer] = {}, {}
        for name, g in change.items():
            x, active = before.adapter[layer][name], averaged.active.get(layer, {}).get(name)
            old = moments.first[layer][name] if steps[layer] > 1 else torch.zeros_like(g).double()
            v = server.momentum * old + g.double()
            velocity[layer][name] = _where(active, v, old)
            adapter[layer][name] = _where(active, (x.double() - eta * v).to(g.dtype), x)
    return replace(averaged, adapter=merge(averaged.adapter, adapter), optimizer=Moments(velocity, {}, steps))

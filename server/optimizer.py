"""The server's own optimiser: FedAdam on the sites' averaged change (Reddi et al. 2021, alg. 2, FedOpt).

What the strategy's average would change the model by is taken as a gradient, and Adam makes the
step. With one local step of plain SGD this is Adam on the whole federation's batch: sites cannot
drift apart within a round, and under privacy the noise of all sites is averaged before anything
divides by it, instead of every site's Adam scaling its own noise up to full steps.

It sees averages of noised contributions only: post-processing, at no privacy cost. Moments are
kept per coordinate and each layer counts its own steps: a strategy that writes a layer's factors in other
coordinates drops what belongs to the old ones (``settle``), and that layer begins anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from common.config.sections import RunConfig
from common.messages.state import HEAD, AdapterState
from common.messages.tensors import merge, subtract
from strategies import Moments, ServerState

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
    says.

    Computed in float64; the result has the adapter's dtype.
    """
    server = config.server
    if server.optimizer == "none":
        return averaged
    if server.optimizer == "momentum":
        return _heavy_ball(config, before, averaged)
    rate = config.server_rate(before.round_number + 1)
    adapter: AdapterState = {}
    first: AdapterState = {}
    second: AdapterState = {}
    steps: dict[str, int] = {}
    held = before.optimizer
    for layer, change in _changes(config, before, averaged).items():
        eta = rate * (server.head_rate if layer == HEAD else 1.0)
        steps[layer] = t = 1 + held.steps.get(layer, 0)
        adapter[layer], first[layer], second[layer] = {}, {}, {}
        for name, g in change.items():
            x, g = before.adapter[layer][name], g.double()
            m = held.first[layer][name] if t > 1 else torch.zeros_like(g)
            v = held.second[layer][name] if t > 1 else torch.zeros_like(g)
            first[layer][name] = m = BETA1 * m + (1 - BETA1) * g
            second[layer][name] = v = BETA2 * v + (1 - BETA2) * g.square()
            step = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + server.adam_tau)
            adapter[layer][name] = (x.double() - eta * step).to(x.dtype)
    return replace(averaged, adapter=merge(averaged.adapter, adapter), optimizer=Moments(first, second, steps))


def _changes(config: RunConfig, before: ServerState, averaged: ServerState) -> AdapterState:
    """Return ``before - averaged`` of every tensor that sites train; a layer without one is left out.

    So is an adapter that rests: a step of its moments would move it from where the head is refitted to.
    """
    resting = config.refits(before.round_number + 1)
    whole = {k: v for k, v in subtract(before.adapter, averaged.adapter).items() if k == HEAD or not resting}
    trained = {layer: {n: g for n, g in change.items() if before.trains(layer, n)} for layer, change in whole.items()}
    return {layer: change for layer, change in trained.items() if change}


def _heavy_ball(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    """Return the state after ``v ← μ v + g``, ``x ← x - η v``; all else as of ``server_step``.

    It keeps the metric in which the gradient was clipped and noised, where Adam would put one of its own in its place.
    """
    server, held = config.server, before.optimizer
    rate = config.server_rate(before.round_number + 1)
    adapter: AdapterState = {}
    velocity: AdapterState = {}
    steps: dict[str, int] = {}
    for layer, change in _changes(config, before, averaged).items():
        eta = rate * (server.head_rate if layer == HEAD else 1.0)
        steps[layer] = 1 + held.steps.get(layer, 0)
        adapter[layer], velocity[layer] = {}, {}
        for name, g in change.items():
            kept = server.momentum * held.first[layer][name] if steps[layer] > 1 else torch.zeros_like(g).double()
            velocity[layer][name] = v = kept + g.double()
            adapter[layer][name] = (before.adapter[layer][name].double() - eta * v).to(g.dtype)
    return replace(averaged, adapter=merge(averaged.adapter, adapter), optimizer=Moments(velocity, {}, steps))

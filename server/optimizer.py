"""The server's own optimiser: FedAdam on the sites' averaged change (Reddi et al. 2021, alg. 2, FedOpt).

What the strategy's average would change the model by is taken as a gradient, and Adam makes the
step. With one local step of plain SGD this is Adam on the whole federation's batch: sites cannot
drift apart within a round, and under privacy the noise of all sites is averaged before anything
divides by it, instead of every site's Adam scaling its own noise up to full steps.

It sees averages of noised contributions only: post-processing, at no privacy cost. Moments are
kept per coordinate; a strategy that turns the factors' basis turns them as well (``settle``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.config import RunConfig
from common.schedule import learning_rate
from common.tensors import apply, entries, merge, subtract
from common.types import HEAD, AdapterState
from strategies import ServerState
from strategies.base import FIRST_MOMENT, SECOND_MOMENT

BETA1, BETA2 = 0.9, 0.999
"""Adam's usual constants."""


def server_step(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    """Return the state after the server's step from ``before`` towards what the strategy's average says.

    With ``server.optimizer = "none"`` that is ``averaged`` itself. Otherwise, with
    ``g = before - averaged`` and t the rounds done, ``m ← β₁ m + (1 - β₁) g``, ``v ← β₂ v + (1 - β₂) g²``
    and ``x ← x - η m̂ / (√v̂ + ε)``, where m̂ and v̂ are corrected for their start at zero. ε is large
    (1e-3): without noise the first steps would otherwise move every coordinate by the full η. η follows
    ``training.schedule`` over the rounds; the head's is ``training.head-rate`` times that. Tensors that
    the average leaves alone (frozen factors) keep g = 0 and never move.

    Computed in float64; the result has the adapter's dtype.
    """
    if config.server.optimizer == "none":
        return averaged
    gradient = apply(Tensor.double, subtract(before.adapter, averaged.adapter))
    zeros = apply(torch.zeros_like, gradient)
    first = _decay(_stored(before.memory, FIRST_MOMENT) or zeros, gradient, BETA1)
    second = _decay(_stored(before.memory, SECOND_MOMENT) or zeros, apply(torch.square, gradient), BETA2)
    rate = learning_rate(config.training.schedule, config.server.learning_rate, before.round_number, config.rounds)
    done = averaged.round_number
    adapter: AdapterState = {layer: {} for layer in before.adapter}
    for layer, name, x in entries(before.adapter):
        share = config.training.head_rate if layer == HEAD else 1.0
        m, v = first[layer][name] / (1 - BETA1**done), second[layer][name] / (1 - BETA2**done)
        adapter[layer][name] = (x.double() - rate * share * m / (v.sqrt() + config.server.epsilon)).to(x.dtype)
    memory = merge(averaged.memory, {**_named(first, FIRST_MOMENT), **_named(second, SECOND_MOMENT)})
    return replace(averaged, adapter=adapter, memory=memory)


def _decay(moment: AdapterState, value: AdapterState, beta: float) -> AdapterState:
    return apply(lambda old, new: beta * old + (1 - beta) * new, moment, value)


def _stored(memory: AdapterState, prefix: str) -> AdapterState:
    return {layer.removeprefix(prefix): factors for layer, factors in memory.items() if layer.startswith(prefix)}


def _named(moment: AdapterState, prefix: str) -> AdapterState:
    return {prefix + layer: factors for layer, factors in moment.items()}

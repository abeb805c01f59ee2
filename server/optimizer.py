"""The server's own optimiser: FedAdam on the sites' averaged change (Reddi et al. 2021, alg. 2, FedOpt).

What the strategy's average would change the model by is taken as a gradient, and Adam makes the
step. With one local step of plain SGD this is Adam on the whole federation's batch: sites cannot
drift apart within a round, and under privacy the noise of all sites is averaged before anything
divides by it, instead of every site's Adam scaling its own noise up to full steps.

It sees averages of noised contributions only: post-processing, at no privacy cost. Moments are
kept per coordinate and each layer counts its own steps: a strategy that turns the factors' basis drops
what belongs to the old one (``settle``), and those layers begin anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from common.config import RunConfig
from common.schedule import learning_rate
from common.tensors import merge, subtract
from common.types import HEAD, AdapterState
from strategies import ServerState
from strategies.base import FIRST_MOMENT, SECOND_MOMENT, STEPS

BETA1, BETA2 = 0.9, 0.999
"""Adam's usual constants."""


def server_step(config: RunConfig, before: ServerState, averaged: ServerState) -> ServerState:
    """Return the state after the server's step from ``before`` towards what the strategy's average says.

    With ``server.optimizer = "none"`` that is ``averaged`` itself. Otherwise, with
    ``g = before - averaged`` and t the steps since the layer's moments began, ``m ← β₁ m + (1 - β₁) g``,
    ``v ← β₂ v + (1 - β₂) g²`` and ``x ← x - η m̂ / (√v̂ + ε)``, where m̂ and v̂ are corrected for their start
    at zero. ε is large (1e-3): without noise the first steps would otherwise move every coordinate by the full
    η. η follows ``training.schedule`` over the rounds; the head's is ``training.head-rate`` times that. Tensors
    that the average leaves alone (frozen factors) keep g = 0 and never move.

    Computed in float64; the result has the adapter's dtype.
    """
    if config.server.optimizer == "none":
        return averaged
    rate = learning_rate(config.training.schedule, config.server.learning_rate, before.round_number, config.rounds)
    adapter: AdapterState = {}
    moments: AdapterState = {}
    for layer, change in subtract(before.adapter, averaged.adapter).items():
        eta = rate * (config.training.head_rate if layer == HEAD else 1.0)
        begun = before.memory.get(STEPS + layer)
        t = 1 + int(begun["t"]) if begun else 1
        first, second, moved = {}, {}, {}
        for name, g in change.items():
            m = before.memory[FIRST_MOMENT + layer][name] if begun else torch.zeros_like(g, dtype=torch.float64)
            v = before.memory[SECOND_MOMENT + layer][name] if begun else torch.zeros_like(g, dtype=torch.float64)
            first[name] = m = BETA1 * m + (1 - BETA1) * g.double()
            second[name] = v = BETA2 * v + (1 - BETA2) * g.double().square()
            x, step = (
                before.adapter[layer][name],
                (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + config.server.epsilon),
            )
            moved[name] = (x.double() - eta * step).to(x.dtype)
        adapter[layer] = moved
        moments |= {FIRST_MOMENT + layer: first, SECOND_MOMENT + layer: second, STEPS + layer: {"t": torch.tensor([t])}}
    return replace(averaged, adapter=adapter, memory=merge(averaged.memory, moments))

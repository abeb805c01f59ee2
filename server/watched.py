"""LoRAPrune's scores of rows and columns (``common.model.importance``), kept in the server's memory round by round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.importance import COLUMNS, ROWS, importance, running
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState, ServerStep


def watched(job: Job, step: ServerStep, weight: Callable[[str], Tensor], noise: float) -> ServerStep:
    """Return the server's step with the scores of each round's averaged change in the state's memory.

    Args:
        job: the run.
        step: the server's.
        weight: returns W0 of a layer, shape (out, in).
        noise: standard deviation of the noise on one number of the averaged change; 0 without noise.
    """

    def taken(before: ServerState, averaged: ServerState) -> ServerState:
        after = step(before, averaged)
        if not job.config.timeline.trains_adapter(before.round_number + 1):
            return after
        rate = job.config.site_rate(before.round_number + 1, 0)  # of the one plain step that sites take
        scores: AdapterState = {}
        for layer, factors in before.adapter.items():
            if layer in OWN:
                continue
            gradients = {
                name: (tensor.double() - averaged.adapter[layer][name].double()) / rate
                for name, tensor in factors.items()
                if before.trains(layer, name)
            }
            now = importance(weight(layer), factors, gradients, job.adapter.scaling, (noise / rate) ** 2)
            earlier = before.memory.get(layer, {})
            scores[layer] = running({name: earlier[name] for name in (ROWS, COLUMNS) if name in earlier}, now)
        return replace(after, memory=merge(after.memory, scores))

    return taken

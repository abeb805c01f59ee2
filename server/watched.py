"""LoRAPrune's scores of rows and columns (``common.model.importance``), kept in the server's memory round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from common.messages.round import TrainResult
from common.messages.state import OWN, AdapterState
from common.messages.tensors import merge
from common.model.importance import COLUMNS, ROWS, importance, running
from server.rates import mean_noise, sum_noise
from strategies import Contribution, ServerState
from strategies.base import ServerStep
from strategies.job import Job


def watched(job: Job, step: ServerStep, weight: Callable[[str], Tensor], variance: float) -> ServerStep:
    """Return the server's step with the scores of each round's averaged change in the state's memory.

    Args:
        job: the run.
        step: the server's.
        weight: returns W0 of a layer, shape (out, in).
        variance: of the noise on one number of the averaged change.
    """

    def taken(before: ServerState, averaged: ServerState) -> ServerState:
        after = step(before, averaged)
        if job.config.refits(before.round_number + 1):
            return after
        scores: AdapterState = {}
        for layer, held in before.adapter.items():
            if layer in OWN:
                continue
            change = {
                name: tensor.double() - averaged.adapter[layer][name].double()
                for name, tensor in held.items()
                if before.trains(layer, name)
            }
            now = importance(weight(layer), held, change, job.adapter.scaling, variance)
            kept = before.memory.get(layer, {})
            scores[layer] = running({name: kept[name] for name in (ROWS, COLUMNS) if name in kept}, now)
        return replace(after, memory=merge(after.memory, scores))

    return taken


def variance_of_noise(job: Job, results: Sequence[TrainResult], averaged: Sequence[Contribution]) -> float:
    """Return the variance of the noise on one number of the averaged change; 0 in a run without privacy.

    Args:
        job: the run, whose sites take one plain step.
        results: those that count, all of one round.
        averaged: what is averaged, in the order of ``results``, or the one sum.
    """
    if not job.mechanism.charged:
        return 0.0
    noise = sum_noise(job, results) if job.mechanism.summed else mean_noise(job, results, averaged)
    return noise**2

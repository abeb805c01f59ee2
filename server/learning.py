"""The layers that learn: statistics of a round's changes beside what noise alone would give (``common.nulls``).

They are computed from what sites sent and nothing else. Under privacy that is noised already, so they are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.messages.round import TrainResult
from common.messages.state import HEAD, AdapterState, Factors
from common.nulls import LEVEL, cross_site_energy, energy_of_sum, noise_edge
from common.run_lines import LayerLine
from server.noise import known, noised_whole, of_average, release_noise, site_noise, sum_noise
from strategies import Contribution, ServerState
from strategies.job import Job


@dataclass(frozen=True)
class Part:
    """One site's part of the average, or the sum of all sites."""

    share: float
    """Of the average."""
    change: AdapterState
    """What was sent minus what the server holds in its place."""
    noise: float | None
    """Standard deviation of one coordinate of the noise in ``change``, without the head's own rate; None: unknown."""


def layer_lines(
    job: Job, state: ServerState, averaged: Sequence[Contribution], results: Sequence[TrainResult], *, summed: bool
) -> list[LayerLine]:
    """Return a line for each layer whose trained tensors came back, and for the head.

    The edge of the singular values is exceeded by any of all matrices of the round with chance ``LEVEL`` where there
    is noise alone. Thresholds are of the averaged change, before any optimiser of the server.

    Args:
        job: the run.
        state: what the sites started from.
        averaged: what the strategy combines, in the order of ``results``, or the one sum.
        results: those that count.
        summed: whether ``averaged`` is a sum of which nobody sees the parts.
    """
    parts = _parts(job, state, averaged, results, summed=summed)
    if not parts:
        return []
    rests = job.config.rests(state.round_number + 1)
    layers = [layer for layer in sorted(parts[0].change) if all(layer in part.change for part in parts)]
    layers = [layer for layer in layers if layer == HEAD or not rests]
    matrices = sum(len(parts[0].change[layer]) for layer in layers)
    return [_line(job, layer, parts, LEVEL / matrices, summed=summed) for layer in layers]


def _parts(
    job: Job, state: ServerState, averaged: Sequence[Contribution], results: Sequence[TrainResult], *, summed: bool
) -> list[Part]:
    # Of sites of different ranks, the columns that all of them train: those of a lower rank are the first of a higher.
    least = min(contribution.rank for contribution in averaged)
    held = job.strategy.counterpart(state, least)
    changes = [_change(_first(contribution.state, held), held) for contribution in averaged]
    if summed:  # what rests in the round is in no vector, and has no noise
        changes = [_moved(change) for change in changes]
    weights = [contribution.weight for contribution in averaged]
    noises = [_of_sum(job, averaged, results)] if summed else noises_of(job, results, averaged)
    return [
        Part(weight / math.fsum(weights), change, noise)
        for weight, change, noise in zip(weights, changes, noises, strict=True)
    ]


def _of_sum(job: Job, averaged: Sequence[Contribution], results: Sequence[TrainResult]) -> float | None:
    if job.mechanism.central:
        return averaged[0].noise
    paid = job.mechanism.charged and any(result.spending is not None for result in results)
    return sum_noise(job, results) if paid else None


def _moved(change: AdapterState) -> AdapterState:
    """Return the tensors of which anything moved."""
    kept = {layer: {name: t for name, t in factors.items() if bool(t.any())} for layer, factors in change.items()}
    return {layer: factors for layer, factors in kept.items() if factors}


def noises_of(job: Job, results: Sequence[TrainResult], averaged: Sequence[Contribution]) -> list[float | None]:
    """Return the standard deviation of one coordinate of the noise in each site's change as it is averaged."""
    own = [step_noise(job, result) for result in results]
    return [None if noise is None else noise * one.factor for noise, one in zip(own, averaged, strict=True)]


def statistic_noise(job: Job, results: Sequence[TrainResult], averaged: Sequence[Contribution]) -> float:
    """Return the standard deviation of the noise on one number of the mean of what sites released for a paid start."""
    whole = math.fsum(one.weight for one in averaged)
    noises = [release_noise(job, result) * one.factor for result, one in zip(results, averaged, strict=True)]
    return of_average([one.weight / whole for one in averaged], noises)


def with_noises(job: Job, averaged: Sequence[Contribution], results: Sequence[TrainResult]) -> list[Contribution]:
    """Return what a strategy combines, each with its noise; 0 where the run promises nothing, so that there is none."""
    noises = noises_of(job, results, averaged) if job.mechanism.charged else [0.0] * len(results)
    return [replace(one, noise=noise) for one, noise in zip(averaged, noises, strict=True)]


def _first(sent: AdapterState, held: AdapterState) -> AdapterState:
    """Return ``sent`` with as many columns of its matrices as are held."""
    return {
        layer: {
            name: t[:, : held[layer][name].shape[1]] if t.dim() == 2 and name in held.get(layer, {}) else t
            for name, t in factors.items()
        }
        for layer, factors in sent.items()
    }


def _change(sent: AdapterState, held: AdapterState) -> AdapterState:
    """Return ``sent - held`` in float64 of every layer all of whose tensors stand in both, in one shape."""
    change: AdapterState = {}
    for layer, factors in sent.items():
        own = held.get(layer, {})
        if factors and all(name in own and own[name].shape == tensor.shape for name, tensor in factors.items()):
            change[layer] = {name: tensor.double() - own[name].double() for name, tensor in factors.items()}
    return change


def step_noise(job: Job, result: TrainResult) -> float | None:
    """Return the standard deviation of one coordinate of the noise in a site's change: η σ C / b.

    None where it does not follow from what is public: without privacy, after more than one step, or behind a rule or
    an optimiser that changes what a plain step does.
    """
    if result.spending is None or not known(job) or noised_whole(job, result):
        return None
    return site_noise(job, result)


def _line(job: Job, layer: str, parts: Sequence[Part], level: float, *, summed: bool) -> LayerLine:
    # A trusted server noises changes as they are, whatever rates they came by.
    faster = job.config.training.head_rate if layer == HEAD and not job.mechanism.central else 1.0
    noises = [part.noise * faster for part in parts if part.noise is not None]
    told = noises if len(noises) == len(parts) else None
    flat = [_flat(part.change[layer]) for part in parts]
    shares = [part.share for part in parts]
    change = torch.stack([share * own for share, own in zip(shares, flat, strict=True)]).sum(0)
    energy, score = cross_site_energy(shares, flat, told), None
    if energy is not None:
        score = energy.score
    elif told is not None:
        score = energy_of_sum(change, told[0])
    average = _unflat(change, parts[0].change[layer])
    return LayerLine(
        layer=layer,
        numbers=change.numel(),
        form="of the sum" if energy is None else "across sites",
        change=float(change.norm()),
        agreement=None if energy is None else energy.agreement,
        score=score,
        rank=sum(min(_matrix(tensor).shape) for tensor in average.values()),
        above=None if told is None else _above(average, of_average(shares, told), level),
    )


def _above(average: Mapping[str, Tensor], noise: float, level: float) -> int:
    """Return how many singular values of the tensors exceed what noise alone gives with chance ``level``."""
    found = 0
    for tensor in average.values():
        matrix = _matrix(tensor)
        edge = noise * noise_edge(matrix.shape[0], matrix.shape[1], level)
        found += int((torch.linalg.svdvals(matrix) > edge).sum())
    return found


def _matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix, a vector as one column."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)


def _flat(factors: Factors) -> Tensor:
    return torch.cat([factors[name].flatten() for name in sorted(factors)])


def _unflat(numbers: Tensor, like: Factors) -> Factors:
    names = sorted(like)
    pieces = numbers.split([like[name].numel() for name in names])
    return {name: piece.view_as(like[name]) for name, piece in zip(names, pieces, strict=True)}

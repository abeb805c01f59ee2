"""Chosen columns of a trained factor: the part of each layer that a site trains and sends, and the whole around it.

One frozen A and one scale for all: a column of B then means the same at every site, whichever others are trained
beside it. So a column that a site did not train stands, in the mean of the sites' weights, at what all received.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.errors import ProtocolError
from common.messages.state import AdapterState

FACTOR = "B"
"""The factor whose columns are chosen, shape (out, rank)."""
Chosen = Mapping[str, Tensor]
"""By layer, the positions of the columns that are trained: int64, ascending, on the CPU; perhaps none."""


def narrowed(state: AdapterState, chosen: Chosen) -> AdapterState:
    """Return ``state`` with the chosen columns of ``FACTOR`` alone; a layer of which none is chosen is left out."""
    kept = {layer: factors for layer, factors in state.items() if layer not in chosen or len(chosen[layer])}
    return {
        layer: {n: t[:, chosen[layer]] if layer in chosen and n == FACTOR else t for n, t in factors.items()}
        for layer, factors in kept.items()
    }


def widened(part: AdapterState, whole: AdapterState, chosen: Chosen) -> AdapterState:
    """Return ``part``, as ``narrowed`` makes it, with the columns of ``whole`` where it has none.

    Raises:
        ProtocolError: ``part`` has not the columns that are chosen.
    """
    full: AdapterState = {layer: factors for layer, factors in part.items() if layer not in chosen}
    for layer, columns in chosen.items():
        sent, held = part.get(layer, {}), whole[layer][FACTOR]
        if set(sent) != ({FACTOR} if len(columns) else set()):
            raise ProtocolError(f"a contribution has the factors {sorted(sent)} of the layer {layer!r}")
        new = held.clone()
        if len(columns):
            if sent[FACTOR].shape != (len(held), len(columns)):
                raise ProtocolError(
                    f"a contribution has {FACTOR} of shape {tuple(sent[FACTOR].shape)} in the layer {layer!r}, "
                    f"and {len(columns)} columns of it are trained"
                )
            new[:, columns] = sent[FACTOR]
        full[layer] = {FACTOR: new}
    return full


def narrowed_layout(
    layout: Mapping[str, Mapping[str, tuple[int, ...]]], chosen: Chosen
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of ``narrowed`` states, from those of whole ones."""
    return {
        layer: {
            n: (shape[0], len(chosen[layer])) if layer in chosen and n == FACTOR else shape
            for n, shape in factors.items()
        }
        for layer, factors in layout.items()
        if layer not in chosen or len(chosen[layer])
    }


def shares_of_columns(chosen: Sequence[Chosen], weights: Sequence[float], whole: AdapterState) -> AdapterState:
    """Return, by layer, the part of all weight that the sites have which train a column: float64, shape (rank,).

    0 where nobody does, and exactly 1 where all do.
    """
    total, found = math.fsum(weights), dict[str, dict[str, Tensor]]()
    for layer in dict.fromkeys(layer for one in chosen for layer in one):
        columns = [set(one[layer].tolist()) for one in chosen]
        shares = [
            math.fsum(weight for weight, own in zip(weights, columns, strict=True) if i in own) / total
            for i in range(whole[layer][FACTOR].shape[1])
        ]
        found[layer] = {FACTOR: torch.tensor(shares, dtype=torch.float64)}
    return found

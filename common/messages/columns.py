"""The columns of an adapter that a round trains: the part of each layer that a site trains and sends, and the whole.

``narrowed`` is what a site sends of whole factors, and ``widened`` puts it back among what all received. With one
frozen A and one scale for all, a column of B means the same at every site, whichever others are trained beside it. So
a column that a site did not train is, in the mean of the sites' weights, what all received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from fedveil.common.errors import ProtocolError
from fedveil.common.later import torch
from fedveil.common.messages.state import OWN, AdapterState, below_head

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("A", "B")
"""The factors of which a part of the columns may be trained: A, shape (rank, in), and B, shape (out, rank). They are
linear maps of their adapter (``common.adapters.split``). Of other factors all columns are trained, or none."""
FACTOR = "B"
"""The one whose columns are the adapter's rank, which a site may have a bound on."""
Chosen: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"
"""By layer and factor, the positions of the columns that are trained: int64, ascending, on the CPU. A factor that is
left out, or has none, stays as it is. The head is in no choice: it is trained where the run's phase trains it."""


def check_chosen(chosen: Chosen, whole: AdapterState) -> None:
    """Raise ProtocolError unless a choice is of this adapter's factors, and of columns that they have.

    Args:
        chosen: the choice.
        whole: every factor of every layer.
    """
    for layer, factors in chosen.items():
        for name, columns in factors.items():
            tensor = whole.get(layer, {}).get(name)
            if tensor is None or layer in OWN:
                raise ProtocolError(f"columns of {name} are chosen in the layer {layer!r}, which has none")
            width = tensor.shape[-1]
            if columns.dtype != torch.int64 or columns.dim() != 1 or not torch.equal(columns, columns.unique()):
                raise ProtocolError(f"the chosen columns of {name} in the layer {layer!r} are no ascending list")
            if len(columns) and not (int(columns[0]) >= 0 and int(columns[-1]) < width):
                raise ProtocolError(f"columns of {name} are chosen beyond the {width} of the layer {layer!r}")
            if 0 < len(columns) < width and name not in PARTS:
                raise ProtocolError(f"a part of {name} is chosen in the layer {layer!r}, which is trained whole or not")


def positions_of(mask: Tensor, what: str) -> Tensor:
    """Return the columns whose number in a mask of shape (columns,) is 1, where all others are 0.

    Raises:
        ProtocolError: the mask of ``what`` has another shape, or another number than 0 and 1.
    """
    if mask.dim() != 1 or not bool(((mask == 0) | (mask == 1)).all()):
        raise ProtocolError(f"the mask of trained columns of {what!r} has other numbers than 0 and 1")
    return mask.nonzero()[:, 0]


def columns_of(state: AdapterState, choices: Mapping[str, Callable[[int], Tensor]]) -> Chosen:
    """Return the choice of the same columns in every layer of ``state``.

    Args:
        state: the factors, by layer; the head and its features' map are in no choice.
        choices: by factor, from how many columns it has to those that are trained; of others none is.

    >>> columns_of({"layer": {"A": torch.zeros(2, 6)}}, {"A": lambda width: torch.arange(width).chunk(2)[0]})
    {'layer': {'A': tensor([0, 1, 2])}}
    """
    return {
        layer: {name: choose(factors[name].shape[-1]) for name, choose in choices.items() if name in factors}
        for layer, factors in below_head(state).items()
    }


def chosen_factors(state: AdapterState, chosen: Chosen | None) -> AdapterState:
    """Return the tensors of ``state`` of which some column is chosen, whole; None: all."""
    if chosen is None:
        return state
    trained = {
        layer: {name: t for name, t in factors.items() if layer not in chosen or len(chosen[layer].get(name, ()))}
        for layer, factors in state.items()
    }
    return {layer: factors for layer, factors in trained.items() if factors}


def narrowed(state: AdapterState, chosen: Chosen | None) -> AdapterState:
    """Return the chosen columns of ``state``; a layer of which none is chosen is left out. None: all."""
    if chosen is None:
        return state
    return {
        layer: {n: t[..., chosen[layer][n]] if layer in chosen else t for n, t in factors.items()}
        for layer, factors in chosen_factors(state, chosen).items()
    }


def widened(part: AdapterState, whole: AdapterState, chosen: Chosen) -> AdapterState:
    """Return ``part``, as ``narrowed`` makes it, with the columns of ``whole`` where it has none.

    Raises:
        ProtocolError: ``part`` has not the columns that are chosen.
    """
    full: AdapterState = {layer: factors for layer, factors in part.items() if layer not in chosen}
    for layer, factors in chosen.items():
        sent = part.get(layer, {})
        if set(sent) != {name for name, columns in factors.items() if len(columns)}:
            raise ProtocolError(f"a contribution has the factors {sorted(sent)} of the layer {layer!r}")
        full[layer] = {}
        for name, columns in factors.items():
            new = whole[layer][name].clone()
            if len(columns):
                if sent[name].shape != (*new.shape[:-1], len(columns)):
                    raise ProtocolError(
                        f"a contribution has {name} of shape {tuple(sent[name].shape)} in the layer {layer!r}, "
                        f"and {len(columns)} columns of it are trained"
                    )
                new[..., columns] = sent[name]
            full[layer][name] = new
    return full


def narrowed_layout(
    layout: Mapping[str, Mapping[str, tuple[int, ...]]], chosen: Chosen | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of ``narrowed`` states, from those of whole ones."""
    narrow: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer, factors in layout.items():
        if chosen is None or layer not in chosen:
            narrow[layer] = dict(factors)
            continue
        counts = {name: len(chosen[layer].get(name, ())) for name in factors}
        trained = {name: (*shape[:-1], counts[name]) for name, shape in factors.items() if counts[name]}
        if trained:
            narrow[layer] = trained
    return narrow

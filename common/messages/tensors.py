"""Linear algebra on whole adapter states: what a server may do to what sites send."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedveil.common.errors import ProtocolError
from fedveil.common.later import torch
from fedveil.common.messages.state import HEAD, AdapterState

if TYPE_CHECKING:
    from torch import Tensor


def entries(state: AdapterState) -> Iterator[tuple[str, str, Tensor]]:
    """Yield ``(layer, factor, tensor)`` in the canonical order: layers, then factors, by name."""
    for layer in sorted(state):
        for factor in sorted(state[layer]):
            yield layer, factor, state[layer][factor]


def apply(function: Callable[..., Tensor], *states: AdapterState) -> AdapterState:
    """Apply ``function`` to the tensors that stand at the same place in every state.

    Raises:
        ProtocolError: the states do not have the same layers, factors and shapes.
    """
    first = states[0]
    places = [(layer, factor, tensor.shape) for layer, factor, tensor in entries(first)]
    for other in states[1:]:
        if [(layer, factor, tensor.shape) for layer, factor, tensor in entries(other)] != places:
            raise ProtocolError("two adapter states do not have the same layers, factors and shapes")
    return {
        layer: {factor: function(*(state[layer][factor] for state in states)) for factor in factors}
        for layer, factors in first.items()
    }


def add(left: AdapterState, right: AdapterState) -> AdapterState:
    """Return ``left + right``."""
    return apply(torch.add, left, right)


def subtract(left: AdapterState, right: AdapterState) -> AdapterState:
    """Return ``left - right``."""
    return apply(torch.sub, left, right)


def scale(state: AdapterState, factor: float) -> AdapterState:
    """Return ``factor * state``."""
    return apply(lambda tensor: tensor * factor, state)


def l2_norm(state: AdapterState) -> float:
    """Return the Euclidean norm of all tensors taken together."""
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for _, _, tensor in entries(state)))


def weighted_sum(weights: Sequence[float], states: Sequence[AdapterState]) -> AdapterState:
    """Return ``sum_k weights[k] * states[k]``, accumulated in float64, in the states' own dtype."""
    if len(weights) != len(states) or not states:
        raise ProtocolError(f"{len(weights)} weights for {len(states)} adapter states")

    def combine(*tensors: Tensor) -> Tensor:
        total = torch.zeros_like(tensors[0], dtype=torch.float64)
        for weight, tensor in zip(weights, tensors, strict=True):
            total += weight * tensor.double()
        return total.to(tensors[0].dtype)

    return apply(combine, *states)


def select(state: AdapterState, factors: Iterable[str]) -> AdapterState:
    """Return the part of ``state`` whose factor names are in ``factors``; layers left empty are dropped."""
    names = frozenset(factors)
    selected = {layer: {n: t for n, t in values.items() if n in names} for layer, values in state.items()}
    return {layer: values for layer, values in selected.items() if values}


def merge(base: AdapterState, changes: AdapterState) -> AdapterState:
    """Return ``base`` with the tensors of ``changes`` put in place of its own."""
    return {layer: {**base.get(layer, {}), **changes.get(layer, {})} for layer in {**base, **changes}}


def clone(state: AdapterState) -> AdapterState:
    """Return an independent copy, detached, on the CPU."""
    return apply(lambda tensor: tensor.detach().cpu().clone(), state)


def count(state: AdapterState) -> int:
    """Return how many numbers the state holds."""
    return sum(tensor.numel() for _, _, tensor in entries(state))


def fingerprint(state: AdapterState) -> str:
    """Return the SHA-256 of names, shapes and values to 2^-16, in hexadecimal.

    The grid is coarse so that the last bit of a QR on another processor does not look like
    another adapter.
    """
    digest = hashlib.sha256()
    for layer, factor, tensor in entries(state):
        digest.update(f"{layer}/{factor}/{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().double().mul(2**16).round().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def start_fingerprint(start: AdapterState, text: str = "") -> str:
    """Return the fingerprint of an adapter's seeded start, without the head, and of the public ``text`` if any.

    A head that starts from label words is computed by the base model, so it differs in its last bits from
    device to device, and of its hundreds of numbers some stand at the border of two steps of any grid: equal
    heads would look different. What it is computed from is the same everywhere: the configuration, whose
    phrases do not depend on records (``common.data.sources``), and the base model, which has a fingerprint of its own.
    """
    own = fingerprint({layer: factors for layer, factors in start.items() if layer != HEAD})
    return hashlib.sha256(f"{own}/{text}".encode()).hexdigest() if text else own

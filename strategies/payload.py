"""The adapter payload of a round: what travels down and up for each strategy, in tensors and in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.messages.blocks import bytes_of, layout_of
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.formats import FLOAT32
from fedveil.common.messages.state import AdapterState
from fedveil.strategies import Strategy


def travels(strategy: Strategy, adapter: Adapter, out: int, into: int) -> tuple[AdapterState, AdapterState]:
    """Return what travels down and up in a round for one layer with ``into`` inputs and ``out`` outputs, as examples.

    The numbers are random; names and shapes are a run's. The head and what is sent once are left out.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = adapter.shapes(out, into).items()
    layer = {"layer": {factor: torch.randn(shape, generator=draw) for factor, shape in shapes}}
    trained = {"layer": {factor: layer["layer"][factor] for factor in adapter.trained}}
    down = strategy.downlink(strategy.start(layer, adapter.trained))
    return down, narrowed(trained, strategy.trained_columns(down, 1, 0))


def payload(
    strategy: Strategy, adapter: Adapter, layers: Sequence[tuple[int, int]], precision: str = FLOAT32
) -> tuple[int, int]:
    """Return the bytes that travel down and up in a round over all layers of (out, in), in a format of ``FORMATS``."""
    down = up = 0
    for (out, into), times in Counter(layers).items():
        once, each = (
            [_bytes(state, adapter, precision, shared) for state in travels(strategy, adapter, out, into)]
            for shared in (True, False)
        )
        down, up = down + once[0] + times * each[0], up + once[1] + times * each[1]
    return down, up


def _bytes(state: AdapterState, adapter: Adapter, precision: str, shared: bool) -> int:
    """Return the bytes of what the layers of a shape have in common, or of what each has."""
    part = {
        layer: {name: t for name, t in factors.items() if (name in adapter.traits.shared) == shared}
        for layer, factors in state.items()
    }
    return bytes_of(layout_of(part), precision)


def preset_adapter(strategy: type[Strategy], rank: int) -> Adapter:
    """Return the adapter that a strategy takes by default, at a rank, on no layer in particular."""
    return ADAPTERS[strategy.adapters.default](rank, float(rank), ())

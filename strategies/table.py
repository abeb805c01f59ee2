"""The tables of strategies and adapters in README and docs, made from the code; tests keep the pages equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from common.adapters import ADAPTERS, Adapter
from common.messages.state import AdapterState
from strategies import STRATEGIES, Strategy

DEFAULT_SHAPES: Sequence[tuple[int, int]] = ((384, 384),) * 12
"""(m, n) of the default job's layers: query and value of MiniLM's six blocks."""
DEFAULT_RANK = 8
_SIDES = ((5, 7, 11), (13, 17, 19))
"""Stand-ins for the rank r, the outputs m and the inputs n of a layer: different primes, so that a product of them
tells its factors."""
_POWERS = {2: "²", 3: "³"}


def travels(strategy: Strategy, adapter: Adapter, out: int, into: int) -> tuple[AdapterState, AdapterState]:
    """Return what travels down and up in a round for one layer with ``into`` inputs and ``out`` outputs, as examples.

    The numbers are random; names and shapes are a run's. The head and what is sent once are left out.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = adapter.shapes(out, into).items()
    layer = {"layer": {factor: torch.randn(shape, generator=draw) for factor, shape in shapes}}
    trained = {"layer": {factor: layer["layer"][factor] for factor in adapter.trained}}
    return strategy.downlink(strategy.start(layer, adapter.trained)), strategy.uplink(trained)


def payload(strategy: Strategy, adapter: Adapter, layers: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes that travel down and up in a round over all layers of (out, in), at four bytes a number."""
    down = up = 0
    for (out, into), times in Counter(layers).items():
        both = travels(strategy, adapter, out, into)
        down, up = (total + 4 * times * _numbers(state) for total, state in zip((down, up), both, strict=True))
    return down, up


def preset_adapter(strategy: type[Strategy], rank: int) -> Adapter:
    """Return the adapter that a strategy takes by default, at a rank, on no layer in particular."""
    return ADAPTERS[strategy.adapter](rank, float(rank), ())


def _numbers(state: AdapterState) -> int:
    return sum(tensor.numel() for factors in state.values() for tensor in factors.values())


def _formulas(strategy: type[Strategy]) -> list[str]:
    """Return how many numbers of a layer travel down and up, in r, m and n."""
    said = []
    for sides in _SIDES:
        rank, out, into = sides
        both = travels(strategy(), preset_adapter(strategy, rank), out, into)
        said.append([" + ".join(_product(t.shape, sides) for f in s.values() for t in f.values()) for s in both])
    first, second = said
    return [_agreed(left, right) for left, right in zip(first, second, strict=True)]


def _agreed(left: str, right: str) -> str:
    return left if left == right else "by layer"


def _product(shape: Sequence[int], sides: tuple[int, int, int]) -> str:
    """Return the number of elements of a shape in letters.

    >>> _product((7, 5), (5, 7, 11)), _product((5, 5), (5, 7, 11)), _product((22,), (5, 7, 11))
    ('m·r', 'r²', '2·n')
    """
    rest, letters = math.prod(shape), Counter[str]()
    for size in shape:
        for letter, side in zip("rmn", sides, strict=True):
            while size % side == 0:
                size, rest, letters = size // side, rest // side, letters + Counter(letter)
    words = [letter + _POWERS.get(power, "" if power == 1 else f"^{power}") for letter, power in letters.items()]
    return "·".join([str(rest)] * (rest != 1 or not words) + words)


def _row(strategy: type[Strategy]) -> str:
    adapter = preset_adapter(strategy, DEFAULT_RANK)
    down, up = payload(strategy(), adapter, DEFAULT_SHAPES)
    down_formula, up_formula = _formulas(strategy)
    cells = [
        f"`{strategy.name}` ({strategy.paper})",
        f"`{adapter.name}`",
        ", ".join(adapter.trained),
        f"{up_formula} = {up:,} B",
        f"{down_formula} = {down:,} B",
        "yes" if strategy.exact(type(adapter)) else "no",
        strategy.noise or adapter.noise,
        strategy.privacy,
    ]
    return "| " + " | ".join(cells) + " |"


def strategy_table() -> str:
    """Return the Markdown table of all strategies, each with the adapter that it takes by default."""
    header = "| strategy | adapter | trained | up: per layer = per site and round "
    header += "| down: per layer = per site and round | exact | noise in the weights, per step | privacy modes |"
    return "\n".join([header, "|" + "---|" * 8, *map(_row, STRATEGIES.values())])


def _factors(adapter: type[Adapter], names: Sequence[str]) -> str:
    """Return each factor with how many numbers it has in a layer."""
    first, second = (
        {name: _product(shape, sides) for name, shape in adapter(sides[0], 1.0, ()).shapes(*sides[1:]).items()}
        for sides in _SIDES
    )
    return ", ".join(f"{name} ({_agreed(first[name], second[name])})" for name in names) or "none"


def adapter_table() -> str:
    """Return the Markdown table of all adapters."""
    lines = [
        "| adapter | trained | frozen | linear in what is trained | noise in the weights, per step |",
        "|" + "---|" * 5,
    ]
    for adapter in ADAPTERS.values():
        trained, frozen = (_factors(adapter, names) for names in (adapter.trained, adapter.frozen))
        cells = [f"`{adapter.name}`", trained, frozen, "yes" if adapter.linear else "no", adapter.noise]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

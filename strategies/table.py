"""The table of strategies in README and docs, made from the code; a test keeps the pages equal to it."""

from __future__ import annotations

from collections.abc import Sequence

from common.adapters import ADAPTERS
from strategies import STRATEGIES, Strategy

FORMULAS = {"A": "r·n", "B": "m·r", "R": "r²", "M": "r²"}
"""Numbers of one factor in a layer with n inputs and m outputs at rank r."""
DEFAULT_SHAPES: Sequence[tuple[int, int]] = ((384, 384),) * 12
"""(m, n) of the default job's layers: query and value of MiniLM's six blocks."""
DEFAULT_RANK = 8


def factor_bytes(factors: Sequence[str], shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Return the payload of these factors over all layers, in bytes, at four bytes a number."""
    size = {
        "A": lambda m, n: rank * n,
        "B": lambda m, n: m * rank,
        "R": lambda m, n: rank * rank,
        "M": lambda m, n: rank * rank,
    }
    return 4 * sum(size[factor](m, n) for factor in factors for m, n in shapes)


def _travels(factors: Sequence[str]) -> str:
    return " + ".join(FORMULAS[factor] for factor in factors)


def _row(strategy: type[Strategy]) -> str:
    adapter = ADAPTERS[strategy.adapters[0]]
    up = factor_bytes(strategy.sent, DEFAULT_SHAPES, DEFAULT_RANK)
    down = factor_bytes(strategy.received, DEFAULT_SHAPES, DEFAULT_RANK)
    cells = [
        f"`{strategy.name}` ({strategy.paper})",
        ", ".join(adapter.trained),
        f"{_travels(strategy.sent)} = {up:,} B",
        f"{_travels(strategy.received)} = {down:,} B",
        "yes" if strategy.exact else "no",
        strategy.noise,
        strategy.privacy,
    ]
    return "| " + " | ".join(cells) + " |"


def strategy_table() -> str:
    """Return the Markdown table of all strategies."""
    header = "| strategy | trained | up: per layer = per site and round | down: per layer = per site and round "
    header += "| exact | noise in the weights, per step | privacy modes |"
    return "\n".join([header, "|" + "---|" * 7, *map(_row, STRATEGIES.values())])

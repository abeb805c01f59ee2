"""Privacy figures as people read them: rounded against whoever makes the claim, never in its favour."""

from __future__ import annotations

import math

NO_CLAIM = "no claim"


def epsilon_text(value: float | None, absent: str = NO_CLAIM, decimals: int = 3) -> str:
    """Return an ε that is never rounded down.

    >>> epsilon_text(7.99941), epsilon_text(None), epsilon_text(float("inf"))
    ('8.000', 'no claim', '∞')
    """
    if value is None:
        return absent
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    scale = 10**decimals
    return f"{math.ceil(value * scale - 1e-6) / scale:.{decimals}f}"


def remaining_text(value: float | None, decimals: int = 3) -> str:
    """Return what is left of a budget, never rounded up."""
    if value is None or not math.isfinite(value):
        return epsilon_text(value)
    scale = 10**decimals
    return f"{math.floor(value * scale + 1e-6) / scale:.{decimals}f}"

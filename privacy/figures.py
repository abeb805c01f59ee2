"""Privacy figures as people read them: rounded against the one who makes the claim, never in its favour."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

NO_CLAIM = "no claim"
MOST_IN_FULL = 10**6
"""From here on a figure bounds nothing, and has up to 309 digits before its point."""


def epsilon_text(value: float | None, absent: str = NO_CLAIM, decimals: int = 3) -> str:
    """Return an ε that is never rounded down, from a million on with four digits.

    >>> epsilon_text(7.99941), epsilon_text(7.0000000009), epsilon_text(0.1), epsilon_text(7.995)
    ('8.000', '7.001', '0.100', '7.995')
    >>> epsilon_text(999_999.5), epsilon_text(1_234_567.0)
    ('999999.500', '1.235e+6')
    >>> epsilon_text(None), epsilon_text(float("inf"))
    ('no claim', '∞')
    """
    if value is None:
        return absent
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    return _rounded(value, decimals, ROUND_CEILING)


def remaining_text(value: float | None, decimals: int = 3) -> str:
    """Return what is left of a budget, never rounded up.

    >>> remaining_text(0.9999999995), remaining_text(0.3)
    ('0.999', '0.300')
    """
    if value is None or not math.isfinite(value):
        return epsilon_text(value)
    return _rounded(value, decimals, ROUND_FLOOR)


def bound_text(share: float) -> str:
    """Return an upper bound of a share in percent, never rounded down.

    >>> bound_text(0.040541), bound_text(1.0), bound_text(0.1)
    ('4.06 %', '100.00 %', '10.00 %')
    """
    return f"{_rounded(100 * share, 2, ROUND_CEILING)} %"


def most_delta_text(units: int) -> str:
    """Return the largest δ that is no more than one over ``units``, to two digits, never rounded up.

    >>> most_delta_text(2200), most_delta_text(20), most_delta_text(900_000)
    ('0.00045', '0.05', '1.1e-06')
    """
    share = 1 / units
    digits = 1 - math.floor(math.log10(share))
    return f"{float(_rounded(share, digits, ROUND_FLOOR)):g}"


def _rounded(value: float, decimals: int, towards: str) -> str:
    # The shortest decimal that reads back as this number: what was typed as 0.1 is shown as 0.100.
    typed = Decimal(repr(float(value)))
    if abs(typed) >= MOST_IN_FULL:
        return f"{Context(prec=4, rounding=towards).plus(typed):.3e}"
    return f"{typed.quantize(Decimal(10) ** -decimals, towards, Context(prec=400)):zf}"


def honest_text(honest_sites: int) -> str:
    """Return what an ε assumes that counts on ``honest`` honest sites of each sum; empty: it counts on none.

    >>> honest_text(3), honest_text(0)
    (' (h = 3)', '')
    """
    return f" (h = {honest_sites})" if honest_sites else ""

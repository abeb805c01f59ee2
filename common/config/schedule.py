"""The course of a learning rate over a run."""

from __future__ import annotations

import math

WARM_UP = 0.1
"""The part of a ``slanted`` course in which it rises, as its paper has it."""


def learning_rate(schedule: str, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``total_steps`` over the whole run, from ``peak`` down.

    That of ``slanted`` rises to the peak first: slanted triangular rates, Howard and Ruder 2018, arXiv 1801.06146,
    eq. 3. It falls to 0, where the paper stops at a 32nd of the peak.
    """
    total = max(1, total_steps)
    progress, rising = step / total, max(1.0, WARM_UP * total)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "slanted": min((step + 1) / rising, (total - step) / max(1.0, total + 1 - rising)),
    }[schedule]
    return peak * factor

"""The course of a learning rate over a run."""

from __future__ import annotations

import math


def learning_rate(schedule: str, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``total_steps`` over the whole run, from ``peak`` down."""
    progress = step / max(1, total_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]
    return peak * factor

"""From the results that count to what a strategy averages."""

from __future__ import annotations

from collections.abc import Sequence

from common.messages import TrainResult
from strategies import Contribution


def contributions(results: Sequence[TrainResult]) -> list[Contribution]:
    """Return what a strategy averages, weighted by the sizes that sites declare as public."""
    return [Contribution(result.site, float(result.public_size), result.contribution) for result in results]

"""The public grids on which clipped gradients are added and noised sums are released.

Both steps are powers of two that follow from the noise alone. A sum of gradients lies on the finer one as whole
numbers, so that order and division of its terms never show; noise takes it to the coarser one (``privacy.randomness``).
"""

from __future__ import annotations

import math

from fedveil.common.errors import ConfigError

GRID_BITS = 10
"""A grid step is the noise's standard deviation over 2 to this power, or up to half of that."""
SUM_BITS = 16
"""A step of what is added is a step of that grid over 2 to this power,"""
MOST_BITS = 36
"""but at least the clip norm over 2 to this power, or half of that."""
WHOLE = 2**53
"""Whole numbers up to this one are added in float64 exactly, in whatever order."""


def noise_grid(std: float) -> float:
    """Return the step of the public grid for noise of that standard deviation: a power of two.

    >>> noise_grid(1.0), noise_grid(1.99) == noise_grid(1.0), noise_grid(30.0)
    (0.0009765625, True, 0.015625)
    """
    return 2.0 ** (math.frexp(std)[1] - 1 - GRID_BITS)


def sum_grid(clip_norm: float, std: float) -> float:
    """Return the step of the grid on which clipped gradients are added: a power of two.

    It is at most ``std`` / 2²⁶, but for noise that no plan may have, which is less than 2⁻⁹ clips.

    >>> sum_grid(1.0, 1.0) == noise_grid(1.0) / 2**16, sum_grid(1.0, 1e-12) == 2.0**-36
    (True, True)
    """
    return max(noise_grid(std) / 2**SUM_BITS, 2.0 ** (math.frexp(clip_norm)[1] - 1 - MOST_BITS))


def most_units(clip_norm: float, step: float) -> int:
    """Return how many units' clipped gradients fit one sum on a grid of that step, whatever they are.

    >>> most_units(1.0, sum_grid(1.0, 0.01)), most_units(0.5, sum_grid(0.5, 0.5 * 0.8))
    (1048576, 67108864)
    """
    return math.floor(WHOLE / (clip_norm / step))


def check_sum(units: float, clip_norm: float, std: float) -> None:
    """Raise ConfigError unless ``units`` clipped gradients always fit a sum's whole numbers.

    Args:
        units: most of one step, by the public size.
        clip_norm: of each.
        std: standard deviation of the noise, which the grid follows from.
    """
    most = most_units(clip_norm, sum_grid(clip_norm, std))
    if units > most:
        raise ConfigError(
            f"a sum of {units:,.0f} gradients of clip norm {clip_norm:g} with noise {std:g} is not exact in 53 bits "
            f"(at most {most:,}): raise privacy.noise-multiplier, or declare a smaller public size"
        )

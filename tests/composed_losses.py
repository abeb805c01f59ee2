"""Losses of privacy that are composed, and their ε."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]


def composed_losses(releases: list[tuple[float, float, int]], units: int) -> list[tuple[Floats, Floats]]:
    """Return for either direction the losses of all releases together and their chances, by a sum over a fine grid.

    The second method: densities on a grid of outcomes, their log-ratio, each outcome's mass divided between the two
    nearest losses so that the mean stays, and one convolution. No library of accountants takes part.

    Args:
        releases: sample rate, noise multiplier and how many.
        units: of the one person who is there or not.
    """
    made = []
    for upwards in (True, False):
        found = [(*_loss(rate, noise, units, upwards=upwards), count) for rate, noise, count in releases]
        step = max(1e-3, sum((loss.max() - loss.min()) * count for loss, _, count in found) / 2e6)
        parts, lowest = [], 0
        for loss, mass, count in found:
            low = math.floor(loss.min() / step)
            place = loss / step - low
            part = np.zeros(math.ceil(loss.max() / step) - low + 2)
            floor = place.astype(int)
            np.add.at(part, floor, mass * (1 - (place - floor)))
            np.add.at(part, floor + 1, mass * (place - floor))
            parts.append((part, count))
            lowest += low * count
        size = sum(count * (len(part) - 1) for part, count in parts) + 1
        power = 2 ** math.ceil(math.log2(size))
        turned = np.prod([np.fft.rfft(part, power) ** count for part, count in parts], axis=0)
        whole = np.fft.irfft(turned, power)[:size].clip(0)
        made.append(((np.arange(size) + lowest) * step, whole / whole.sum()))
    return made


def _loss(rate: float, noise: float, units: int, *, upwards: bool) -> tuple[Floats, Floats]:
    """Return the loss at each of many outcomes, and the outcome's chance."""
    x = np.linspace(-12 * noise, units + 12 * noise, 400_001)
    centres = np.arange(units + 1)
    weights = np.array([math.comb(units, k) * rate**k * (1 - rate) ** (units - k) for k in centres])
    mixture = sum(w * norm.pdf(x, k, noise) for w, k in zip(weights, centres, strict=True) if w)
    plain = norm.pdf(x, 0, noise)
    above, below = (mixture, plain) if upwards else (plain, mixture)
    kept = (above > 0) & (below > 0)
    return np.log(above[kept] / below[kept]), above[kept] * (x[1] - x[0])


def delta_at(made: list[tuple[Floats, Floats]], eps: float) -> float:
    return max(float((chance[loss > eps] * -np.expm1(eps - loss[loss > eps])).sum()) for loss, chance in made)


def epsilon_at(made: list[tuple[Floats, Floats]], delta: float) -> float:
    low, high = 0.0, 500.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(made, middle) > delta else (low, middle)
    return high

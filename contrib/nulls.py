"""Statistics of noised changes, and what they are where there is noise and nothing else.

The noise of a private step is known: its standard deviation on every coordinate follows from what a site states. So
is the law of anything computed from it, and a threshold needs no trial. All of this is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from torch import Tensor

LEVEL = 0.05
"""Chance that any one of all layers of a round is taken for one that learns where none does."""
DRAWS = 10_000
"""Of the largest singular value of noise, once for each shape."""
WIDE = 128
"""Smaller side of a matrix from which on its edge is that of Tracy and Widom's limit."""
EVEN = 0.99
"""Least over largest singular value from which on a matrix counts as a turn of the identity."""
FEWER_DRAWS = 5_000
"""Of the largest singular value of noise behind a matrix of uneven ones, at least."""
BEYOND = 4
"""Of these draws, how many are to be above a level's quantile."""
_TRACY_WIDOM = (46.446, 0.186054, 9.84801)
"""Shape, scale and shift of the gamma law that approximates Tracy and Widom's (Chiani 2014, real case)."""


@dataclass(frozen=True)
class Energy:
    """What several sites' changes of the same tensors have in common."""

    value: float
    """Σ_{j≠k} p_j p_k ⟨D_j, D_k⟩."""
    deviation: float | None
    """Its standard deviation where there is noise alone; None where the noise is not known."""
    agreement: float
    """``value`` over Σ_{j≠k} p_j p_k ‖D_j‖ ‖D_k‖, from -1 to 1: the mean cosine of two sites' changes; 0 of nothing."""

    @property
    def score(self) -> float | None:
        """``value`` in standard deviations: mean 0 and standard deviation 1 under noise alone."""
        return None if self.deviation is None else self.value / self.deviation


def cross_site_energy(
    shares: Sequence[float], changes: Sequence[Tensor], noises: Sequence[float] | None = None
) -> Energy | None:
    """Return the energy that sites' changes have in common; None if there are not two of them.

    Its mean under noise alone is 0 whatever the noise is, for sites draw theirs apart: neither more noise than a site
    states nor the sampling of its records moves it. The noise only scales ``score``, whose variance is
    2 d Σ_{j≠k} p_j² p_k² τ_j² τ_k² over d numbers.

    Args:
        shares: p_k, of sum 1.
        changes: D_k, each of shape (d,), float64.
        noises: τ_k, the standard deviation of one coordinate of what noise is in D_k; None: not known.
    """
    if len(changes) < 2:
        return None
    weighed = [share * change for share, change in zip(shares, changes, strict=True)]
    lengths = [float(part.norm()) for part in weighed]
    own = math.fsum(length**2 for length in lengths)
    total = weighed[0].clone()
    for part in weighed[1:]:
        total += part
    value, most = float(total.square().sum()) - own, math.fsum(lengths) ** 2 - own
    deviation = None
    if noises is not None and all(noise > 0 for noise in noises):
        squares = [(share * noise) ** 2 for share, noise in zip(shares, noises, strict=True)]
        pairs = math.fsum(squares) ** 2 - math.fsum(square**2 for square in squares)
        deviation = math.sqrt(2 * len(total) * pairs)
    return Energy(value, deviation, value / most if most > 0 else 0.0)


def evened(changes: Sequence[Tensor], noises: Sequence[float] | None = None) -> list[Tensor]:
    """Return sites' changes of the same tensors, none longer than the middle one, each over its noise.

    Of noise all are about as long, in these units. One that is longer would have more of a vote: the energy's standard
    deviation under noise alone grows with it, so that its sender could have any score, of either sign, by chance.
    Behind this it has no more than a site whose change is noise. Of an even number it is the shorter of the middle two.

    Args:
        changes: D_k, each of shape (d,).
        noises: τ_k; None: not known, and each counts as 1.
    """
    units = [1.0] * len(changes) if noises is None else noises
    lengths = [float(change.norm()) / unit for change, unit in zip(changes, units, strict=True)]
    most = sorted(lengths)[(len(lengths) - 1) // 2]
    return [
        change * (most / length) if length > most else change for change, length in zip(changes, lengths, strict=True)
    ]


def least_score(layers: int) -> float:
    """Return the score above which one of ``layers`` layers learns; one round in 1/``LEVEL`` has such a one by chance.

    >>> round(least_score(12), 2)
    2.64
    """
    return NormalDist().inv_cdf(1 - LEVEL / layers)


def noise_edge(rows: int, columns: int, level: float) -> float:
    """Return what the largest singular value of a matrix of standard normal numbers exceeds with chance ``level``.

    The singular values are those of a bidiagonal matrix of independent chi numbers (Dumitriu and Edelman 2002), so the
    law is drawn exactly, from a fixed seed, at the cost of the smaller side. From ``WIDE`` on it is Johnstone's limit,
    √(μ + v q) with q Tracy and Widom's quantile.

    >>> noise_edge(384, 8, 0.05) == noise_edge(8, 384, 0.05)
    True
    """
    large, small = max(rows, columns), min(rows, columns)
    if small >= WIDE:
        return _limit(large, small, level)
    return float(np.quantile(_largest(large, small), 1 - level))


def edge_behind(rows: int, gains: Sequence[float], level: float) -> float:
    """Return what the largest singular value of x S exceeds with chance ``level``, for S of these singular values.

    Of x the numbers are standard normal, shape (rows, len(gains)); S is any matrix of ``len(gains)`` rows. Where all
    gains are equal it is ``noise_edge`` times them. Else it is drawn, from a fixed seed. The k-th
    largest of n draws is exceeded by one more with chance k / (n + 1), so over seeds the chance is ``level``. Behind
    one S it is off by about 1 / √k, with k at least ``BEYOND``; layers of unlike S even that out.

    Args:
        rows: of x.
        gains: singular values, at least one of them above 0.
        level: a chance.
    """
    largest = max(gains)
    scaled = tuple(round(gain / largest, 4) for gain in gains)
    if min(scaled) >= EVEN:
        return largest * noise_edge(rows, len(gains), level)
    count = max(FEWER_DRAWS, math.ceil(BEYOND / level))
    return largest * float(np.quantile(_behind(rows, scaled, count), 1 - level, method="weibull"))


def without_lift(lifted: Tensor, size: int, noise: float) -> Tensor:
    """Return what eigenvalues of a symmetric matrix were before its noise; 0 where noise alone reaches as far.

    Noise of standard deviation τ on every number of a packed matrix (``contrib.starts.inputs``) of n rows reaches
    τ √(2 n) alone, the limit of large n, above which one matrix of noise in six is by a little. It lifts an eigenvalue
    λ above τ √(n / 2) to h = λ + n τ² / (2 λ), and what is lower to nothing above that edge (Benaych-Georges and
    Nadakuditi 2011). So λ = (h + √(h² - 2 n τ²)) / 2.

    Args:
        lifted: h, of any shape, float64.
        size: n.
        noise: τ, at least 0.

    >>> import torch
    >>> without_lift(torch.tensor([0.32, 0.0185, 0.01]).double(), 384, 4e-4).round(decimals=4).tolist()
    [0.3199, 0.0167, 0.0]
    """
    edge = noise * math.sqrt(2 * size)
    root = ((lifted - edge) * (lifted + edge)).clamp(min=0).sqrt()
    return ((lifted + root) / 2).where(lifted > edge, 0.0)


@lru_cache(maxsize=256)
def _behind(rows: int, gains: tuple[float, ...], draws: int) -> np.ndarray:
    """Return draws of the largest singular value of x S."""
    kept = np.array([gain for gain in gains if gain > 0])
    count, draw = len(kept), np.random.default_rng([rows, *(int(gain * 10_000) for gain in kept)])
    if rows < count:
        drawn = draw.standard_normal((draws, rows, count))
    else:  # x = Q T with T triangular (Bartlett), and Q changes no singular value
        drawn = np.triu(draw.standard_normal((draws, count, count)), 1)
        drawn[:, np.arange(count), np.arange(count)] = np.sqrt(draw.chisquare(rows - np.arange(count), (draws, count)))
    drawn *= kept
    return np.sqrt(np.linalg.eigvalsh(drawn @ drawn.transpose(0, 2, 1))[:, -1])


@lru_cache(maxsize=64)
def _largest(large: int, small: int) -> np.ndarray:
    """Return draws of the largest singular value of a matrix of standard normal numbers."""
    draw = np.random.default_rng([large, small])
    diagonal = np.sqrt(draw.chisquare(large - np.arange(small), (DRAWS, small)))
    beside = np.sqrt(draw.chisquare(small - 1 - np.arange(small - 1), (DRAWS, small - 1)))
    squares = diagonal**2
    squares[:, 1:] += beside**2
    products = (diagonal[:, :-1] * beside) ** 2
    low, high = np.zeros(DRAWS), np.full(DRAWS, (math.sqrt(large) + math.sqrt(small) + 8) ** 2)
    for _ in range(40):
        middle = (low + high) / 2
        above = _all_below(middle, squares, products)
        high, low = np.where(above, middle, high), np.where(above, low, middle)
    return np.sqrt(high)


def _all_below(bound: np.ndarray, squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return of each tridiagonal matrix whether its eigenvalues are all below its bound (Sturm's sequence)."""
    rest = bound - squares[:, 0]
    below = rest > 0
    for i in range(1, squares.shape[1]):
        rest = bound - squares[:, i] - products[:, i - 1] / np.where(rest == 0, 1e-300, rest)
        below &= rest > 0
    return below


def _limit(large: int, small: int, level: float) -> float:
    from scipy.stats import gamma

    root, other = math.sqrt(large - 1), math.sqrt(small)
    shape, scale, shift = _TRACY_WIDOM
    quantile = float(gamma.ppf(1 - level, shape, scale=scale)) - shift
    return math.sqrt((root + other) ** 2 + (root + other) * (1 / root + 1 / other) ** (1 / 3) * quantile)

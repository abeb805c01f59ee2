"""Noised sums as whole steps of a public grid, in words modulo 2³², and their sum.

A site's noise is ``noise_share``, a part of what the price counts on; the parts of ``honest_sites`` make the whole.
``privacy.randomness`` draws it: exactly the law of a rounded sum of a vector and a real Gaussian. The sum of vectors
that were so rounded is a rounding of the sum of the vectors plus one real Gaussian, up to a total variation that is nil
on this grid (the theorem of ``docs/concepts/secure-aggregation.md``). So the price of a Gaussian holds for it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

from fedveil.common.check import positive
from fedveil.common.errors import ConfigError, MechanismError, ProtocolError
from fedveil.common.later import np, torch
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.randomness import add_private_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

WORD_BITS = 32
_RANGE = 2**WORD_BITS
_RARE = 64 * math.log(2)
"""Of what happens once in 2⁶⁴ sums, minus the logarithm of the chance."""
_DEVIATIONS = 12
"""A coordinate's noise lies beyond so many standard deviations once in 2¹⁰⁷ sums."""


def noise_share(noise_multiplier: float, clip_norm: float, honest_sites: int) -> float:
    """Return the standard deviation of each site's noise: the least s with ``honest_sites`` · s² >= (noise · clip)².

    Exactly so, not up to rounding: what is priced is never above what is drawn.

    >>> noise_share(3.0, 0.5, 4), noise_share(1.0, 1.0, 1)
    (0.75, 1.0)
    """
    positive(noise_multiplier=noise_multiplier, clip_norm=clip_norm, honest_sites=honest_sites)
    whole = (Fraction(noise_multiplier) * Fraction(clip_norm)) ** 2
    share = noise_multiplier * clip_norm / math.sqrt(honest_sites)
    while honest_sites * Fraction(share) ** 2 >= whole:
        share = math.nextafter(share, 0.0)
    while honest_sites * Fraction(share) ** 2 < whole:
        share = math.nextafter(share, math.inf)
    return share


def rounded(sums: Tensor, share: float, margin: float = 1.0) -> NDArray[np.uint32]:
    """Return a site's vector plus its noise, in whole steps of the grid, modulo 2³².

    Args:
        sums: shape (numbers,), the sum of clipped gradients; used in float64.
        share: standard deviation of the noise; the grid follows from it.
        margin: factor on the noise beyond what is priced, at least 1; the grid stays.

    Raises:
        MechanismError: a number is not finite.
        ConfigError: as ``add_private_noise``.
    """
    if not bool(sums.isfinite().all()):
        raise MechanismError("a sum of clipped gradients is not finite: nothing of it can be sent")
    steps = add_private_noise(sums.double(), share * margin, noise_grid(share)) / noise_grid(share)
    # Exact for whole numbers of any size, before they have to fit an integer.
    return torch.fmod(steps, _RANGE).to(torch.int64).numpy().astype(np.uint32)


def total(vectors: Iterable[NDArray[np.uint32]], share: float) -> Tensor:
    """Return what the vectors of all sites of an attempt add up to, without masks: shape (numbers,), float64.

    Args:
        vectors: one for each site, of equal length.
        share: standard deviation of each site's noise.

    Raises:
        ProtocolError: the list is empty, or they are not of one length and of words.
    """
    words: NDArray[np.uint32] | None = None
    for vector in vectors:
        words = np.zeros_like(vector) if words is None else words
        if vector.dtype != np.uint32 or vector.shape != words.shape:
            raise ProtocolError("the vectors of an attempt are not words of one number: it has no sum")
        words += vector
    if words is None:
        raise ProtocolError("an attempt without vectors has no sum")
    return torch.from_numpy(words.view(np.int32).astype(np.float64)) * noise_grid(share)


def check_headroom(expected_records: float, clip_norm: float, share: float, sites: int) -> None:
    """Raise ConfigError unless a sum of all sites fits its words, but for once in 2⁶³ sums.

    A sum that wraps costs no privacy, it is only wrong.

    Args:
        expected_records: in a sum of all sites: sample rate times public sizes.
        clip_norm: most that one record adds to a coordinate.
        share: standard deviation of each site's noise.
        sites: most sites of a sum.
    """
    positive(expected_records=expected_records, clip_norm=clip_norm, share=share, sites=sites)
    # Bernstein's bound on the number of records of Poisson samples.
    most = expected_records + _RARE / 3 + math.sqrt((_RARE / 3) ** 2 + 2 * _RARE * expected_records)
    steps = (most * clip_norm + _DEVIATIONS * math.sqrt(sites) * share) / noise_grid(share) + sites / 2
    if steps >= _RANGE / 2:
        raise ConfigError(
            f"a sum of {expected_records:,.0f} records with noise {share:g} at each site does not fit {WORD_BITS} bits "
            f"({steps:.3g} steps of the grid, at most {_RANGE / 2:.3g}): lower training.sample-rate, or count on fewer "
            "honest sites"
        )

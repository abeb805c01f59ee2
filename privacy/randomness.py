"""The sources of random numbers.

Two kinds that must never be mixed up:

* **Named streams** (adapter start, partitions, non-private batch order) follow from the run's
  public seed, so that server and sites can derive the same values.
* **Private randomness** (Poisson sampling, Gaussian noise, coins of rows) comes from the operating system's
  entropy (``privacy.entropy``). No function here takes a seed for it; one who knows every seed of a run
  learns nothing about it (pitfall 11 in ``docs/concepts/evidence.md``).

Floating-point noise betrays what it is added to by the values that it cannot take (Mironov 2012,
"On significance of the least significant bits for differential privacy"). Noise therefore never exists
here as a number of its own: ``add_private_noise`` returns a multiple of a public grid g, with exactly
the law of g · round((S + N) / g) for the sum S as it is in float64 and a real N ~ N(0, std²). Rounding
is post-processing, so that the account of the Gaussian mechanism holds as it is. How:

* N = std · Φ⁻¹(W) for a real W, uniform on (0, 1). Bits 1 to 96 of W are drawn (a sign, and 95 bits of the
  distance to the nearer end, so that both tails are the same), and float64 finds the cell of S + N to
  within ``_DOUBT`` standard deviations; S enters as what it exceeds a multiple of g by, which is exact.
* Where another W with these bits could give another cell, because a border is that near or N lies beyond
  ``_TAIL`` standard deviations (at most 2⁻²⁸ of all numbers), as many more bits are drawn as decide, in interval
  arithmetic of any precision.

So sampler and grid add no δ. This depends on three things: the operating system's bits are uniform, float64's
error stays below ``_DOUBT``, and mpmath's Φ keeps half of its guard bits. Tests hold the last two, with room.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from fedveil.common.check import in_range
from fedveil.common.later import np, torch
from fedveil.privacy.entropy import private_words
from fedveil.privacy.grid import noise_grid

if TYPE_CHECKING:
    from torch import Tensor

_DOUBT = 2.0**-40
"""Bound on the error of float64's normal quantile within ``_TAIL``, in standard deviations; measured: 2⁻⁴⁸."""
_TAIL = 8.0
_CHUNK = 1 << 14
"""Numbers at a time, so that what is computed on the way stays in a processor's cache."""
_STDS = (2.0**-500, 2.0**500)


def stream(seed: int, *names: object) -> torch.Generator:
    """Return the CPU generator of the public stream called ``names`` under ``seed``."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def add_private_noise(total: Tensor, std: float, step: float = 0.0) -> Tensor:
    """Return ``total`` + N(0, std²), rounded to a multiple of ``step``, as float64 on the CPU.

    Guarantees: exactly the law of the rounded sum of a real Gaussian (module docstring), each number on its
    own, for every finite ``total`` of any shape and device; zeros carry no sign.

    Args:
        total: what is noised.
        std: standard deviation of the noise.
        step: of the grid, a power of two; 0: ``noise_grid(std)``.

    Raises:
        ConfigError: ``std`` is not above 0, or beyond what float64 can hold a grid for.
    """
    in_range(*_STDS, noise_std=std)
    step = step or noise_grid(std)
    # A power of two: the division moves no bit.
    sums = total.detach().cpu().double().flatten() / step
    for chunk in sums.split(_CHUNK):
        chunk.copy_(_noised_cells(chunk, std / step))
    # A zero's sign would tell on which side of it the sum was.
    return (sums + 0.0).mul_(step).view(total.shape)


def _noised_cells(sums: Tensor, std: float) -> Tensor:
    """Return round(sums + N(0, std²)), all in steps of the grid; shape (numbers,)."""
    count = len(sums)
    words = private_words(count + (count + 1) // 2)
    first, second = words[:count], words[count:].view(np.uint32)[:count]
    side = torch.from_numpy(1.0 - 2.0 * (first & np.uint64(1)))
    distance = ((first >> np.uint64(1)) + (second + 0.5) * 2.0**-32) * 2.0**-64
    lower = torch.special.ndtri(torch.from_numpy(distance))  # <= 0
    whole = sums.round()
    rest = sums - whole  # exact, whereas what exceeds the next lower multiple is not
    place = rest + side * lower * std
    cells = place.round()
    doubtful = ((place - cells).abs() > 0.5 - _DOUBT * std) | (lower < -_TAIL)
    for i in doubtful.nonzero()[:, 0].tolist():
        bits = int(first[i] >> np.uint64(1)) << 32 | int(second[i])
        # Mirrored where the noise is above 0, so that it always lies in the lower tail.
        sign = int(side[i])
        cells[i] = sign * _settled(bits, sign * float(rest[i]), std, sign * int(cells[i]))
    return whole + cells


def _settled(bits: int, rest: float, std: float, guess: int) -> int:
    """Return round(rest + std · Φ⁻¹(W)) for a W that opens with the 96 ``bits``; more are drawn until it is decided."""
    from mpmath.ctx_mp import MPContext

    exact, known, cell = MPContext(), 96, guess
    while True:
        exact.prec = known + 128

        def up_to(cell: int) -> Any:
            return exact.ncdf((cell + exact.mpf(0.5) - rest) / std)

        low, high, slack = (exact.mpf(n) / 2**known for n in (bits, bits + 1, exact.mpf(2) ** -64))
        while up_to(cell) <= low:
            cell += 1
        while 0 < low < up_to(cell - 1):
            cell -= 1
        if up_to(cell - 1) + slack <= low and high + slack <= up_to(cell):
            return cell
        bits, known = bits << 64 | int(private_words(1)[0]), known + 64


def private_poisson_sample(size: int, rate: float) -> Tensor:
    """Return the indices (int64, ascending) of a Poisson sample: each of ``size`` with chance ``rate``."""
    if rate >= 1.0:
        return torch.arange(size)
    threshold = np.uint64(int(rate * 2.0**64))
    return torch.from_numpy((private_words(size) < threshold).nonzero()[0])


def private_uniform(count: int) -> Tensor:
    """Return ``count`` uniform numbers from 0 up to below 1, multiples of 2⁻⁵³: float64 of shape (count,)."""
    return torch.from_numpy((private_words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

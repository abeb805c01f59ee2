"""Shares of a secret: a threshold of them reveals it, and one fewer reveals nothing (Shamir 1979).

A secret is the value at 0 of a polynomial over the integers modulo ``PRIME``, whose other coefficients are uniform. The
holder with the number x, from 1, has the value at x. The field holds every secret of 32 bytes as it is, and a share has
33. (Libraries share 16 bytes over GF(2¹²⁸), bit by bit: two orders of magnitude slower for a hundred holders.)

The secrets of an attempt have the same holders. So the weights of those who answered are computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum.masks import mask_of

PRIME = 2**256 + 297
"""The least prime above 2²⁵⁶."""
SECRET_BYTES, SHARE_BYTES = 32, 33
_DRAW_BYTES = 48
"""Of a coefficient before the remainder: its law is uniform but for 2⁻¹²⁷."""


def split(secret: bytes, threshold: int, holders: int, seed: bytes) -> list[bytes]:
    """Return the shares of ``holders`` holders, ``SHARE_BYTES`` each, in the order of their numbers from 1.

    Args:
        secret: ``SECRET_BYTES``.
        threshold: shares that reveal the secret.
        holders: at least ``threshold``.
        seed: 32 secret bytes that serve this one secret; the coefficients are ``mask_of`` it.

    Raises:
        MechanismError: the secret has another length, or the threshold is not from 1 to ``holders``.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise MechanismError(
            f"a secret of {len(secret)} bytes cannot be shared by {holders} holders of whom {threshold} tell it"
        )
    drawn = mask_of(seed, _DRAW_BYTES // 4 * (threshold - 1)).astype("<u4").tobytes()
    starts = range(0, len(drawn), _DRAW_BYTES)
    coefficients = [int.from_bytes(drawn[start : start + _DRAW_BYTES], "big") % PRIME for start in starts]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = []
    for number in range(1, holders + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * number + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def weights(numbers: Sequence[int]) -> list[int]:
    """Return by what the shares of the holders with these numbers are multiplied: Lagrange's at 0, modulo ``PRIME``.

    Raises:
        ProtocolError: a number is there twice, or belongs to no holder.
    """
    if len(set(numbers)) < len(numbers) or not all(0 < number < PRIME for number in numbers):
        raise ProtocolError("shares are of holders that are there twice, or of none: no secret follows from them")
    found = []
    for own in numbers:
        above, below = 1, 1
        for other in numbers:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def is_share(content: bytes) -> bool:
    """Return whether ``content`` could be a holder's: ``SHARE_BYTES`` of a number below ``PRIME``."""
    return len(content) == SHARE_BYTES and int.from_bytes(content, "big") < PRIME


def combined(shares: Sequence[bytes], factors: Sequence[int]) -> bytes:
    """Return the secret of exactly as many shares as the threshold; ``factors`` are their holders' ``weights``.

    Raises:
        ProtocolError: one is no share, or together they are none of a secret.
    """
    if not all(is_share(share) for share in shares):
        raise ProtocolError("what a site answers with is no share of a secret")
    secret = sum(int.from_bytes(share, "big") * factor for share, factor in zip(shares, factors, strict=True)) % PRIME
    if secret.bit_length() > 8 * SECRET_BYTES:
        raise ProtocolError("shares do not belong together: no secret follows from them")
    return secret.to_bytes(SECRET_BYTES, "big")


def threshold(sites: int, colluders: int) -> int:
    """Return how many shares tell a secret, such that no two groups get both of a site's from ``sites`` holders.

    ``colluders`` holders may answer both groups, and every other one answers one.

    >>> threshold(4, 1), threshold(20, 1), threshold(100, 10)
    (3, 11, 56)
    """
    return (sites + colluders) // 2 + 1


def least_sites(honest: int, colluders: int, drop_outs: int) -> int:
    """Return with how many sites an attempt begins, so that ``drop_outs`` of them may be lost at any time.

    What is left has ``honest`` honest sites beside ``colluders``, and tells the secrets.

    >>> least_sites(2, 1, 0), least_sites(2, 1, 2), least_sites(15, 1, 4)
    (3, 6, 20)
    """
    return max(honest + colluders + drop_outs, 2 * drop_outs + colluders + 1)


def may_be_lost(sites: int, honest: int, colluders: int, drop_outs: int, min_sites: int) -> int:
    """Return how many of an attempt's ``sites`` may be lost: ``drop_outs``, or fewer where some are gone for good.

    What is left has ``honest`` honest sites beside ``colluders``, is ``min_sites`` at least, and tells the secrets.

    >>> [may_be_lost(sites, 2, 1, 2, 2) for sites in (7, 6, 5, 4, 3)]
    [2, 2, 1, 1, 0]
    """
    return max(0, min(drop_outs, sites - min_sites, sites - honest - colluders, (sites - colluders - 1) // 2))

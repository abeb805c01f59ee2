"""Shares of a secret: as many as the threshold tell it, and fewer tell nothing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest

from audits.bands import out_of_band
from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum.masks import Words, mask_of
from fedveil.privacy.secure_sum.shares import PRIME, SECRET_BYTES, SHARE_BYTES, combined, split, weights


# --- shares -----------------------------------------------------------------------------------------------------------
def by_hand(points: Sequence[tuple[int, int]]) -> int:
    """Solve the polynomial through these points for its value at 0, in fractions, and take the remainder once."""
    rows = [[Fraction(x) ** power for power in range(len(points))] + [Fraction(y)] for x, y in points]
    for i, row in enumerate(rows):
        rows[i] = row = [value / row[i] for value in row]
        for k, other in enumerate(rows):
            if k != i:
                rows[k] = [a - other[i] * b for a, b in zip(other, row, strict=True)]
    value = rows[0][-1]
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


@pytest.mark.parametrize(("needed", "holders"), [(1, 1), (2, 3), (3, 3), (4, 7), (51, 100)])
def test_as_many_shares_as_the_threshold_tell_the_secret_and_no_fewer(needed: int, holders: int) -> None:
    secret = os.urandom(SECRET_BYTES)
    shares = split(secret, needed, holders, os.urandom(32))
    assert {len(share) for share in shares} == {SHARE_BYTES}
    groups = itertools.islice(itertools.combinations(range(1, holders + 1), needed), 40)
    for group in [*groups, tuple(range(holders - needed + 1, holders + 1))]:
        given = [shares[number - 1] for number in group]
        assert combined(given, weights(group)) == secret
    if needed > 1:
        fewer = range(1, needed)
        with suppress(ProtocolError):  # a value of 257 bits
            assert combined(shares[: needed - 1], weights(fewer)) != secret


def test_shares_are_those_of_a_polynomial_solved_by_hand() -> None:
    secret, seed = bytes(range(32)), bytes(32)
    shares = split(secret, 4, 6, seed)
    points = [(number, int.from_bytes(shares[number - 1], "big")) for number in (1, 3, 4, 6)]
    assert by_hand(points) == int.from_bytes(secret, "big")
    assert split(secret, 4, 6, seed) == shares
    assert split(secret, 4, 6, b"\1" * 32) != shares


def test_one_share_fewer_fits_every_secret_alike() -> None:
    """With two of three shares: to each secret there is one value of the third, and all values are as likely."""
    drawn = [split(bytes(SECRET_BYTES), 3, 3, os.urandom(32)) for _ in range(4000)]
    for holder in range(3):
        cells = np.bincount([shares[holder][-1] for shares in drawn], minlength=256)
        assert not out_of_band(float(((cells - 4000 / 256) ** 2 / (4000 / 256)).sum()), 255)
    low = [split(bytes(SECRET_BYTES), 1, 3, os.urandom(32)) for _ in range(4000)]
    cells = np.bincount([shares[0][-1] for shares in low], minlength=256)
    assert out_of_band(float(((cells - 4000 / 256) ** 2 / (4000 / 256)).sum()), 255), "the check is blind"


def test_the_fields_number_is_the_least_prime_above_every_secret() -> None:
    def is_prime(number: int) -> bool:
        """Miller and Rabin's test with the first forty bases."""
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        powers = ([pow(base, odd * 2**k, number) for k in range(twos)] for base in range(2, 42))
        return all(found[0] == 1 or number - 1 in found for found in powers)

    assert [number for number in range(2**256 + 1, PRIME + 1, 2) if is_prime(number)] == [PRIME]


def test_a_coefficient_is_drawn_so_wide_that_its_remainder_is_as_good_as_uniform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counted(seed: bytes, count: int) -> Words:
        asked.append(count)
        return mask_of(seed, count)

    monkeypatch.setattr("fedveil.privacy.secure_sum.shares.mask_of", counted)
    split(bytes(SECRET_BYTES), 4, 7, bytes(32))
    (words,) = asked
    assert 2 ** (32 * words // 3) // PRIME >= 2**127


def test_what_is_no_share_is_refused() -> None:
    shares = split(bytes(SECRET_BYTES), 2, 3, os.urandom(32))
    for numbers in ((1, 1), (0, 1), (1, PRIME)):
        with pytest.raises(ProtocolError, match="there twice, or of none"):
            weights(numbers)
    for bad in (b"", shares[0][:-1], PRIME.to_bytes(SHARE_BYTES, "big")):
        with pytest.raises(ProtocolError, match="no share"):
            combined([bad, shares[1]], weights((1, 2)))
    with pytest.raises(ProtocolError, match="do not belong together"):
        combined([(2**256).to_bytes(SHARE_BYTES, "big"), bytes(SHARE_BYTES)], [1, 1])
    for secret, needed in ((bytes(31), 2), (bytes(32), 4), (bytes(32), 0)):
        with pytest.raises(MechanismError, match="cannot be shared"):
            split(secret, needed, 3, bytes(32))

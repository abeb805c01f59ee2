"""The context of an attempt: all that its sites must agree on, to the last bit, for their masks to cancel.

Each pair's mask is derived from the hash of all of it. A server that tells one site another figure, another model,
another roster or another set of keys gets words from it that nothing takes the masks off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedveil.common.check import clip_norm, in_range, positive
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.secure_sum.canonical import Value, canonical
from fedveil.privacy.secure_sum.rounding import WORD_BITS, noise_share

PROTOCOL = "fedveil/secure-sum/1"


@dataclass(frozen=True)
class AttemptName:
    """One attempt at one round of one run, among the sites of one roster."""

    run: str
    round_number: int
    attempt: int
    """From 0."""
    roster: str
    """The roster's hash, ``Roster.digest``."""


@dataclass(frozen=True)
class Terms:
    """The figures of a run that decide what the sum costs a record.

    Raises:
        ConfigError: one is out of range.
    """

    noise_multiplier: float
    """Standard deviation of the least noise in a sum over the clip norm: what ``honest_sites`` draw together."""
    clip_norm: float
    """L2 bound of what one record adds."""
    sample_rate: float
    """Chance of each record to be in a sum."""
    rounds: int
    """Of the run: so many sums are priced."""
    honest_sites: int
    """Least number of sites of a sum that do as they should and tell nobody of their noise or keys."""
    colluders: int
    """Most sites of a sum that need not."""

    def __post_init__(self) -> None:
        positive(
            noise_multiplier=self.noise_multiplier,
            rounds=self.rounds,
            honest_sites=self.honest_sites,
            colluders=self.colluders + 1,
        )
        clip_norm(clip_norm=self.clip_norm)
        in_range(0, 1, sample_rate=self.sample_rate)

    @property
    def least_sites(self) -> int:
        """Least number of sites of a sum."""
        return self.honest_sites + self.colluders

    @property
    def noise_share(self) -> float:
        """Standard deviation of the noise that each site draws, in the units of the clip norm."""
        return noise_share(self.noise_multiplier, self.clip_norm, self.honest_sites)


@dataclass(frozen=True)
class Task:
    """Hashes of what a site was given to compute, each of all its bits."""

    base: str
    """Of the base model."""
    start: str
    """Of the adapter's seeded start."""
    basis: str
    """Of the frozen factors that travel once; empty where there are none."""
    state: bytes
    """Of the state that the round trains from."""
    layout: bytes
    """Of the names and shapes of what is summed, in order."""


@dataclass(frozen=True)
class Context:
    """An attempt, its figures, its task, and the public keys of all its sites.

    Raises:
        ConfigError: a number has no canonical form.
    """

    name: AttemptName
    terms: Terms
    task: Task
    keys: Mapping[str, bytes]
    """Public keys of the masks (X25519, raw bytes) by the sites' names."""
    sharing: bytes = b""
    """Hash of who holds shares of the masks' secrets, and of how many tell them; empty where nobody does."""

    def encoded(self) -> bytes:
        """Return all of it in canonical form."""
        values: dict[str, Value] = {
            **_values(self.name),
            **_values(self.terms),
            **_values(self.task),
            "noise_share": self.terms.noise_share,
            "grid": noise_grid(self.terms.noise_share),
            "word_bits": WORD_BITS,
            "keys": [[name, self.keys[name]] for name in sorted(self.keys)],
        }
        # By a name of its own, so that no context with holders has the bytes of one without.
        return canonical(f"{PROTOCOL}/context", values | ({"sharing": self.sharing} if self.sharing else {}))

    def digest(self) -> bytes:
        """Return the SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(self.encoded()).digest()


def _values(record: Any) -> dict[str, Value]:
    return {item.name: getattr(record, item.name) for item in fields(record)}

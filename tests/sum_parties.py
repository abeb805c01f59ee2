"""The sites of a sum and their server, as messages between them."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedveil.privacy.secure_sum import AttemptName, Identity, Roster, SiteAttempt, Task, Terms
from fedveil.privacy.secure_sum.masks import Words

TERMS = Terms(noise_multiplier=4.8, clip_norm=0.5, sample_rate=0.33, rounds=12, honest_sites=2, colluders=1)


TASK = Task(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))


@dataclass
class Federation:
    """Sites with signing keys and a roster of them; each round is one attempt of all."""

    sites: int
    identities: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = {f"site-{i:02}": Identity.new() for i in range(self.sites)}
        self.roster = Roster({name: identity.public for name, identity in self.identities.items()})
        self.begin()

    def begin(self, number: int = 0) -> None:
        """Make everybody's key of an attempt."""
        name = AttemptName("run", 3, number, self.roster.digest)
        self.attempts = {site: SiteAttempt(name, site, identity) for site, identity in self.identities.items()}
        self.offers = [own.offer for own in self.attempts.values()]

    def agree(self, terms: Mapping[str, Terms] | None = None, task: Mapping[str, Task] | None = None) -> None:
        """Let all agree, those that are named to other terms or another task."""
        for site, own in self.attempts.items():
            own.agree(self.offers, self.roster, (terms or {}).get(site, TERMS), (task or {}).get(site, TASK))

    def masked(self, words: Mapping[str, Words]) -> list[Words]:
        """Return what all send."""
        return [self.attempts[site].masked(words[site]) for site in self.attempts]

    def zeros(self, count: int) -> dict[str, Words]:
        """Return vectors of nothing."""
        return {site: np.zeros(count, dtype=np.uint32) for site in self.identities}


def seed_by_hand(secret: bytes, context: bytes, first: str, second: str) -> bytes:
    """RFC 5869 for one block, with the info written out byte by byte."""

    def text(words: str) -> bytes:
        return b"s" + struct.pack(">I", len(words)) + words.encode()

    info = text("fedveil/secure-sum/1/mask") + text("first") + text(first) + text("second") + text(second)
    extracted = hmac.new(context, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()

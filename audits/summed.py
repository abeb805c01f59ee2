"""Canaries through a secure sum: what the sum tells, and one site's upload alone, against what the prices say.

    .venv/bin/python -m audits.summed

Four sites, of which three are honest. One of those holds the canaries (``audits.dirac``), and the fourth belongs to the
server: it adds no noise and tells its keys. Clip, shared noise, rounding, keys and masks are those of a site. What the
server is left with is the sum, and the noise in it must be what the sum's price counts on. A single upload must say
nothing, also to a server that takes off every mask which it can make of what it saw; and a sum whose masks stay on must
show. Then faults are built in, and must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor, nn

from audits.bands import out_of_band
from audits.canary import DELTA, LENGTH, PART, compared
from audits.dirac import Dirac
from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.shell import run_alone
from common.privacy import dpsgd
from common.privacy.accounting import Release, epsilon
from common.privacy.events import Event, SummedGaussian, sampled_gaussian
from common.privacy.shared_noise import SecureSumPlan
from common.randomness import add_private_noise
from common.run_lines import Finding
from common.secure_sum import AttemptName, Identity, Roster, SiteAttempt, Task, Terms, attempt, rounding, total
from common.secure_sum.masks import Words, add_mask, pair_seed
from server.sums import longest_sum

CANARIES, ROUNDS = 9000, 10
HONEST, COLLUDERS = 3, 1
NOISE = 6.5
NAMES = ("clinic", "lab", "ward", "insider")
"""The first holds the canaries, and the last is the server's."""
NOBODY = torch.zeros(0, dtype=torch.int64)
"""No canary."""
CELLS, SHIFTS = 256, (0, 8, 16, 24)
"""A word's bytes are looked at one by one."""


def halved() -> AbstractContextManager[Any]:
    """Every site draws half of its part of the noise."""
    return patch.object(rounding, "add_private_noise", lambda sums, std, step: add_private_noise(sums, std / 2, step))


def counted_colluder() -> AbstractContextManager[Any]:
    """The parts of the noise are so small that those who may collude must draw theirs, too."""
    share = rounding.noise_share
    return patch.object(rounding, "noise_share", lambda noise, clip, honest: share(noise, clip, honest + COLLUDERS))


def bare() -> AbstractContextManager[Any]:
    """No site puts a mask on."""
    return patch.object(attempt, "add_mask", lambda *own: None)


def known_seed() -> AbstractContextManager[Any]:
    """The seed of a mask is made of what the server saw, without the secret of the two."""
    public = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    key = public.public_key().public_bytes_raw()

    def seed(_: X25519PrivateKey, __: bytes, context: bytes, own: str, peer: str) -> bytes:
        return pair_seed(public, key, context, own, peer)

    return patch.object(attempt, "pair_seed", seed)


def one_sided() -> AbstractContextManager[Any]:
    """Both sites of a pair add its mask, so that it stays on the sum."""

    def added(words: Words, seed: bytes, own: str, peer: str) -> None:
        add_mask(words, seed, min(own, peer), max(own, peer))

    return patch.object(attempt, "add_mask", added)


HALVED = Fault("half the noise of a sum", halved)
COUNTED = Fault("noise that counts on who may collude", counted_colluder)
BARE = Fault("no masks", bare)
KNOWN_SEED = Fault("masks from a seed that the server knows", known_seed)
ONE_SIDED = Fault("masks that do not cancel", one_sided)


@dataclass(frozen=True)
class Seen:
    """What the server has of an attempt."""

    uploads: dict[str, Words]
    digest: bytes
    """Of the context."""
    keys: dict[str, bytes]
    """Public keys of the masks by site."""
    insider: X25519PrivateKey
    """Its own site's."""


class Sum:
    """One run's sums over a linear model whose weights are the canaries'.

    Args:
        canaries: how many numbers are summed.
    """

    def __init__(self, canaries: int) -> None:
        figures = {**sampled_gaussian(NOISE, 1.0).figures, "honest_sites": HONEST}
        self.event = Event(SummedGaussian.name, figures)
        self.plan = SecureSumPlan(self.event, canaries, DELTA, 100.0)
        self._model = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self._model.weight)
        self._identities = {name: Identity.new() for name in NAMES}
        self._roster = Roster({name: identity.public for name, identity in self._identities.items()})

    def vector(self, records: Tensor) -> Words:
        """Return what a site's step makes of canaries, before any mask."""
        model = self._model
        with dpsgd.SummedSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), self.plan) as steps:
            steps.order = tuple(model.parameters())
            steps.step(records.split(PART) if len(records) else [], Dirac(model, LENGTH))
        if steps.words is None:
            raise RuntimeError("the step left no vector")
        return steps.words

    def attempt(self, number: int, vectors: dict[str, Words]) -> Seen:
        """Return what the server sees of an attempt in which the sites mask these vectors."""
        name = AttemptName("audit", number, 0, self._roster.digest)
        sites = {site: SiteAttempt(name, site, identity) for site, identity in self._identities.items()}
        insider = X25519PrivateKey.from_private_bytes(sites[NAMES[-1]].secret)
        offers = [site.offer for site in sites.values()]
        terms = Terms(NOISE, self.event.clip_norm, 1.0, ROUNDS, HONEST, COLLUDERS)
        task = Task(base="", start="", basis="", state=b"", layout=b"")
        (digest,) = {site.agree(offers, self._roster, terms, task).digest() for site in sites.values()}
        uploads = {site: own.masked(vectors[site]) for site, own in sites.items()}
        return Seen(uploads, digest, {offer.site: offer.public for offer in offers}, insider)

    def round(self, number: int, records: Tensor) -> Seen:
        """Return what the server sees of one round; its own site sends zeros, and so adds no noise."""
        vectors = {name: self.vector(NOBODY) for name in NAMES[1:HONEST]}
        vectors |= {NAMES[0]: self.vector(records), NAMES[-1]: np.zeros(self._model.in_features, dtype=np.uint32)}
        return self.attempt(number, vectors)


def sum_tells(canaries: int = CANARIES, fault: Fault = SOUND) -> Finding:
    """Bound ε by what the sums tell a server that holds a site, against the price of the sum."""
    run, present = Sum(canaries), torch.rand(canaries) < 0.5
    scores = torch.zeros(canaries, dtype=torch.float64)
    with fault.plant():
        for number in range(1, ROUNDS + 1):
            seen = run.round(number, present.nonzero().flatten())
            scores -= total(seen.uploads.values(), run.plan.noise_std)
    clip = run.event.clip_norm
    claimed = epsilon([Release(run.event, ROUNDS)], DELTA)
    return compared("a sum's canaries", fault, (scores / clip / ROUNDS).numpy(), present.numpy(), claimed)


def noise_of_a_sum(canaries: int = CANARIES, fault: Fault = SOUND) -> Finding:
    """Hold the spread of sums of no record, of which one site adds no noise, against what the price counts on."""
    run = Sum(canaries)
    with fault.plant():
        rounds = [run.round(number, NOBODY) for number in range(1, ROUNDS + 1)]
        sums = torch.cat([total(seen.uploads.values(), run.plan.noise_std) for seen in rounds])
    priced = run.event.noise_multiplier * run.event.clip_norm
    statistic = float((sums / priced).square().sum())
    spread = float(sums.square().mean().sqrt() / priced)
    alarm = out_of_band(statistic, len(sums))
    return judged("noise of a sum", fault.name, alarm, {"numbers": len(sums), "spread over what is priced": spread})


def one_upload(canaries: int = CANARIES, fault: Fault = SOUND) -> Finding:
    """Hold one upload, as it is and with every mask off that the server can make, against uniform words."""
    run, own = Sum(canaries), NAMES[0]
    with fault.plant():
        seen = run.round(1, torch.arange(canaries))
        left = seen.uploads[own].copy()
        for peer in NAMES[1:]:
            # It has the key of its own site; of the others it knows what they sent.
            key = seen.insider if peer == NAMES[-1] else X25519PrivateKey.generate()
            seed = vars(attempt)["pair_seed"](key, seen.keys[own], seen.digest, peer, own)  # the fault's, if it is one
            add_mask(left, seed, peer, own)
    statistics = [unevenness(words, shift) for words in (seen.uploads[own], left) for shift in SHIFTS]
    alarm = any(out_of_band(statistic, CELLS - 1) for statistic in statistics)
    figures: dict[str, int | float | str] = {"numbers": canaries, "largest chi-square of 255 degrees": max(statistics)}
    return judged("one upload", fault.name, alarm, figures)


def unevenness(words: Words, shift: int) -> float:
    """Return the chi-square statistic, of ``CELLS`` - 1 degrees, of one byte of all words against uniform ones."""
    cells = np.bincount(words >> shift & (CELLS - 1), minlength=CELLS)
    expected = len(words) / CELLS
    return float(((cells - expected) ** 2 / expected).sum())


def masks_of_a_sum(canaries: int = CANARIES, fault: Fault = SOUND) -> Finding:
    """Hold a sum's length against the longest that a server takes: masks that stay on must show."""
    run = Sum(canaries)
    with fault.plant():
        length = float(total(run.round(1, torch.arange(canaries)).uploads.values(), run.plan.noise_std).norm())
    longest = longest_sum(run.plan, len(NAMES), canaries)
    return judged("masks of a sum", fault.name, length > longest, {"length": length, "longest": longest})


CASES: dict[Callable[[int, Fault], Finding], Sequence[Fault]] = {
    sum_tells: (HALVED,),
    noise_of_a_sum: (HALVED, COUNTED),
    one_upload: (BARE, KNOWN_SEED),
    masks_of_a_sum: (ONE_SIDED,),
}
"""Each audit with the faults that it must find."""


def audit_sums(folder: Path, canaries: int = CANARIES) -> list[Finding]:
    """Return the findings about the code as it is, and with each fault; nothing goes into ``folder``."""
    del folder
    return [audit(canaries, fault) for audit, faults in CASES.items() for fault in (SOUND, *faults)]


if __name__ == "__main__":
    run_alone(__doc__, "canaries", CANARIES, audit_sums)

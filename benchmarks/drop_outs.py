"""The cost of a secure sum that sites may be lost from, beside one that all must stay in: processor time and bytes.

    .venv/bin/python benchmarks/drop_outs.py                # about 15 seconds on one core

One attempt of all sites in one process, of which a tenth are lost with their vectors, by steps: keys, shares, vectors,
survivors, unmasking. The server's sum must be that of the survivors, to the last bit. Of a site the median of some is
printed, and of the server all it does but waiting. The noise is the same in both protocols and not in these figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from fedveil.common.messages.round import (
    KeyReply,
    ShareReply,
    ShareTask,
    SumReply,
    SurvivorReply,
    SurvivorTask,
    Task,
    TrainResult,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.wire import encode_reply, encode_task, message_bytes
from fedveil.privacy.secure_sum import (
    AttemptName,
    Holder,
    Identity,
    RecoverableAttempt,
    Roster,
    SiteAttempt,
    Terms,
    least_sites,
    threshold,
    unmasked,
)
from fedveil.privacy.secure_sum import (
    Task as Given,
)

SITES = (4, 20, 100)
NUMBERS = (4_608, 37_634)
COLLUDERS, WATCHED = 1, 5
GIVEN = Given(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))
MOST_BYTES = 240
"""Up, of a site, beyond its vector and key, for each site of the attempt."""
Result = TypeVar("Result")


class Clock:
    """Adds up processor time by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Result]) -> Result:
        """Return what a call returns."""
        began = time.process_time()
        result = call()
        self.spent.setdefault(name, []).append(time.process_time() - began)
        return result

    def median(self, name: str) -> float:
        """Return the median of a name's calls, in milliseconds."""
        return 1e3 * statistics.median(self.spent[name])


class Bytes:
    """Adds up the bytes of one site's messages, but for the vector and the state, which every run has."""

    def __init__(self) -> None:
        self.down = self.up = 0

    def task(self, task: Task) -> None:
        self.down += message_bytes(encode_task(task))

    def reply(self, reply: SumReply | TrainResult) -> None:
        self.up += message_bytes(encode_reply(reply))


def measure(sites: int, numbers: int) -> bool:
    """Print one row, and return whether sum and bytes are as they must be."""
    drop_outs = max(1, sites // 10)
    honest = sites - drop_outs - COLLUDERS
    if least_sites(honest, COLLUDERS, drop_outs) > sites:
        raise ValueError(f"of {sites} sites {drop_outs} cannot be lost")
    terms = Terms(4.8, 0.5, 0.33, 12, honest, COLLUDERS)
    identities = {f"site-{i:04}": Identity.new() for i in range(sites)}
    names = list(identities)
    roster = Roster({name: identity.public for name, identity in identities.items()})
    name, clock, sent = AttemptName("benchmark", 1, 0, roster.digest), Clock(), Bytes()
    draw = np.random.default_rng(sites)
    words = {site: draw.integers(0, 2**32, numbers, dtype=np.uint32) for site in names}

    lossy = {site: RecoverableAttempt(name, site, own) for site, own in identities.items()}
    offers = tuple(attempt.offer for attempt in lossy.values())
    shared = {
        site: clock("shares", lambda own=own: own.share(offers, roster, honest, COLLUDERS))  # type: ignore[misc]
        for site, own in lossy.items()
    }
    masks = tuple(sharing.offer for sharing in shared.values())
    holders, vectors = dict[str, Holder](), {}
    for place, site in enumerate(names):
        own, sealed = lossy[site], tuple(sharing.sealed[place] for sharing in shared.values())
        holders[site] = clock("agree", lambda: own.agree(masks, sealed, roster, terms, GIVEN))  # noqa: B023
        vectors[site] = clock("masks", lambda: own.masked(words[site]))  # noqa: B023
    survivors = tuple(names[drop_outs:])
    signed = {
        site: clock("list", lambda site=site: holders[site].sign(survivors, identities[site]))  # type: ignore[misc]
        for site in survivors
    }
    signatures = {site: word.signature for site, word in signed.items()}
    shares = {
        site: clock("told", lambda site=site: holders[site].reveal(signatures, roster))  # type: ignore[misc]
        for site in survivors[-threshold(sites, COLLUDERS) :]
    }
    left = {site: vectors[site] for site in survivors}
    digest, keys = holders[names[0]].digest, {offer.site: offer.public for offer in masks}
    total = clock("server", lambda: unmasked(left, keys, names, COLLUDERS, digest, shares))
    exact = bool((total == np.add.reduce([words[site] for site in survivors], dtype=np.uint32)).all())

    last = names[-1]
    run = ("benchmark", 1)
    sent.task(ShareTask(*run, 0, offers))
    sent.task(TrainTask(*run, {}, {}, "", "b" * 64, "c" * 64, 0, masks, shared[last].sealed))
    sent.task(SurvivorTask(*run, 0, survivors))
    sent.task(UnmaskTask(*run, 0, tuple(signatures.items())))
    sent.reply(KeyReply(*run, last, offers[-1]))
    sent.reply(ShareReply(*run, last, shared[last]))
    sent.reply(SurvivorReply(*run, last, signed[last]))
    sent.reply(UnmaskReply(*run, last, shares[last]))

    whole = {site: SiteAttempt(name, site, own) for site, own in identities.items()}
    plain_offers, plain = tuple(attempt.offer for attempt in whole.values()), Clock()
    for site in names[:WATCHED]:
        plain("agree", lambda: whole[site].agree(plain_offers, roster, terms, GIVEN))  # noqa: B023
        plain("masks", lambda: whole[site].masked(words[site]))  # noqa: B023
    added = plain("server", lambda: np.add.reduce(list(vectors.values()), dtype=np.uint32))
    del added
    of_plain = Bytes()
    of_plain.task(TrainTask(*run, {}, {}, "", "b" * 64, "c" * 64, 0, plain_offers))
    of_plain.reply(KeyReply(*run, last, plain_offers[-1]))
    lossy_times = [clock.median(what) for what in ("shares", "agree", "masks", "list", "told", "server")]
    lossy_times[3:5] = [sum(lossy_times[3:5])]
    more = ((sites - COLLUDERS) / honest) ** 0.5
    print(
        f"{sites:5} {drop_outs:5} {numbers:8,} " + " ".join(f"{taken:7.1f}" for taken in lossy_times),
        f"{sent.up:8,} {sent.down:8,}  ",
        " ".join(f"{plain.median(what):7.1f}" for what in ("agree", "masks", "server")),
        f"{of_plain.up:8,} {of_plain.down:8,}  {more:6.3f}",
    )
    return exact and sent.up <= of_plain.up + MOST_BYTES * sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("milliseconds of a site, of the server; bytes of a site's messages but the vector and the model, up and down")
    print(f"{'with drop-outs':>36} {'all or nothing':>75} {'noise':>30}")
    print("sites  lost  numbers  shares   agree   masks  unmask  server       up     down ", end="  ")
    print("  agree   masks  server       up     down")
    within = [measure(sites, numbers) for sites in SITES for numbers in NUMBERS]
    print(f"limit: {MOST_BYTES} bytes up for each site of the attempt; and the survivors' sum to the last bit")
    if not all(within):
        sys.exit("a sum is not that of the survivors, or a site sends more than its limit")


if __name__ == "__main__":
    main()

"""The cost of a secure sum beside plain uploads: processor time at a site and at the server, and bytes.

    .venv/bin/python benchmarks/secure_sum.py                # about 15 seconds on one core

A site's plain part is the noise of its own, as float32 numbers. Of a secure sum it is the noise as words, the check of
all keys with the masks' seeds, and the masks. Sizes are those of Fed-SB (1,538) and FFA-LoRA (37,634) in the default
job, heads included, one between them and a million. Measured in processor time of one thread, the median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from common.randomness import add_private_noise
from common.secure_sum import AttemptName, Identity, Roster, SiteAttempt, Task, Terms, rounded, total

SITES = (4, 20, 100)
NUMBERS = (1_538, 4_608, 37_634, 1_000_000)
LEAST, SHARE = 200, 0.02
"""Most bytes beyond a plain upload: so many, and this part of it."""
TASK = Task(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median, in processor time."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def site_attempts(sites: int) -> tuple[Roster, dict[str, SiteAttempt]]:
    """Return a roster and a new attempt of each of its sites."""
    identities = {f"site-{i:04}": Identity.new() for i in range(sites)}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    name = AttemptName("benchmark", 1, 0, roster.digest)
    return roster, {site: SiteAttempt(name, site, identity) for site, identity in identities.items()}


def measure(sites: int, numbers: int, repeats: int) -> bool:
    """Print one row, and return whether the bytes are within the limit."""
    terms, sums = Terms(4.8, 0.5, 0.33, 12, sites - 1, 1), torch.zeros(numbers, dtype=torch.float64)
    share, (roster, attempts) = terms.noise_share, site_attempts(sites)
    offers = [own.offer for own in attempts.values()]
    own, agreed, masked, words = list(attempts.values()), list[float](), list[float](), rounded(sums, share)
    for site in own[:repeats]:
        agreed.append(seconds(lambda site=site: site.agree(offers, roster, terms, TASK), 1))  # type: ignore[misc]
        masked.append(seconds(lambda site=site: site.masked(words), 1))  # type: ignore[misc]
    plain = seconds(lambda: add_private_noise(sums, share).float().numpy().tobytes(), repeats)
    noised = seconds(lambda: rounded(sums, share), repeats)
    vectors = [words] * sites
    adding = seconds(lambda: total(vectors, share), min(3, repeats))
    mean = seconds(lambda: sum(vector.astype(np.float64) for vector in vectors), min(3, repeats))
    offer = offers[0]
    more = len(offer.public) + len(offer.signature)
    down = sites * (more + len(offer.site) + 2)
    beyond = more / (4 * numbers)
    print(
        f"{sites:5} {numbers:10,}  {plain * 1e3:8.1f} {noised * 1e3:8.1f} {statistics.median(agreed) * 1e3:8.1f} "
        f"{statistics.median(masked) * 1e3:8.1f}  {mean * 1e3:8.1f} {adding * 1e3:8.1f}  {4 * numbers:10,} {more:5} "
        f"({beyond:6.2%}) {down:7,}"
    )
    return more <= LEAST + SHARE * 4 * numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("milliseconds of a site: plain noise; noise in words, keys and seeds, masks; of the server: plain sum, sum")
    print("bytes: upload; what a key adds to it, up; keys of all, down")
    print("sites    numbers     plain    words     keys    masks     plain      sum      upload    up             down")
    within = [measure(sites, numbers, repeats) for sites in SITES for numbers in NUMBERS]
    print(f"limit of a reply: {LEAST} bytes and {SHARE:.0%} more than a plain one")
    if not all(within):
        sys.exit("a reply is longer than its limit")


if __name__ == "__main__":
    main()

"""The cost of a secure sum beside plain uploads: bytes on the wire, processor time by part, and wall time of a round.

    .venv/bin/python benchmarks/secure_sum.py                # about two minutes on one core
    .venv/bin/python benchmarks/secure_sum.py --sites 4      # a few seconds

A site's plain part is the noise of its own, as float32 numbers. Of a secure sum it is the noise as words, the check of
all keys with the masks' seeds, and the masks. Sizes are those of Fed-SB (1,538) and FFA-LoRA (37,634) in the default
job, heads included, one between them and a million. Parts are processor time of one thread, the median.

A round is what all sites and the server do, one after the other in this process, on the same sums of gradients:
noise, keys and masks, encoding, decoding, adding up; the best of three by the wall clock, with the ratio, and the ratio
in processor time. Gradients are the same in both and not in it. Bytes are those of whole messages as the product
encodes them. Last comes a federated round as it is run, gradients, ledger and scores included, of a tiny model whose
site takes milliseconds: there all that a sum adds is largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedveil.common.messages.blocks import Layout, layout_of
from fedveil.common.messages.round import Spending, TrainResult, TrainTask
from fedveil.common.messages.wire import decode_reply, encode_reply, encode_task, message_bytes
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.events import Event, SummedGaussian, sampled_gaussian
from fedveil.privacy.randomness import add_private_noise
from fedveil.privacy.secure_sum import AttemptName, Identity, KeyOffer, Roster, SiteAttempt, Task, Terms, rounded, total
from fedveil.privacy.secure_sum.masks import Words

# The audits' tiny models are no part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audits.finding import quiet
from audits.tiny_models import save_tiny_model, toy_run

SITES = (4, 20, 100)
NUMBERS = (1_538, 4_608, 37_634, 1_000_000)
LEAST, SHARE = 200, 0.02
"""Most bytes of a reply beyond a plain one: so many, and this part of it."""
MANY = 10**7
"""Numbers of all sites' vectors together beyond which a round is taken once, and else three times."""
TASK = Task(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))
LAYER, FACTOR = "encoder.layer.0.attention.self.query", "A"
"""One tensor: of several a plain reply has more bytes, and a sum's has not."""


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median, in processor time."""
    return statistics.median(both_times(function)[1] for _ in range(repeats))


def both_times(function: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call: of the wall clock, and of the processor."""
    began = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def site_attempts(sites: int) -> tuple[Roster, dict[str, SiteAttempt]]:
    """Return a roster and a new attempt of each of its sites."""
    identities = {f"site-{i:04}": Identity.new() for i in range(sites)}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    name = AttemptName("benchmark", 1, 0, roster.digest)
    return roster, {site: SiteAttempt(name, site, identity) for site, identity in identities.items()}


def result(site: str, event: Event, **sent: Any) -> TrainResult:
    """Return a site's reply, with what every private one states beside what is ``sent``."""
    spending = Spending(TRAINING, event, 1, 1, 1e-5, 0.25, 0.25, 8.0, 7.75, Accountant("pld", "0.6.0"))
    return TrainResult("benchmark", 1, site, 2000, sent.pop("contribution", {}), spending, **sent)


class Round:
    """A round of secure aggregation over a number of sites and of summed numbers."""

    def __init__(self, sites: int, numbers: int) -> None:
        self.terms = Terms(4.8, 0.5, 0.33, 12, sites - 1, 1)
        self.sums = torch.zeros(numbers, dtype=torch.float64)
        self.plain_event = sampled_gaussian(4.8, 0.33, 0.5)
        self.summed_event = Event(SummedGaussian.name, {**self.plain_event.figures, "honest_sites": sites - 1})
        self.layout: Layout = layout_of(self.contribution(self.sums.float()))
        self.names = [f"site-{i:04}" for i in range(sites)]

    def contribution(self, numbers: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return numbers as a site's contribution."""
        return {LAYER: {FACTOR: numbers}}

    def noised(self) -> Tensor:
        """Return what a plain site sends, float32."""
        return add_private_noise(self.sums, self.terms.noise_multiplier * self.terms.clip_norm).float()

    def plain_reply(self, site: str) -> TrainResult:
        """Return a plain site's reply."""
        return result(site, self.plain_event, contribution=self.contribution(self.noised()))

    def summed_reply(self, site: str, masked: Words, offer: KeyOffer) -> TrainResult:
        """Return a site's reply in a sum, with its key for the next round."""
        return result(site, self.summed_event, words=masked.astype("<u4").tobytes(), offer=offer)

    def received(self, reply: TrainResult) -> TrainResult:
        """Return a reply as the server has it."""
        got = decode_reply(encode_reply(reply), self.layout, "benchmark", 1)
        if not isinstance(got, TrainResult):
            raise TypeError(f"a result came back as {type(got).__name__}")
        return got

    def plain(self) -> Tensor:
        """Return the mean of plain uploads, float64."""
        mean = torch.zeros_like(self.sums)
        for reply in [self.received(self.plain_reply(site)) for site in self.names]:
            mean += reply.contribution[LAYER][FACTOR].double()
        return mean / len(self.names)

    def summed(self) -> Tensor:
        """Return the mean by a secure sum, float64."""
        roster, attempts = site_attempts(len(self.names))
        offers = [own.offer for own in attempts.values()]
        replies = []
        for site, own in attempts.items():
            own.agree(offers, roster, self.terms, TASK)
            masked = own.masked(rounded(self.sums, self.terms.noise_share))
            replies.append(self.received(self.summed_reply(site, masked, own.offer)))
        vectors = (np.frombuffer(reply.words, dtype="<u4").astype(np.uint32) for reply in replies)
        return total(vectors, self.terms.noise_share) / len(self.names)


def measure(sites: int, numbers: int, repeats: int) -> bool:
    """Print one row, and return whether the bytes are within the limit."""
    one = Round(sites, numbers)
    share, (roster, attempts) = one.terms.noise_share, site_attempts(sites)
    offers = [own.offer for own in attempts.values()]
    own, agreed, masked, words = list(attempts.values()), list[float](), list[float](), rounded(one.sums, share)
    for site in own[:repeats]:
        agreed.append(seconds(lambda site=site: site.agree(offers, roster, one.terms, TASK), 1))  # type: ignore[misc]
        masked.append(seconds(lambda site=site: site.masked(words), 1))  # type: ignore[misc]
    noise = seconds(one.noised, repeats)
    noised = seconds(lambda: rounded(one.sums, share), repeats)
    # Both in turn, and the best of each: what else the machine does only adds.
    turns = [(both_times(one.plain), both_times(one.summed)) for _ in range(1 if sites * numbers > MANY else 3)]
    (plain, work), (summed, more_work) = ([min(t[i][k] for t in turns) for k in (0, 1)] for i in (0, 1))
    upload = message_bytes(encode_reply(one.plain_reply(one.names[0])))
    more = message_bytes(encode_reply(one.summed_reply(one.names[0], words, offers[0]))) - upload
    task = TrainTask("benchmark", 1, {}, {}, "", "b" * 64, "c" * 64)
    down = message_bytes(encode_task(replace(task, offers=tuple(offers)))) - message_bytes(encode_task(task))
    cells = (noise, noised, statistics.median(agreed), statistics.median(masked))
    print(
        f"| {sites} | {numbers:,} | {' | '.join(f'{cell * 1e3:.1f}' for cell in cells)} | {plain:.3f} | {summed:.3f} | "
        f"{summed / plain:.2f} | {more_work / work:.2f} | "
        f"{upload:,} | {more} | {100 * more / upload:.2f} % | {down:,} |",
        flush=True,
    )
    return more <= LEAST + SHARE * upload


def federated(sites: int, folder: Path) -> None:
    """Print the seconds of a whole round of a tiny model, plain and summed: the second, for which keys are there."""
    model = save_tiny_model("bert", folder / "model")
    own = {
        **toy_run(model, folder),
        "rounds": 2,
        "min-sites": sites,
        "training.optimizer": "sgd",
        "training.local-steps": 1,
        "training.sample-rate": 0.25,
        "privacy.noise-multiplier": 2.0,
        "privacy.epsilon": 100.0,
    }
    shared: dict[str, Any] = {"privacy.mode": "secure-sum", "privacy.honest-sites": sites - 1}
    found = []
    for name, more in (("plain", dict[str, Any]()), ("summed", shared)):
        run = run_in_process({**own, **more}, sites, run=name)
        line = read_lines(RoundLine, run)[-1]
        found.append((line.seconds or 0.0, line.bytes_up))
    (plain, up), (summed, more_up) = found
    cells = (f"{plain:.2f}", f"{summed:.2f}", f"{summed / plain:.2f}", f"{(more_up - up) / sites:+.0f}")
    print(f"| {sites} | {' | '.join(cells)} |", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Print both tables; the exit code is 1 where a reply is longer than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--sites", type=int, nargs="*", default=SITES)
    parser.add_argument("--numbers", type=int, nargs="*", default=NUMBERS)
    wanted = parser.parse_args(words)
    quiet()
    torch.set_num_threads(1)
    print("milliseconds of a site, processor time; seconds of a round, one site after the other; bytes of messages")
    print(
        "| sites | numbers | plain noise | noise in words | keys and seeds | masks | round, plain | round, sum | ratio "
        "| of work | reply, plain | more in a sum | share | keys down |"
    )
    print("|" + "---|" * 14)
    within = [measure(sites, numbers, wanted.repeats) for sites in wanted.sites for numbers in wanted.numbers]
    print(f"limit of a reply: {LEAST} bytes and {SHARE:.0%} more than a plain one\n")
    print("a federated round of a tiny model, all sites after one another, seconds; bytes of tensors more, a site")
    print("| sites | plain | sum | ratio | up |\n|---|---|---|---|---|")
    for sites in wanted.sites:
        with tempfile.TemporaryDirectory(prefix="fedveil-sum-") as folder:
            federated(sites, Path(folder))
    if not all(within):
        sys.exit("a reply is longer than its limit")


if __name__ == "__main__":
    main()

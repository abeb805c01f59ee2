"""Whole sites as canaries: what a trusted server gives away of one site, against what its ledger says.

Each site's update moves one number of the model, and a coin decides which sites answer at all. Who is asked, clip, sum,
noise, divisor and ledger are those of the server's own rounds. A site that is there changes the sign of its update from
round to round, so that noise which comes twice goes away in the difference. Sites send updates of several clips, as who
lies might. Besides, the noise in what is given away is held against what is priced, one site's pull against its clip,
and who is asked against Poisson's law. Then faults are built in, and must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from audits.bands import out_of_band, related
from audits.canary import DELTA, LENGTH, compared
from audits.faults import SOUND, Fault, zero_noise
from audits.finding import judged
from audits.shell import each_of
from audits.site_rounds import sampler_faults
from audits.tiny_site import tiny_run
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, Reply, Task, TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply, entries
from fedveil.privacy.entropy import replaced_entropy
from fedveil.privacy.randomness import add_private_noise
from fedveil.server import ledger
from fedveil.server.admission import Admission
from fedveil.server.collect import trusted
from fedveil.server.collect.door import collector_of
from fedveil.server.collect.trusted import NoisedMean, TrustedCollector
from fedveil.server.ledger import ServerLedger
from fedveil.server.model import ServerModel
from fedveil.server.sites import Exchange
from fedveil.strategies.job import configure
from fedveil.strategies.state import ServerState

SITES, ROUNDS = 1600, 8
NOISE, CLIP = 4.0, 0.5
RATE, DRAWN_FROM, DRAWS = 0.3, 60, 250
"""Of the rounds in which nothing counts but who is asked."""
Sent = Callable[[int, AdapterState], Any]
"""From a node and what it received to its reply."""


@dataclass
class MadeUp:
    """A transport of nodes that answer as they are told to, without training."""

    sent: Sent
    count: int
    names: Mapping[int, str] | None = None
    asked: list[list[int]] = field(default_factory=list)

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        """Return all nodes but those."""
        del wanted
        return [node for node in range(self.count) if node not in besides]

    def registered(self) -> Mapping[int, str] | None:
        """Return the names that were given."""
        return self.names

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Return what the nodes answer, and remember who was asked."""
        del timeout
        self.asked.append(list(tasks))
        return Exchange({node: self.sent(node, task.state) for node, task in tasks.items()}, 1, 1)  # type: ignore[union-attr]


class Cohort:
    """A trusted server before its first round, and as many sites as it is told.

    Args:
        folder: for the model and the server's ledger; empty.
        sites: of the cohort.
        rate: at which they are drawn.
    """

    def __init__(self, folder: Path, sites: int, rate: float = 1.0) -> None:
        own: dict[str, Any] = {
            "adapter.rank": 16,
            "privacy.mode": "client-level",
            "privacy.unit": "site",
            "privacy.clip-norm": CLIP,
            "privacy.noise-multiplier": NOISE,
            "privacy.cohort": sites,
            "privacy.site-rate": rate,
            "privacy.epsilon": 1e3,
            "privacy.delta": DELTA,
            "training.sample-rate": "auto",
            "rounds": DRAWS,
        }
        self.job = configure({**tiny_run(folder), **own})
        self.model, self.sites = ServerModel(self.job), sites
        self.state = self.job.start(self.model.start)
        self.size = len(flat(self.job.strategy.downlink(self.state)))

    def asking(self, transport: MadeUp) -> TrustedCollector:
        """Return the server's side, over a transport."""
        collector = collector_of(self.job, "audit", transport, self.model, Admission(self.job, {}))
        if not isinstance(collector, TrustedCollector):
            raise TypeError("the run's server is not a trusted one")
        return collector

    def released(self, sent: Callable[[int], Sent], rounds: int) -> tuple[Tensor, float]:
        """Return what each round moved the model by, times the public divisor, in clips, and the ε in the ledger.

        Args:
            sent: from a round's number to what nodes answer in it.
            rounds: how many.
        """
        state, moved, claimed = self.state, list[Tensor](), 0.0
        transport = MadeUp(sent(1), self.sites)
        sites = self.asking(transport)
        for number in range(1, rounds + 1):
            transport.sent, held = sent(number), flat(self.job.strategy.downlink(state))
            got = sites.collect(number, state)
            if not got.counts:
                raise RuntimeError("the server made no round")
            state = self.job.strategy.server_update(state, got.averaged)
            claimed = max(paid.spending.epsilon_total for paid in got.paid if paid.spending)
            moved.append((flat(self.job.strategy.downlink(state)) - held) * self.sites / CLIP)
        return torch.stack(moved), claimed


def flat(state: AdapterState) -> Tensor:
    """Return all tensors as one row of float64."""
    return torch.cat([tensor.double().flatten() for _, _, tensor in entries(state)])


def pull(axis: int, received: AdapterState, length: float) -> AdapterState:
    """Return what was received with its number ``axis`` moved by so many clips."""
    moved, first = {layer: dict(factors) for layer, factors in received.items()}, 0
    for layer, name, tensor in entries(received):
        if first <= axis < first + tensor.numel():
            moved[layer][name] = own = tensor.double().clone()
            own.view(-1)[axis - first] += length * CLIP
        first += tensor.numel()
    return moved


def answering(present: Tensor, length: float) -> Callable[[int], Sent]:
    """Return the answers of sites of which each pulls at its own number, one way and back; the others refuse."""

    def of_round(number: int) -> Sent:
        def sent(node: int, received: AdapterState) -> Reply:
            if not present[node]:
                return Refusal("audit", number, f"site-{node}", "failed", "no")
            way = length if number % 2 else -length
            return TrainResult("audit", number, f"site-{node}", 1, pull(node, received, way), None)

        return sent

    return of_round


# --- faults -----------------------------------------------------------------------------------------------------------


def noise_of(change: Callable[[Tensor, float], Tensor]) -> AbstractContextManager[Any]:
    """Let the server add other noise."""
    return patch.object(trusted, "add_private_noise", change)


def not_clipped() -> AbstractContextManager[Any]:
    """The server takes what sites send as it is."""
    return patch.object(trusted, "clipped", lambda change, clip_norm: change)


def by_replies() -> AbstractContextManager[Any]:
    """The server divides by the number of sites that have answered."""
    whole = TrustedCollector._mean

    def mean(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> NoisedMean:
        held = list(results)
        made = whole(sites, iter(held), number, state)
        factor = sites._plan.expected_batch_size / max(1, len(held))
        return replace(made, change=apply(lambda tensor: tensor * factor, made.change))

    return patch.object(TrustedCollector, "_mean", mean)


def noise_again() -> AbstractContextManager[Any]:
    """The server seeds its noise alike in every round."""
    whole = TrustedCollector._mean

    def mean(*own: Any) -> NoisedMean:
        draws = np.random.default_rng(5)
        with replaced_entropy(lambda count: draws.integers(0, 2**64, count, dtype=np.uint64)):
            return whole(*own)

    return patch.object(TrustedCollector, "_mean", mean)


def noise_of_one_site() -> AbstractContextManager[Any]:
    """The sum gets the noise that belongs to its mean: what would hide one site that is alone."""
    return noise_of(lambda total, std: add_private_noise(total, std / SITES))


def priced_alone() -> AbstractContextManager[Any]:
    """Each round is priced as if the server's ledger held no other."""
    price = vars(ledger)["_price"]
    return patch.object(ledger, "_price", lambda held, added, plan, most: price((), added, plan, most))


def fixed_number() -> AbstractContextManager[Any]:
    """A fixed number of sites is asked in every round."""
    return patch.object(
        trusted, "private_poisson_sample", lambda size, rate: torch.randperm(size)[: round(rate * size)]
    )


def everybody() -> AbstractContextManager[Any]:
    """All sites are asked in every round, whatever the rate that is priced."""
    return patch.object(trusted, "private_poisson_sample", lambda size, rate: torch.arange(size))


QUIET = Fault("no noise of the server", lambda: noise_of(zero_noise))
HALVED = Fault("half the noise of the server", lambda: noise_of(lambda total, std: add_private_noise(total, std / 2)))
OF_ONE = Fault("noise of one site alone", noise_of_one_site)
AGAIN = Fault("a server that seeds its noise", noise_again)
UNCLIPPED = Fault("updates that are not clipped", not_clipped)
BY_REPLIES = Fault("a divisor that counts the replies", by_replies)
ALONE = Fault("each round priced alone at the server", priced_alone)
FIXED = Fault("a fixed number of sites is drawn", fixed_number)
EVERYBODY = Fault("all sites are drawn", everybody)


# --- audits -----------------------------------------------------------------------------------------------------------


def sites_tell(folder: Path, fault: Fault = SOUND, sites: int = SITES) -> Finding:
    """Bound ε of a whole site by what the rounds gave away, against the server's ledger."""
    cohort, present = Cohort(folder, sites), torch.rand(sites) < 0.5
    with fault.plant():
        moved, claimed = cohort.released(answering(present, LENGTH), ROUNDS)
    ways = torch.tensor([1.0 if number % 2 else -1.0 for number in range(1, ROUNDS + 1)], dtype=torch.float64)
    scores = (ways @ moved)[:sites] / ROUNDS
    return compared("canaries by site", fault, scores.numpy(), present.numpy(), claimed)


def noise_of_rounds(folder: Path, fault: Fault = SOUND, sites: int = SITES) -> Finding:
    """Hold the noise in what two rounds give away, in which half of the sites send no change, against its price."""
    cohort, present = Cohort(folder, sites), torch.rand(sites) < 0.5
    with fault.plant():
        moved, _ = cohort.released(answering(present, 0.0), 2)
    statistic, spread = float((moved / NOISE).square().sum()), float(moved.square().mean().sqrt() / NOISE)
    twice = related(moved[0], moved[1])
    figures: dict[str, int | float | str] = {
        "numbers": moved.numel(),
        "spread over what is priced": spread,
        "comes again": str(twice),
    }
    return judged("noise by site", fault.name, twice or out_of_band(statistic, moved.numel()), figures)


def pull_of_a_site(folder: Path, fault: Fault = SOUND, sites: int = 20) -> Finding:
    """Hold what one site more moves the noiseless mean by, also a site that lies about its length, against its clip."""
    cohort, worst = Cohort(folder, sites), 0.0
    everyone, others = torch.ones(sites) > 0, torch.arange(sites) > 0
    for length in (0.0, 0.5, 1.0, LENGTH):
        with fault.plant(), noise_of(zero_noise):
            there, less = (cohort.released(answering(present, length), 1)[0] for present in (everyone, others))
        worst = max(worst, float((there - less).norm()))
    return judged("sensitivity by site", fault.name, not worst <= 1 + 1e-5, {"clips moved by one site, at most": worst})


def draws_of_sites(folder: Path, fault: Fault = SOUND, sites: int = DRAWN_FROM) -> Finding:
    """Hold who is asked against draws of each site on its own, at the rate that is priced."""
    cohort = Cohort(folder, sites, RATE)
    transport = MadeUp(answering(torch.zeros(sites), 0.0)(1), sites)
    server, table = cohort.asking(transport), torch.zeros(DRAWS, sites, dtype=torch.float64)
    # What 250 rounds cost takes minutes to compute, and decides nothing about who is asked.
    with fault.plant(), patch.object(ServerLedger, "charge", lambda *_: None), noise_of(zero_noise):
        for row in table:
            transport.asked.clear()
            server.collect(1, cohort.state)
            row[[node for asked in transport.asked for node in asked]] = 1.0
    wrong = sampler_faults(table, server._plan.event.sample_rate)
    figures: dict[str, int | float | str] = {
        "draws": DRAWS,
        "sites": sites,
        "wrong": ", ".join(sorted(wrong)) or "nothing",
    }
    return judged("draws of sites", fault.name, bool(wrong), figures)


CASES: dict[Callable[[Path, Fault], Finding], tuple[Fault, ...]] = {
    sites_tell: (QUIET, HALVED, OF_ONE, AGAIN, UNCLIPPED, ALONE),
    noise_of_rounds: (QUIET, HALVED, OF_ONE, AGAIN, BY_REPLIES),
    pull_of_a_site: (UNCLIPPED, BY_REPLIES),
    draws_of_sites: (FIXED, EVERYBODY),
}
"""Each audit with the faults that it must find."""


def audit_whole_sites(folder: Path) -> Sequence[Finding]:
    """Audit the server as it is, then with each fault."""
    return each_of(CASES, folder)

"""Canaries through a secure sum: what the sum tells, and one site's upload alone, against what a ledger says.

Four sites, of which three are honest. One of those is a site as it is deployed: it answers tasks through the site's
app, pays from its ledger, and holds the canaries (``audits.dirac``). The fourth belongs to the server: it adds no noise
and tells its keys. What the server is left with is the sum, and it may tell no more than the ledger's price of the sum
says; what it is left with once all others collude, no more than the price alone. The noise in the sum must be what the
price counts on. A single upload must say nothing, also to a server that takes off every mask which it can make of what
it saw; and a sum whose masks stay on must show. Then faults are built in, and must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from audits.bands import out_of_band, related
from audits.canary import DELTA, LENGTH, PART, compared
from audits.dirac import Dirac
from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.shell import each_of
from audits.sum_site import SumSite
from audits.tiny_models import save_tiny_model
from audits.tiny_site import clinic, tiny_run
from fedveil.client import rehearsals, sums
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.process import SiteProcess
from fedveil.client.timing import Timing
from fedveil.common.findings import Finding
from fedveil.common.messages.round import TrainResult
from fedveil.privacy import dpsgd
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import Event, SummedGaussian, sampled_gaussian
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import add_private_noise
from fedveil.privacy.secure_sum import attempt, rounding, total
from fedveil.privacy.secure_sum.masks import Words, add_mask, pair_seed
from fedveil.privacy.shared_noise import SecureSumPlan
from fedveil.server.collect.masked_sum import longest_sum
from fedveil.strategies.job import configure

WIDTH, RANK = 64, 8
"""Of the model; each number that it trains is a canary's."""
ROUNDS, NOISE = 3, 0.6
"""So that a sum tells most of the canaries: then noise that is lower by a seventh shows."""
HONEST, COLLUDERS = 3, 1
PEERS = ("insider", "lab", "ward")
"""The sites beside the clinic, which holds the canaries; the first is the server's."""
INSIDER = PEERS[0]
PUBLIC = 50
"""Size that the clinic declares."""
NOBODY = torch.zeros(0, dtype=torch.int64)
"""No canary."""
CELLS, SHIFTS = 256, (0, 8, 16, 24)
"""A word's bytes are looked at one by one."""


def halved() -> AbstractContextManager[Any]:
    """Every site draws half of its part of the noise."""
    return patch.object(rounding, "add_private_noise", lambda sums, std, step: add_private_noise(sums, std / 2, step))


@contextmanager
def one_quiet() -> Iterator[None]:
    """The site that holds the canaries adds no noise; the others do."""

    def rounded_alone(sums: Tensor, share: float, margin: float = 1.0) -> Words:
        del margin
        return (sums.double() / noise_grid(share)).round().to(torch.int64).numpy().astype(np.uint32)

    with patch.object(dpsgd, "rounded", rounded_alone):
        yield


@contextmanager
def noise_again() -> Iterator[None]:
    """The site that holds the canaries adds in every sum what it drew for the first one."""
    drawn, kept = rounding.rounded, dict[int, Words]()

    def again(sums: Tensor, share: float, margin: float = 1.0) -> Words:
        if sums.numel() not in kept:
            kept[sums.numel()] = drawn(torch.zeros_like(sums), share, margin)
        steps = (sums.double() / noise_grid(share)).round().to(torch.int64)
        return steps.numpy().astype(np.uint32) + kept[sums.numel()]

    with patch.object(dpsgd, "rounded", again):
        yield


def counted_colluder() -> AbstractContextManager[Any]:
    """The parts of the noise are so small that those who may collude must draw theirs, too."""
    share = rounding.noise_share
    return patch.object(rounding, "noise_share", lambda noise, clip, honest: share(noise, clip, honest + COLLUDERS))


def each_priced_whole() -> AbstractContextManager[Any]:
    """The price counts each part as the whole: √h times the noise that a sum has."""

    def release(plan: PrivacyPlan, steps: int) -> Release:
        noise = plan.event.noise_multiplier * plan.event.figures["honest_sites"] ** 0.5
        return Release(plan.event.having(noise_multiplier=noise), steps)

    return patch.object(SecureSumPlan, "release", release)


def alone_priced_as_the_sum() -> AbstractContextManager[Any]:
    """The price alone forgets to divide by √h."""

    def own(_: SummedGaussian, event: Event) -> Event:
        return sampled_gaussian(event.noise_multiplier, event.sample_rate, event.clip_norm)

    return patch.object(SummedGaussian, "alone", own)


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
QUIET = Fault("a site's part of the noise is missing", one_quiet)
AGAIN = Fault("a site's noise of one sum in every sum", noise_again)
COUNTED = Fault("noise that counts on who may collude", counted_colluder)
WHOLE = Fault("each part priced as the whole noise", each_priced_whole)
ALONE = Fault("the price alone as that of the sum", alone_priced_as_the_sum)
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
    others: dict[str, Words]
    """What the sites beside the clinic masked: known once all of them collude."""


class Sum:
    """One run's sums: a deployed site that holds canaries, and three others by hand.

    Args:
        folder: for model, records, ledger and keys; empty.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "model").mkdir()
        save_tiny_model("bert", folder / "model", hidden=WIDTH)
        own: dict[str, Any] = {
            "adapter.rank": RANK,
            "head.policy": "frozen",
            "privacy.mode": "secure-sum",
            "privacy.honest-sites": HONEST,
            "privacy.colluders": COLLUDERS,
            "privacy.epsilon": 1000.0,
            "privacy.delta": DELTA,
            "training.optimizer": "sgd",
            "training.local-steps": 1,
            "training.sample-rate": 1.0,
        }
        site = clinic({**tiny_run(folder), **own}, folder)
        site.settings |= {"privacy.noise-multiplier": NOISE, "rounds": ROUNDS}
        self.site = SumSite(site, names=PEERS)
        self.site.rule(epsilon=1000.0, delta=DELTA, epsilon_alone=1000.0)
        self.job, self.model = configure(site.settings), site.model()
        trained, canaries = self.job.sent(1, self.model.trained()), Dirac(self.model.module, LENGTH)
        places = dict(zip(map(id, canaries.parameters), _starts(canaries.parameters), strict=True))
        self.canaries = canaries.size
        tensors = [trained[layer][name] for layer in sorted(trained) for name in sorted(trained[layer])]
        self._places = torch.cat([torch.arange(p.numel()) + places[id(p)] for p in tensors])
        """Of each number of a vector, its canary."""
        config = self.job.config
        self.plan = cast(SecureSumPlan, self.job.mechanism.plan(config.privacy, config.training, ROUNDS, PUBLIC))

    def round(self, number: int, axes: Tensor) -> Seen:
        """Return what the server sees of one round in which the clinic holds the canaries of these axes."""
        task = self.site.task(number)
        with _holding(axes):
            reply = self.site.site.ask(task)
        if not isinstance(reply, TrainResult):
            raise TypeError(f"the site refuses: {reply.reason}")
        own = np.frombuffer(reply.words, dtype="<u4").astype(np.uint32)
        quiet = np.zeros(len(own), dtype=np.uint32)
        others = {
            name: quiet if name == INSIDER else rounding.rounded(torch.zeros(len(own)), self.plan.noise_std)
            for name in PEERS
        }
        insider = X25519PrivateKey.from_private_bytes(self.site.others[INSIDER].secret)
        hashes, peers = sums._hashes(task, self.job, self.model), self.site.others
        terms, roster = sums.terms_of(self.job, PUBLIC), self.site.roster
        (digest,) = {peer.agree(task.offers, roster, terms, hashes).digest() for peer in peers.values()}
        uploads = {"clinic": own, **{name: peers[name].masked(words.copy()) for name, words in others.items()}}
        return Seen(uploads, digest, {offer.site: offer.public for offer in task.offers}, insider, others)

    def by_canary(self, numbers: Tensor) -> Tensor:
        """Return a vector's numbers in the order of the canaries."""
        ordered = torch.empty_like(numbers)
        ordered[self._places] = numbers
        return ordered

    def spent(self) -> tuple[float, float]:
        """Return the clinic's ε by its ledger: of the sums, and alone."""
        with Ledger(self.site.site.ledger) as ledger:
            return ledger.epsilon("clinic", DELTA), ledger.epsilon_alone("clinic", DELTA)


def _starts(parameters: Sequence[Tensor]) -> list[int]:
    return torch.tensor([0, *(p.numel() for p in parameters)]).cumsum(0)[:-1].tolist()


@contextmanager
def _holding(axes: Tensor) -> Iterator[None]:
    """Let a site hold the canaries of these axes in place of its records, whatever else it does."""
    built = SiteProcess.model_of
    with ExitStack() as stack:

        def model_of(own: SiteProcess, job: Any, site: Any) -> Any:
            model = built(own, job, site)
            stand_ins = {
                "fixed_batches": lambda held: torch.tensor([one["axis"] for one in held], dtype=torch.long).split(PART),
                "losses": Dirac(model.module, LENGTH),
            }
            for name, stand_in in stand_ins.items():
                stack.enter_context(patch.object(model, name, stand_in))
            return model

        stack.enter_context(patch.object(SiteProcess, "model_of", model_of))
        records = [{"axis": axis} for axis in axes.tolist()]
        stack.enter_context(patch.object(RecordCache, "prepare", lambda *own: records))
        # Canaries have no shape to rehearse.
        stack.enter_context(patch.object(rehearsals, "rehearse", lambda _: Timing({8: 0.0}, {8: 1}, 0.0, 0.0)))
        yield


def _told(folder: Path, fault: Fault, *, alone: bool) -> Finding:
    """Bound ε by the sums, and take off first what the other sites sent if all of them collude."""
    with fault.plant():
        run = Sum(folder)
        present = torch.rand(run.canaries) < 0.5
        scores = torch.zeros(run.canaries, dtype=torch.float64)
        for number in range(1, ROUNDS + 1):
            seen = run.round(number, present.nonzero().flatten())
            known = [-words for words in seen.others.values()] if alone else []
            scores -= run.by_canary(total([*seen.uploads.values(), *known], run.plan.noise_std))
        claimed = run.spent()[alone]
    name = "a site's canaries, all others collude" if alone else "a sum's canaries"
    return compared(
        name,
        fault,
        (scores / run.plan.event.clip_norm / ROUNDS).numpy(),
        present.numpy(),
        claimed,
        honest=0 if alone else HONEST,
    )


def sum_tells(folder: Path, fault: Fault = SOUND) -> Finding:
    """Bound ε by what the sums tell a server that holds a site, against the ledger's price of the sums."""
    return _told(folder, fault, alone=False)


def site_tells(folder: Path, fault: Fault = SOUND) -> Finding:
    """Bound ε by what the sums tell a server with which all other sites collude, against the ledger's price alone."""
    return _told(folder, fault, alone=True)


def noise_of_a_sum(folder: Path, fault: Fault = SOUND) -> Finding:
    """Hold sums of no record, of which one site adds no noise, against the price, and two of them against each other.

    What is drawn for one sum is in no other: of two attempts with one noise the difference would be bare.
    """
    with fault.plant():
        run = Sum(folder)
        rounds = [run.round(number, NOBODY) for number in range(1, ROUNDS + 1)]
        sums_told = [total(seen.uploads.values(), run.plan.noise_std) for seen in rounds]
    found = torch.cat(sums_told)
    priced = run.plan.event.noise_multiplier * run.plan.event.clip_norm
    alarm = out_of_band(float((found / priced).square().sum()), len(found)) or related(*sums_told[:2])
    spread = float(found.square().mean().sqrt() / priced)
    figures: dict[str, int | float | str] = {"numbers": len(found), "spread over what is priced": spread}
    return judged("noise of a sum", fault.name, alarm, figures)


def one_upload(folder: Path, fault: Fault = SOUND) -> Finding:
    """Hold one upload, as it is and with every mask off that the server can make, against uniform words."""
    with fault.plant():
        run = Sum(folder)
        seen = run.round(1, torch.arange(run.canaries))
        left = seen.uploads["clinic"].copy()
        for peer in PEERS:
            # It has the key of its own site; of the others it knows what they sent.
            key = seen.insider if peer == INSIDER else X25519PrivateKey.generate()
            seed = vars(attempt)["pair_seed"](key, seen.keys["clinic"], seen.digest, peer, "clinic")  # the fault's too
            add_mask(left, seed, peer, "clinic")
    statistics = [unevenness(words, shift) for words in (seen.uploads["clinic"], left) for shift in SHIFTS]
    alarm = any(out_of_band(statistic, CELLS - 1) for statistic in statistics)
    figures: dict[str, int | float | str] = {
        "numbers": run.canaries,
        "largest chi-square of 255 degrees": max(statistics),
    }
    return judged("one upload", fault.name, alarm, figures)


def unevenness(words: Words, shift: int) -> float:
    """Return the chi-square statistic, of ``CELLS`` - 1 degrees, of one byte of all words against uniform ones."""
    cells = np.bincount(words >> shift & (CELLS - 1), minlength=CELLS)
    expected = len(words) / CELLS
    return float(((cells - expected) ** 2 / expected).sum())


def masks_of_a_sum(folder: Path, fault: Fault = SOUND) -> Finding:
    """Hold a sum's length against the longest that a server takes: masks that stay on must show."""
    with fault.plant():
        run = Sum(folder)
        seen = run.round(1, torch.arange(run.canaries))
        length = float(total(seen.uploads.values(), run.plan.noise_std).norm())
    longest = longest_sum(replace(run.plan, expected_batch_size=float(run.canaries)), 1 + len(PEERS), run.canaries)
    return judged("masks of a sum", fault.name, length > longest, {"length": length, "longest": longest})


CASES: dict[Callable[[Path, Fault], Finding], tuple[Fault, ...]] = {
    sum_tells: (HALVED, QUIET, COUNTED, WHOLE),
    site_tells: (HALVED, ALONE),
    noise_of_a_sum: (HALVED, QUIET, COUNTED, AGAIN),
    one_upload: (BARE, KNOWN_SEED),
    masks_of_a_sum: (ONE_SIDED,),
}
"""Each audit with the faults that it must find."""


def audit_sums(folder: Path) -> Sequence[Finding]:
    """Audit sums as they are, then with each fault."""
    return each_of(CASES, folder)

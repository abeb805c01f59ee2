"""The account: what a site does is what its ledger was charged for: steps, noise, clip, rate, all by public figures.

A spy sits on the mechanism and on the sampler while a site answers two rounds, in the second of which
every sample comes out empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_site import OneSite, tiny_site
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.rehearsal import _Rehearsal
from fedveil.client.timing import Timing
from fedveil.common.findings import Finding
from fedveil.privacy import dpsgd, randomness
from fedveil.privacy.randomness import private_poisson_sample

STEPS, RATE, PUBLIC, RECORDS = 3, 0.25, 50, 40
WITHIN = 0.25
"""Relative. What the noise of one step's few hundred numbers may differ by from its law."""


@dataclass(frozen=True)
class Draw:
    """One noised step as the mechanism took it."""

    noise: float
    clip: float
    divisor: float
    size: float
    """Root mean square of what was handed over, before the divisor."""


@dataclass
class Spy:
    """What the mechanism did, and what the sampler was asked for."""

    draws: list[Draw] = field(default_factory=list)
    samples: list[tuple[int, float]] = field(default_factory=list)
    empty: bool = False
    """Whether every sample is to come out empty."""


@contextmanager
def spying() -> Iterator[Spy]:
    """Look on while a site trains."""
    seen = Spy()
    add_noise, rehearsed, rehearsing = dpsgd.ClipAndNoise.add_noise, _Rehearsal.run, [False]

    def noisy(mechanism: Any) -> None:
        add_noise(mechanism)
        if not rehearsing[0]:
            noise, clip, divisor = mechanism.noise_multiplier, mechanism.max_grad_norm, mechanism.expected_batch_size
            flat = torch.cat([parameter.grad.flatten().double() for parameter in mechanism.params])
            seen.draws.append(Draw(noise, clip, float(divisor), float(flat.square().mean().sqrt())))

    def rehearsal(self: _Rehearsal) -> Timing:
        rehearsing[0] = True  # on no record, and nothing of it is sent
        try:
            return rehearsed(self)
        finally:
            rehearsing[0] = False

    def sampled(size: int, rate: float) -> torch.Tensor:
        seen.samples.append((size, rate))
        return torch.arange(0) if seen.empty else private_poisson_sample(size, rate)

    with (
        patch.object(dpsgd.ClipAndNoise, "add_noise", noisy),
        patch.object(_Rehearsal, "run", rehearsal),
        patch.object(randomness, "private_poisson_sample", sampled),
    ):
        yield seen


def account_site(folder: Path) -> OneSite:
    """Return the site that is looked at, in ``folder``."""
    return tiny_site(folder, RECORDS, **{"training.local-steps": STEPS, "training.sample-rate": RATE})


def account_faults(site: OneSite, fault: Fault = SOUND) -> list[str]:
    """Let ``site`` train two rounds with ``fault`` built in, and return where account and deed differ."""
    with spying() as spy, fault.plant():  # the fault over the spy: what does not ask the sampler is not seen to
        reported = [site.train(1)]
        spy.empty = True
        reported.append(site.train(2))
    with Ledger(site.ledger) as ledger:
        rows, epsilon = ledger.entries(), ledger.epsilon("clinic", 1e-3)
    wrong = {
        "charged steps are not the noised steps": sum(row.count for row in rows) != len(spy.draws)
        or len(spy.draws) != 2 * STEPS,
        "noise or clip differ from the charge": {(row.event.noise_multiplier, row.event.clip_norm) for row in rows}
        != {(draw.noise, draw.clip) for draw in spy.draws},
        "steps on no record carry other noise than was charged": any(
            abs(draw.size / (rows[-1].event.noise_multiplier * draw.clip) - 1) > WITHIN for draw in spy.draws[STEPS:]
        ),
        "batches do not come from the sampler at the rate that was charged": spy.samples
        != [(RECORDS, row.event.sample_rate) for row in rows for _ in range(row.count)],
        "the divisor knows how many records there are": {draw.divisor for draw in spy.draws} != {RATE * PUBLIC},
        "the epsilon reported is below the ledger's": [r.spending.epsilon_total for r in reported if r.spending][-1:]
        != [epsilon],
    }
    return [words for words, found in wrong.items() if found]


def audit_account(folder: Path, fault: Fault = SOUND) -> Finding:
    """Hold a site's account against what it does, with ``fault`` built in; ``folder`` must be empty."""
    wrong = account_faults(account_site(folder), fault)
    return judged("account", fault.name, bool(wrong), {"steps": 2 * STEPS, "wrong": "; ".join(wrong) or "nothing"})

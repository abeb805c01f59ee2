"""Canaries: how much the released model tells about who was in, against what the ledger says that it can tell.

    .venv/bin/python -m audits.canary

A linear model without bias has one weight a canary; record i is a vector along axis i only, longer than the
clip, with the loss -w·x. So each step adds one clip norm to weight i if record i is in, and noise to every
weight, and the final weights say all that there is to say. A coin decides which records are in. Sampler,
clip, noise, divisor, optimiser and ledger are the ones of a site, over several rounds; every record is in
every batch (rate 1), because at small rates no audit of this size sees anything (PRIVACY: 4.1).

The code passes if the bound stays below the ledger's epsilon. Then faults are built in, one at a time, and
the bound must exceed what the ledger claims: else the audit could not have seen them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from audits.bounds import free_bound, gaussian_bound
from audits.finding import FAULT, Finding, quiet, show
from common.privacy import dpsgd
from common.privacy.dpsgd import PrivateSteps
from common.privacy.ledger import Ledger
from common.privacy.plan import PrivacyPlan
from common.randomness import private_normal, private_poisson_sample

CANARIES = 9000
ROUNDS, STEPS = 5, 2
PART = 500
"""Records of one forward pass."""
DELTA = 1e-5
Normal = Callable[[tuple[int, ...], float], Tensor]


@dataclass(frozen=True)
class Fault:
    """Something to build into the mechanism while the ledger is charged as ever."""

    name: str
    plan: Callable[[PrivacyPlan], PrivacyPlan] = lambda plan: plan
    noise: Callable[[], Normal] = lambda: private_normal
    new_ledger_each_round: bool = False


def _half() -> Normal:
    return lambda shape, std: private_normal(shape, std / 2)


def _every_second() -> Normal:
    calls = iter(range(10**9))
    return lambda shape, std: private_normal(shape, std if next(calls) % 2 else 0.0)


def _double_clip(plan: PrivacyPlan) -> PrivacyPlan:
    """The same noise, on gradients clipped at twice the bound."""
    return replace(plan, clip_norm=2 * plan.clip_norm, noise_multiplier=plan.noise_multiplier / 2)


SOUND = Fault("as it is")
FAULTS = (
    Fault("noise halved", noise=_half),
    Fault("no noise on every second step", noise=_every_second),
    Fault("clip doubled", plan=_double_clip),
    Fault("a new ledger each round", new_ledger_each_round=True),
)


def probe(folder: Path, fault: Fault = SOUND, canaries: int = CANARIES) -> Finding:
    """Train on canaries with ``fault`` built in; passed means sound and silent, or faulty and found.

    Args:
        folder: a folder for the ledgers, empty.
        fault: what to break.
        canaries: how many.
    """
    plan = PrivacyPlan(1.0, 6.5, 1.0, expected_batch_size=canaries, delta=DELTA, max_epsilon=100.0)
    present = torch.rand(canaries) < 0.5
    model = nn.Linear(canaries, 1, bias=False)
    nn.init.zeros_(model.weight)
    records = present.nonzero().flatten()
    with patch.object(dpsgd, "private_normal", fault.noise()):
        for number in range(1, ROUNDS + 1):
            name = f"{number}.sqlite" if fault.new_ledger_each_round else "ledger.sqlite"
            with Ledger(folder / name) as ledger:
                releases = [plan.release(STEPS)]
                charge = ledger.charge(
                    "canaries", releases, run="1", round_number=number, delta=DELTA, max_epsilon=100.0, clip_norm=1.0
                )
            _train(model, records, fault.plan(plan))
    scores = model.weight.detach().flatten().double().numpy() * canaries / (ROUNDS * STEPS)
    bound = gaussian_bound(scores, present.numpy(), DELTA)
    found = bound > charge.epsilon_after
    return Finding(
        "canaries",
        fault.name if fault is SOUND else f"{FAULT}: {fault.name}",
        found != (fault is SOUND),
        {
            "epsilon claimed": charge.epsilon_after,
            "epsilon is at least": bound,
            "without any assumption": free_bound(scores, np.asarray(present), DELTA),
            "canaries": canaries,
            "above the claim": "yes" if found else "no",
        },
    )


def _train(model: nn.Linear, records: Tensor, plan: PrivacyPlan) -> None:
    """Take one round's steps on the canaries that are in, as a site does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def parts(chosen: Tensor) -> Iterator[Tensor]:
        for part in records[chosen].split(PART):
            yield 5.0 * plan.clip_norm * nn.functional.one_hot(part, model.in_features).float()

    with PrivateSteps(model, optimizer, plan) as steps:
        for _ in range(STEPS):
            chosen = private_poisson_sample(len(records), plan.sample_rate)
            steps.step(parts(chosen), lambda batch: -model(batch).flatten())


def probe_all(folder: Path, canaries: int = CANARIES) -> list[Finding]:
    """Probe the code as it is, then with each fault."""
    findings = []
    for number, fault in enumerate((SOUND, *FAULTS)):
        own = folder / str(number)
        own.mkdir()
        findings.append(probe(own, fault, canaries))
    return findings


def main() -> None:
    """Run from a shell."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        findings = probe_all(Path(folder))
    show(Console(highlight=False), findings)
    sys.exit(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    main()

"""Canaries: how much the released model tells about who was in, against what the ledger says that it can tell.

    .venv/bin/python -m audits.canary

A linear model without bias has one weight a canary (``audits.dirac``): each step adds one clip norm to weight
i if record i is in, and noise to every weight, so the final weights say all that there is to say. A coin
decides which records are in. Sampler, clip, noise, divisor, optimiser and ledger are the ones of a site, over
several rounds; every record is in every batch (rate 1), because at small rates no audit of this size sees
anything.

The code passes if the bound stays below the ledger's epsilon. Then faults are built in, one at a time, and
the bound must exceed what the ledger claims: else the audit could not have seen them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from audits.bounds import free_bound, gaussian_bound
from audits.dirac import Dirac
from audits.faults import DOUBLED, EVERY_SECOND, HALVED, RESET, SOUND, Fault
from audits.finding import judged
from audits.shell import run_alone, with_each
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.findings import Finding
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan
from fedveil.privacy.randomness import private_poisson_sample
from fedveil.reports.audits import CLAIMED, HONEST

CANARIES = 9000
ROUNDS, STEPS = 5, 2
PART = 500
"""Records of one forward pass."""
NOISE, LENGTH = 6.5, 5.0
DELTA = 1e-5
FAULTS = (HALVED, EVERY_SECOND, DOUBLED, RESET)


def probe(folder: Path, fault: Fault = SOUND, canaries: int = CANARIES) -> Finding:
    """Train on canaries with ``fault`` built in; passed means sound and silent, or faulty and found.

    Args:
        folder: a folder for the ledger, empty.
        fault: what to break.
        canaries: how many.
    """
    plan = gaussian_plan(1.0, NOISE, 1.0, expected_batch_size=canaries, delta=DELTA, max_epsilon=100.0)
    present = torch.rand(canaries) < 0.5
    model = nn.Linear(canaries, 1, bias=False)
    nn.init.zeros_(model.weight)
    with fault.plant():
        for number in range(1, ROUNDS + 1):
            with Ledger(folder / "ledger.sqlite") as ledger:
                receipt = ledger.charge(Charge("canaries", "1", number, (plan.release(STEPS),), DELTA, 100.0))
            _train(model, present.nonzero().flatten(), plan)
    scores = model.weight.detach().flatten().double().numpy() * canaries / (ROUNDS * STEPS)
    return compared("canaries", fault, scores, present.numpy(), receipt.epsilon_after)


def compared(
    audit: str, fault: Fault, scores: np.ndarray, present: np.ndarray, claimed: float, honest: int = 0
) -> Finding:
    """Hold what the scores give away against the epsilon that was claimed.

    Args:
        audit: its name.
        fault: what was built in.
        scores: shape (canaries,), 1 on average for who was in and 0 for who was not.
        present: bool, shape (canaries,).
        claimed: by the ledger or the report, at ``DELTA``.
        honest: sites of a sum that it counts on; 0: it counts on no other site.
    """
    bound = gaussian_bound(scores, present, DELTA)
    return judged(
        audit,
        fault.name,
        bound > claimed,
        {
            "canaries": len(scores),
            CLAIMED: claimed,
            **({HONEST: honest} if honest else {}),
            "epsilon is at least": bound,
            "without any assumption": free_bound(scores, present, DELTA),
        },
    )


def _train(model: nn.Linear, records: Tensor, plan: PrivacyPlan) -> None:
    """Take one round's steps on the canaries that are in, as a site does."""
    losses = Dirac(model, LENGTH * plan.event.clip_norm)
    with PrivateSteps(model, torch.optim.SGD(model.parameters(), lr=1.0), plan) as steps:
        for _ in range(STEPS):
            chosen = private_poisson_sample(len(records), plan.event.sample_rate)
            steps.step(records[chosen].split(PART), losses)


def probe_all(folder: Path, canaries: int = CANARIES) -> list[Finding]:
    """Probe the code as it is, then with each fault."""
    return with_each(FAULTS, folder, lambda own, fault: probe(own, fault, canaries))


if __name__ == "__main__":
    run_alone(__doc__, "canaries", CANARIES, probe_all)

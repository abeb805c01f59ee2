"""One step, a hundred canaries: for the shapes that each strategy trains, what the mechanism hands to the optimiser.

Before each of fifty steps a coin decides for each canary whether it is in. The gradient that clip,
noise and divisor let through is the score. Five thousand scores give a lower bound on the epsilon of one step.
"""

from __future__ import annotations

from pathlib import Path

import torch

from audits.bounds import gaussian_bound
from audits.dirac import Dirac
from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_site import tiny_run
from audits.worlds import Recorder, flat
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.low_rank import LowRank
from fedveil.common.findings import Finding
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy.accounting import epsilon, gaussian_release
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies import STRATEGIES
from fedveil.strategies.base import chooses
from fedveil.strategies.job import configure

CANARIES, STEPS = 100, 50
DELTA = 1e-5
NOISE = 1.0
CONFIDENCE = 0.999
"""Of each error rate; both must be off at once, so a false alarm comes about once in a million audits."""


def audited() -> list[str]:
    """Return the strategies whose sites' steps have canaries: of the others, sites take steps that one of these has.

    A canary needs trained numbers of plain linear layers. Strategies by columns, or in turns, train a part of such.
    """
    return [
        name
        for name, kind in sorted(STRATEGIES.items())
        if issubclass(ADAPTERS[kind.adapters.default], LowRank) and not chooses(kind)
    ]


def model_for(strategy: str, folder: Path) -> FederatedModel:
    """Return the tiny BERT with the adapter that the strategy trains; files go to ``folder``."""
    job = configure({**tiny_run(folder), "strategy": strategy})
    return job.model(("bad", "good"))


def audit_steps(strategy: str, folder: Path, fault: Fault = SOUND) -> Finding:
    """Audit steps on what ``strategy`` trains, with ``fault`` built in."""
    module = model_for(strategy, folder).module
    plan = gaussian_plan(0.5, NOISE, 1.0, expected_batch_size=20.0, delta=DELTA, max_epsilon=100.0)
    canaries = Dirac(module, 10 * plan.event.clip_norm)
    axes = torch.randperm(canaries.size)[:CANARIES]
    present = torch.rand(STEPS, CANARIES) < 0.5
    optimizer = Recorder(canaries.parameters)
    with fault.plant(), PrivateSteps(module, optimizer, plan) as steps:
        for row in present:
            steps.step([axes[row]], canaries)
    given = torch.stack([flat(gradient)[axes] for gradient in optimizer.given])
    scores = -given * plan.expected_batch_size / plan.event.clip_norm
    claimed = epsilon([gaussian_release(NOISE, 1.0, 1)], DELTA)
    bound = gaussian_bound(scores.flatten().numpy(), present.flatten().numpy(), DELTA, CONFIDENCE)
    return judged(
        "step canaries",
        fault.name,
        bound > claimed,
        {"strategy": strategy, "numbers trained": canaries.size, "epsilon claimed": claimed, "is at least": bound},
    )

"""Plans and results of honest sites, as a server judges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from made_run import told

from fedveil.client.budget import plan_of
from fedveil.client.ledger.rows import Terms
from fedveil.client.policy import Policy
from fedveil.client.site import Site
from fedveil.common.messages.round import Spending, TrainResult
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.plan import PrivacyPlan
from fedveil.strategies import ServerState
from fedveil.strategies.job import Job

SIZE = 2000

NUMBERS = 40_000
"""About as many as the plain job trains."""

STATE = ServerState(0, {"layer": {"B": torch.zeros(NUMBERS)}}, ("B",))


def plan(job: Job, policy: Policy | None = None, size: int = SIZE) -> PrivacyPlan:
    """Return the plan that a site of this policy makes, with a ledger that holds nothing."""
    policy = policy or Policy()
    site = Site("ward", Dataset("ward", (), ()), "ward", size, Path(), policy)
    return plan_of(job, site, Terms(policy.epsilon, policy.delta))


def answer(job: Job, own: PrivacyPlan, size: int = SIZE, **figures: Any) -> TrainResult:
    """Return what an honest site called ward sends in round 1, told figures replaced; its update is its noise alone."""
    spent = Spending(
        *(TRAINING, own.event, job.config.training.local_steps, 1),
        *(own.delta, 0.2, 0.2, own.max_epsilon, own.max_epsilon - 0.2, Accountant("pld", "0.6.0")),
    )
    way = own.gradient_noise_std * job.config.training.learning_rate
    update = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(1)) * way
    return TrainResult("1", 1, "ward", size, {"layer": {"B": update}}, told(spent, **figures))


DEAR_START = {
    "strategy": "fed-sb",
    "adapter.start": "dp-gradient",
    "start.noise-multiplier": 0.7,
    "start.sample-rate": 0.5,
}

"""Settings and helpers of runs whose unit is a site."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from audits.whole_sites import MadeUp, Sent
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply, l2_norm
from fedveil.server.admission import Admission
from fedveil.server.collect.door import collector_of
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.model import ServerModel
from fedveil.strategies import ServerState
from fedveil.strategies.job import Job

SITE = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.noise-multiplier": 2.0}


CLIP, COHORT_SIZE = 0.5, 8


# --- a server whose sites are made up ---------------------------------------------------------------------------------
def trusting(job: Job, transport: MadeUp, model: ServerModel, run: str = "1") -> TrustedCollector:
    collector = collector_of(job, run, transport, model, Admission(job, {}, transport.registered))
    assert isinstance(collector, TrustedCollector)
    return collector


@dataclass
class World:
    """A server at its first round."""

    job: Job
    model: ServerModel
    state: ServerState
    folder: Path

    def sites(self, transport: MadeUp, run: str = "1") -> TrustedCollector:
        return trusting(self.job, transport, self.model, run)

    def mean(self, sent: Sent, count: int = COHORT_SIZE) -> AdapterState:
        """Return the mean change of a round, float64, as it is before the model takes it."""
        transport = MadeUp(sent, count)
        sites = self.sites(transport)
        replies = [sent(node, self.job.strategy.downlink(self.state)) for node in range(count)]
        results = (reply for reply in replies if isinstance(reply, TrainResult))
        return sites._mean(results, 1, self.state).change


def update(node: int, received: AdapterState, length: float = 1.0) -> TrainResult:
    """Return an honest reply whose change is ``length`` clips long, in a direction of the node's own."""
    draw = torch.Generator().manual_seed(node)
    moved = apply(lambda tensor: torch.randn(tensor.shape, generator=draw, dtype=torch.float64), received)
    factor = length * CLIP / l2_norm(moved)
    state = apply(lambda old, step: (old.double() + factor * step).float(), received, moved)
    return TrainResult("1", 1, f"site-{node}", 10**node, state, None)


# --- what the server gives away ---------------------------------------------------------------------------------------
CLOCKS = re.compile(
    r'"(started|time|charged_at)": ?"[^"]*"|[0-9-]+T[0-9:+.]+|[0-9-]+ [0-9:]+ UTC|`report.json` \| `[0-9a-f]+`'
)
"""When a run began, the times of the server's own log and ledger, and the hash of a file that has them."""


def content(path: Path) -> str:
    """Return a file without clocks, of tensors in an order that is the same every time."""
    if path.suffix != ".safetensors":
        return CLOCKS.sub("CLOCK", path.read_bytes().decode("latin-1"))
    with safe_open(str(path), framework="pt") as file:
        said = sorted((file.metadata() or {}).items())
        parts = [repr(said), *(f"{name} {file.get_tensor(name).tolist()}" for name in sorted(file.keys()))]
    # The length of a file with clocks has a digit more or less by them.
    return re.sub(r'"rounds.jsonl\\*": [0-9]+', "LENGTH", "\n".join(parts))

"""Settings, lying servers and helpers of runs whose server sees a sum alone."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audits.bands import out_of_band
from audits.summed import CELLS, SHIFTS, unevenness
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.messages.blocks import block_data
from fedveil.common.messages.round import Refusal, Task, TrainTask
from fedveil.common.messages.tensors import entries
from fedveil.common.messages.wire import encode_reply
from fedveil.experiments.in_process import InProcessTransport
from fedveil.privacy.grid import noise_grid
from fedveil.server import checkpoint

SUMMED: dict[str, Any] = {
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 2,
    "privacy.noise-multiplier": 2.0,
    "privacy.epsilon": 40.0,
    "training.optimizer": "sgd",
    "training.learning-rate": 0.5,
    "training.local-steps": 1,
    "training.sample-rate": 0.25,
}


def spent(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Return round and kind of everything in each site's ledger."""
    found = {}
    for path in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(path) as ledger:
            found[path.stem] = [(entry.round_number, entry.event.kind) for entry in ledger.entries()]
    return found


def no_noise(sums: torch.Tensor, std: float, step: float = 0.0) -> torch.Tensor:
    """Round without noise."""
    grid = step or noise_grid(std)
    return (sums / grid).round() * grid


def releases(folder: Path) -> list[Any]:
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        return ledger.spent("site-0")


@dataclass
class Lying(InProcessTransport):
    """Passes everything on, but for what a test changes."""


class Watched(InProcessTransport):
    """Keeps all that sites send."""

    sent: list[tuple[int, Task, Any]]

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        record = super().deliver(node, task, content)
        if not hasattr(self, "sent"):
            self.sent = []
        self.sent.append((node, task, record))
        self.look(node, task, record)
        return record

    def look(self, node: int, task: Task, record: Any) -> None:
        """Look at a reply."""


# --- attempts ---------------------------------------------------------------------------------------------------------
class Losing(Watched):
    """Loses the vector of one site in the first attempt at round 1."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        record = super().deliver(node, task, content)
        if isinstance(task, TrainTask) and (node, task.round_number, task.attempt) == (2, 1, 0):
            return encode_reply(Refusal(task.run, 1, "site-2", "failed", "the line is cut"))
        return record


def last_adapter(folder: Path) -> torch.Tensor:
    state = checkpoint._read(folder / checkpoint.NAME)[1]
    return torch.cat([tensor.double().flatten() for _, _, tensor in entries(state.adapter)])


def words_of(record: Any) -> np.ndarray:
    return np.frombuffer(block_data(record.array_records["sum"]["words"]), dtype="<u4")


def uneven(words: np.ndarray) -> bool:
    return any(out_of_band(unevenness(words, shift), CELLS - 1) for shift in SHIFTS)


def gone(sites: Mapping[int, int], waited: list[int]) -> type[InProcessTransport]:
    """Return a transport that loses nodes for good, each with its vector of the round that is given by node.

    For how many nodes the server waits goes to ``waited``.
    """

    class Gone(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            first = sites.get(node, task.round_number + 1)
            there = task.round_number == first and not task.attempt and not isinstance(task, TrainTask)
            if task.round_number >= first and not there:
                return encode_reply(Refusal(task.run, task.round_number, f"site-{node}", "failed", "gone"))
            return super().deliver(node, task, content)

        def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
            waited.append(wanted)
            return super().nodes(wanted, besides)

    return Gone

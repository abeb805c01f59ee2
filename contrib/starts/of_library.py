"""Starts that are made of a library's adapters (``contrib.library``), which lie on the basis of the run's seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedveil.common.adapters import Adapter, Place
from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.run import RunConfig
from fedveil.common.derived import Source
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.state import OWN, AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Start, seeded

FITTING = ("lora", "lora-frozen-a", "lora-mixture")
"""Adapters that can begin at a library's: those of which B, or a weight of each B, is trained."""


@dataclass(frozen=True)
class OfLibrary(Start):
    """Where adapters of a library begin, or a weighted sum of them; A is that of the seed, as the library's."""

    gives: ClassVar[tuple[str, ...]] = ("A", "B", "stack")

    library: str = ""
    """Folder of the library, at the server."""
    adapters: str = ""
    """Its adapters that are chosen from, in order, each as ``NAME=FINGERPRINT``, with commas between them:
    ``fedveil library list`` prints all."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a run whose adapter cannot begin at another one, or that names none to begin at."""
        super().check(config, adapter)
        if adapter.name not in FITTING:
            raise ConfigError(
                f"adapter.start {self.name!r} moves B over the A of the seed, and adapter.name {adapter.name!r} begins "
                f"otherwise: set adapter.name to one of {', '.join(FITTING)}"
            )
        if not config.adapter.alpha:
            raise ConfigError(f"adapter.start {self.name!r} has B's of their own length: set adapter.alpha above 0")
        if not self.library or not self.names:
            raise ConfigError(
                f"adapter.start {self.name!r} needs start.library, the folder of a library, and start.adapters, which "
                "'fedveil library list' prints for it"
            )
        wrong = [name for name in self.names if not PLAIN_NAME.fullmatch(name)]
        if wrong or len(set(self.names)) < len(self.names) or not all(part for _, part in self._entries):
            raise ConfigError("start.adapters must be NAME=FINGERPRINT, each name once, with commas between them")

    @property
    def _entries(self) -> list[tuple[str, str]]:
        parts = [entry.strip().partition("=") for entry in self.adapters.split(",") if entry.strip()]
        return [(name, digest) for name, _, digest in parts]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in order."""
        return tuple(name for name, _ in self._entries)

    @property
    def members(self) -> int:
        """How many adapters there are; of a start without settings two, for shapes alone."""
        return len(self.names) or 2

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions; B's are there after round 0."""
        return seeded(place, wanted)

    def sources(self) -> Sequence[Source]:
        """Server: return the runs that the adapters are of."""
        from fedveil.contrib.library.shelf import open_library

        library = open_library(self.library)
        return [source for name in self.names for source in library.sources(name)]

    def stack(self, adapter: Adapter, began: AdapterState) -> AdapterState:
        """Server: return ``B`` of every layer, shape (adapters, out, rank), of the adapters that the settings name.

        Raises:
            DataError: they are not in the library, or on another basis than the run.
        """
        from fedveil.contrib.library.shelf import open_library  # imports PEFT, which no site needs for it

        library = open_library(self.library)
        for name, digest in self._entries:
            if not library.member(name).fingerprint.startswith(digest):
                raise DataError(
                    f"start.adapters names {name} with the fingerprint {digest}, and {self.library} has another: set "
                    f"start.adapters to {library.setting!r}, or to some of them"
                )
        return library.stack(self.names, adapter, {k: v for k, v in began.items() if k not in OWN})

    def combined(self, model: FederatedModel, weights: Sequence[float]) -> AdapterState:
        """Server: return what ``from_statistic`` takes: the adapters' sum by weights, or all of them and these."""
        stacks, adapter = self.stack(model.adapter, model.start), model.adapter
        shares = torch.tensor(weights, dtype=torch.float64)
        made: AdapterState = {}
        for layer, held in stacks.items():
            A, B = model.start[layer]["A"], held["B"]
            if "stack" in adapter.directions:
                made[layer] = {"A": A, "stack": B, "w": shares.float()}
            else:
                total = torch.einsum("j,jor->or", shares, B.double())
                made[layer] = {"A": A, "B": (adapter.scaling * total).float(), "R": torch.eye(B.shape[2])}
        return made

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return it: it is made already."""
        del rank
        return dict(statistic)


def state_of(shown: AdapterState, number: int, *, mixed: bool) -> AdapterState:
    """Return what to write over a model so that it is one of the adapters that a site was shown.

    Args:
        shown: ``B`` of every layer, shape (adapters, out, rank).
        number: of the adapter.
        mixed: whether the model's adapter holds all of them, with a weight of each.
    """
    if not mixed:
        return {layer: {"B": held["B"][number]} for layer, held in shown.items()}
    return {layer: {"stack": held["B"], "w": torch.eye(len(held["B"]))[number]} for layer, held in shown.items()}

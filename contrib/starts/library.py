"""A library's adapter by private vote: the start of a second consortium at what others have learnt.

Round 0 shows the sites M public B's once. Each record votes for the adapter under which it loses least, the sites
release M noised counts (``contrib.starts.vote``), and the server begins at the winner, or at the mean by shares; after
that the run's strategy trains on. By loss only where adapters are of language models, or share the run's labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedveil.common.adapters import Adapter
from fedveil.common.check import OneOf
from fedveil.common.config.run import RunConfig
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, Needs
from fedveil.common.tasks import Record
from fedveil.contrib.starts.of_library import OfLibrary, state_of
from fedveil.contrib.starts.vote import VOTES, Vote, of_least_loss


@dataclass(frozen=True)
class FromLibrary(Vote, OfLibrary):
    """B of the library's adapter that most records vote for, or of all by their shares of the votes."""

    name: ClassVar[str] = "library"
    needs: ClassVar[Needs] = "paid release"

    begin_at: Annotated[str, OneOf(("best", "mean"))] = "best"
    """``best``: the adapter with the most noised votes. ``mean``: the sum of all by their noised shares, none below
    0."""

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return self.names or tuple(map(str, range(self.members)))

    @property
    def unfit(self) -> str:
        """Name the start that other runs have."""
        return "is a vote, a release that privacy.mode 'dp-sgd' alone pays for: use 'described', by public words"

    def shown_layout(self, began: AdapterState) -> Layout:
        """Return ``B`` of every layer, shape (adapters, out, rank)."""
        return {
            layer: {"B": (self.members, *(factors["B"] if "B" in factors else factors["stack"][0]).shape)}
            for layer, factors in began.items()
            if layer not in OWN
        }

    def shown(self, adapter: Adapter, began: AdapterState) -> AdapterState:
        """Return them."""
        return self.stack(adapter, began)

    def choose(self, model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[int]:
        """Return the adapter under which each record loses least."""
        mixed = "stack" in model.adapter.directions
        states = [state_of(model.shown or {}, number, mixed=mixed) for number in range(self.members)]
        return of_least_loss(model, records, states, before_pass)

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Return the winner, or the mean."""
        del config, labels
        return self.combined(model, self.shares(statistic[VOTES]["counts"].tolist()))

    def shares(self, counts: Sequence[float]) -> list[float]:
        """Return the weight of each adapter, which sum to 1; of equal counts the first wins.

        >>> FromLibrary().shares([1.0, 4.0, 4.0]), FromLibrary(begin_at="mean").shares([3.0, 1.0, -2.0])
        ([0.0, 1.0, 0.0], [0.75, 0.25, 0.0])
        """
        best = max(range(len(counts)), key=lambda number: (counts[number], -number))
        above = [max(count, 0.0) for count in counts]
        if self.begin_at == "best" or not any(above):
            return [float(number == best) for number in range(len(counts))]
        return [count / sum(above) for count in above]

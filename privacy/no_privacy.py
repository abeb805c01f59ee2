"""No mechanism: records train as they are, nothing is promised, and a site's ledger remembers that.

A step is free, so the same records make several small steps with Adam at the sites, and the average is
the new model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal

from fedveil.privacy.claim import NOTHING, Claim
from fedveil.privacy.events import Event
from fedveil.privacy.mechanism import Mechanism, Pace
from fedveil.privacy.plan import Plan
from fedveil.privacy.steps import Steps, nothing
from fedveil.privacy.together import Together

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.tasks import Batch, Record
    from fedveil.common.tasks.base import Coins


@dataclass(frozen=True)
class ExposingPlan(Plan):
    """Seeded epochs of batches of like length, and plain steps on their mean loss."""

    sample_rate: float
    """Expected share of the records in a step's batch."""
    batch_tokens: int
    """Of one forward pass; 0: what suits the device."""

    def batches(
        self, model: FederatedModel, records: Sequence[Record], public: torch.Generator, first: int
    ) -> Iterator[list[int]]:
        """Yield the batches of one order for the whole run: a round goes on where the last one ended."""
        from fedveil.common.model.batching import epoch_batches

        return epoch_batches([model.collator.size(record) for record in records], self.sample_rate, public, first)

    def parts(self, model: FederatedModel, records: Sequence[Record]) -> Iterable[Batch]:
        """Return batches of like length, each within the token budget of a pass."""
        from fedveil.common.model.device import choose_batch_tokens

        return model.length_batches(records, choose_batch_tokens(self.batch_tokens, model.device))

    def rows(self, model: FederatedModel, rows: Sequence[Record], records: int) -> Iterable[Together]:
        """Return batches of rows of like length; the step's mean is over records."""
        yield Together(records, ((batch, ()) for batch in self.parts(model, rows)))

    def coins(self, public: torch.Generator) -> Coins:
        """Return the public stream."""
        import torch

        return lambda count: torch.rand(count, generator=public, dtype=torch.float64)

    @contextmanager
    def steps(
        self, model: FederatedModel, optimizer: Optimizer, before_pass: Callable[[], None] = nothing
    ) -> Iterator[Steps]:
        """Return the context of plain steps; they are not interrupted."""
        from fedveil.common.model import plain

        yield plain.PlainSteps(model, optimizer)

    def longest_gradient(self, numbers: int, event: Event | None) -> float:
        """Return infinity: no clip bounds it."""
        return inf


class NoPrivacy(Mechanism):
    """Nothing is promised about any record."""

    name: ClassVar[str] = "none"
    claim: ClassVar[Claim] = NOTHING
    noised: ClassVar[Literal["at the site", "in the sum", "at the server", "nowhere"]] = "nowhere"
    charged: ClassVar[bool] = False
    counted: ClassVar[bool] = False
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "weights", "public records", "records, without privacy"})
    rehearsed: ClassVar[bool] = False
    conceals: ClassVar[bool] = False
    pace: ClassVar[Pace] = Pace(server_optimizer="none", local_steps=16, sample_rate=0.018, head_rate=5.0)
    head: ClassVar[str] = ""
    # Honest ones were up to 2.7 times as long by Adam at the sites. Those of plain steps are shortened now and then
    # where labels are uneven: 8 in 40 rounds of SST-2 by six sites.
    longest: ClassVar[float] = 3.0

    def exposing_plan(self, privacy: PrivacyConfig, training: TrainingConfig) -> ExposingPlan:
        """Return the run's rate and pass."""
        return ExposingPlan(training.sample_rate, training.batch_tokens)

    def broken_rule(
        self, allowed: Collection[str], *, without_privacy: bool, least_noise: float
    ) -> tuple[str, str, str] | None:
        """Return the rule against runs that promise nothing, unless the policy allows them."""
        del allowed, least_noise
        return None if without_privacy else ("allow-no-privacy", "false", f"privacy.mode = {self.name!r}")

    def promise(self, privacy: PrivacyConfig) -> str:
        """Say that the run has no privacy."""
        return "privacy OFF"

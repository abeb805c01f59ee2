"""Starts from a mean gradient of public records at the server, and LoRA-SB's among them.

Singhal, Ponkshe et al.: Initialization using Update Approximation is a Silver Bullet (LoRA-SB), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from fedveil.common.adapters import Adapter, Place
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.data.named import share_sentences
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.device import choose_batch_tokens
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, Needs, Start, seeded
from fedveil.common.starts.gradient import gradient_basis, gradient_layout, mean_gradient
from fedveil.common.starts.public_text import check_apart
from fedveil.common.tasks import Batch
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.words import counted
from fedveil.privacy.randomness import stream


@dataclass(frozen=True)
class FromRecords(Start):
    """A start from the mean gradient of public records; what is made of it, the row says."""

    needs: ClassVar[Needs] = "public records"
    opens_weights: ClassVar[bool] = True

    data: str = ""
    """The public data set or file, read with the run's ``data`` columns."""
    records: Annotated[int, POSITIVE, Unit("records")] = 256
    """How many of its records are used."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a start that lacks its data, or takes the sites' records for them."""
        super().check(config, adapter)
        if not self.data:
            raise ConfigError(f"adapter.start {self.name!r} needs start.data: name a public data set or file")
        if self.data == config.data.name:
            raise ConfigError(
                f"start.data is {self.data!r}, the run's own data.name, whose records simulated sites divide: they "
                "would be used without a charge; name another public data set or file"
            )
        if self.data == config.data.test:
            raise ConfigError(
                f"start.data and data.test are both {self.data!r}: what is made from the test records cannot be scored "
                "on them; name another public data set or file"
            )
        for key, name in (("data.name", config.data.name), ("data.test", config.data.test)):
            if share_sentences(self.data, name):
                raise ConfigError(
                    f"start.data {self.data!r} shares sentences with {key} {name!r}, so it is not public to this run: "
                    "name another"
                )

    def check_public(self, config: RunConfig) -> str:
        """Refuse records that stand among the run's, and say what they were compared with and which they are."""
        used = Dataset(self.data, *self._used(config))
        texts = [text for example in used.examples for text in example.texts()]
        compared = check_apart(self.data, texts, config.data, config.model.task, "start.data")
        comparison = compared if texts else "not compared with the run's, since they hold no words"
        return (
            f"the {counted(len(used.examples), 'record')} of start.data are public by the coordinator's word (SHA-256 "
            f"{used.fingerprint()}); they were {comparison}"
        )

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the gradient is there."""
        return seeded(place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``G``, shape (out, in), of every adapted layer."""
        return gradient_layout(model)

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return the mean gradient over a seeded choice of the public records."""
        used, names = self._used(config)
        if names != labels.names:
            raise ConfigError(
                f"the public data {self.data!r} have the labels {', '.join(names)}, "
                f"the run has {', '.join(labels.names)}"
            )
        records = model.prepare(used)
        budget = choose_batch_tokens(config.training.batch_tokens, model.device)
        return self.measure(model, model.length_batches(records, budget))

    def _used(self, config: RunConfig) -> tuple[tuple[Example, ...], tuple[str, ...]]:
        """Return a seeded choice of the public records, and the names of their labels."""
        data = load_dataset(config.data, config.model.task, self.data)
        order = torch.randperm(len(data.examples), generator=stream(config.seed, "public-gradient")).tolist()
        return tuple(data.examples[i] for i in order[: self.records]), data.label_names

    def measure(self, model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
        """Return the mean of the records' gradients."""
        return mean_gradient(model, parts)


@dataclass(frozen=True)
class PublicGradient(FromRecords):
    """B R A is the best rank-r part of one sign step down the public records' mean gradient."""

    name: ClassVar[str] = "public-gradient"

    step: Annotated[float, POSITIVE, RATIO] = 1e-3
    """Length of the first sign step that is imitated: LoRA-SB's eta."""

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return B, A and R of LoRA-SB's algorithm 1."""
        return gradient_basis(statistic["G"], rank, self.step, sign=True)

"""Score the global adapter on the server's public held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from common.data import public_test
from common.model import FederatedModel, Score, model_of
from common.tasks import Record
from common.types import AdapterState
from strategies import Job


class Evaluator:
    """The server's model and its public test records. Nothing private comes near it."""

    def __init__(self, job: Job) -> None:
        test = public_test(job.config.data, job.config.model.task)
        config = job.config
        self.label_names = test.label_names
        self.model: FederatedModel = model_of(
            config.model, job.adapter, config.head, config.seed, test.label_names, config.device, config.precision
        )
        self.start: AdapterState = self.model.read()
        self.records: Sequence[Record] = self.model.tokenise(test.examples)

    def trained_start(self) -> AdapterState:
        """Return the part of the start that sites train: its layout is what they may send."""
        trained = self.model.trained()
        return {
            layer: {name: tensor for name, tensor in factors.items() if name in trained.get(layer, {})}
            for layer, factors in self.start.items()
            if layer in trained
        }

    def score(self, adapter: AdapterState) -> Score:
        """Return accuracy and loss of the model under ``adapter``."""
        self.model.write(adapter)
        return self.model.score(self.records)

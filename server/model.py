"""The server's model: where the adapter starts, what a site may send, a public gradient, the score on public data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.adapters.base import layer_shape
from common.data.sources import load_dataset, public_test
from common.errors import ConfigError
from common.messages.state import AdapterState
from common.messages.wire import Layout, layout_of
from common.model.batching import length_batches
from common.model.device import choose_batch_tokens
from common.model.federated import FederatedModel, Score, model_of
from common.randomness import stream
from common.tasks import Record
from strategies.base import GradientSource
from strategies.job import Job


class ServerModel:
    """The base model with the run's adapter at the server, and the public test records. Nothing private comes near it.

    It knows the start of the adapter and the layout of replies, takes the public gradient that some strategies start
    from, scores every round's adapter, and holds the model that is exported.
    """

    def __init__(self, job: Job) -> None:
        test = public_test(job.config.data, job.config.model.task)
        config, self.job = job.config, job
        self.label_names = test.label_names
        self.model: FederatedModel = model_of(
            *(config.model, job.adapter, config.head, config.seed),
            *(test.label_names, test.label_phrases, config.device, config.precision),
        )
        self.start: AdapterState = self.model.start
        self.records: Sequence[Record] = self.model.prepare(test.examples)

    def trained_start(self) -> AdapterState:
        """Return the part of the start that sites train: its layout is what they may send."""
        trained = self.model.trained()
        return {
            layer: {name: tensor for name, tensor in factors.items() if name in trained.get(layer, {})}
            for layer, factors in self.start.items()
            if layer in trained
        }

    def reply_layout(self, round_number: int) -> Layout:
        """Return names and shapes of what a site may send in a round."""
        if round_number == 0:
            layers = self.model.adapter.layers(self.model.peft_model)
            return {name: {"G": layer_shape(layer)} for name, layer in layers.items()}
        return layout_of(self.job.strategy.uplink(self.trained_start()))

    def public_gradient(self, source: GradientSource) -> AdapterState:
        """Return the mean full gradient over public records, for a strategy that starts from it."""
        from common.starts.gradient import mean_gradient  # It brings Opacus, for this initialisation only.

        config = self.job.config
        data = load_dataset(config.data, config.model.task, source.public_data)
        if data.label_names != self.label_names:
            raise ConfigError(
                f"the public data {source.public_data!r} have the labels {', '.join(data.label_names)}, "
                f"the run has {', '.join(self.label_names)}"
            )
        order = torch.randperm(len(data.examples), generator=stream(config.seed, "public-gradient")).tolist()
        records = self.model.prepare([data.examples[i] for i in order[: source.public_records]])
        self.model.write(self.start)
        budget = choose_batch_tokens(config.training.batch_tokens, self.model.device)
        groups = length_batches([self.model.task.size(record) for record in records], budget)
        return mean_gradient(self.model, (self.model.batch([records[i] for i in group]) for group in groups))

    def score(self, adapter: AdapterState) -> Score:
        """Return accuracy and loss of the model under ``adapter``."""
        self.model.write(adapter)
        return self.model.score(self.records)

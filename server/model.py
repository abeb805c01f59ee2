"""The server's model: where the adapter starts, what a site may send, a public statistic, the score on public data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedveil.common.data.sources import public_test, slice_of, slices_of
from fedveil.common.derived import Source, merged, sources_in
from fedveil.common.errors import ModelError
from fedveil.common.messages.blocks import Layout, layout_of
from fedveil.common.messages.columns import narrowed_layout
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.head import phrases_of
from fedveil.common.model.public_features import with_features
from fedveil.common.model.score import Score
from fedveil.common.starts import Labels
from fedveil.common.tasks import TASKS, Record, wording_of
from fedveil.common.tasks.examples import Example
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState


class ServerModel:
    """The base model with the run's adapter at the server, and the public test records. Nothing private comes near it.

    It knows the start of the adapter and the layout of replies, takes the public statistic that some starts are
    made from, scores every round's adapter, and holds the model that is exported.
    """

    def __init__(self, job: Job, *, scores: bool = True) -> None:
        """Load the model and the public test records.

        Args:
            job: of the run.
            scores: whether it is more than shapes that are asked for: else the head starts at zeros, and no test
                record is prepared.
        """
        if not scores:
            job = replace(job, config=replace(job.config, head=replace(job.config.head, start="zeros")))
        test = public_test(job.config.data, job.config.model.task)
        self.job = job
        self.label_names, self.label_phrases = test.label_names, test.label_phrases
        self.model: FederatedModel = job.model(test.label_names, test.label_phrases)
        self.start: AdapterState = self.model.start
        self.public_words = ""
        """What there is to say of the start's public text, in words; empty: nothing."""
        self.statistic_words = ""
        """What there is to say of the sites' statistic, in words; empty: nothing."""
        counted = TASKS[job.config.model.task].counted
        self.slice_names = slices_of(test, job.config.data.slice) if counted else ()
        self._slices = [self.slice_names.index(slice_of(example)) for example in test.examples if self.slice_names]
        self.records: Sequence[Record] = self.model.prepare(test.examples) if scores else ()
        if len(self.model.featurise(self.records)) < len(self.records):
            raise ModelError(
                f"{self.model.base.name!r} cannot compute some of the public test records: the server's log says where"
            )

    @property
    def earlier(self) -> list[Source]:
        """Earlier runs whose releases the run begins with, each once.

        Raises:
            DataError: a model or a library does not say them as they were written.
        """
        model = self.model
        own = sources_in(model.base.module.config.to_dict())  # type: ignore[union-attr,operator]
        return merged([*own, *self.job.origin.sources(), *model.module.earlier])

    def trained_start(self) -> AdapterState:
        """Return the part of the start that sites train: its layout is what they may send."""
        trained = self.model.trained()
        return {
            layer: {name: tensor for name, tensor in factors.items() if name in trained.get(layer, {})}
            for layer, factors in self.start.items()
            if layer in trained
        }

    def reply_layout(self, round_number: int, state: ServerState | None = None) -> Layout:
        """Return names and shapes of what a site may send in a round, whole; from a state, of what it then trains."""
        if round_number == 0:
            return self.job.origin.layout(self.model)
        whole = layout_of(self.job.sent(round_number, self.trained_start()))
        return narrowed_layout(whole, self.job.trained_columns(state)) if state else whole

    def public_statistic(self) -> AdapterState:
        """Return the statistic that the run's start asks the server for, of public records.

        Raises:
            ConfigError, DataError: they do not fit the run, cannot be read, or are no public text for it.
        """
        self.public_words = self.job.origin.check_public(self.job.config)
        self.model.write(self.start)
        return self.job.origin.from_public(self.model, self.job.config, self._labels())

    def completed(self, statistic: AdapterState) -> AdapterState:
        """Return the sites' mean statistic with what the run's start adds to it from public records."""
        self.model.write(self.start)
        return self.job.origin.complete(self.model, self.job.config, self._labels(), statistic)

    def around_head(self, state: ServerState) -> ServerState:
        """Return the state with the frozen factors that the run's start makes around the head as it is now.

        They follow from the state and public text, so the same come of it again. The adapter has not moved yet: it adds
        nothing, before and after.
        """
        self.model.write(state.adapter)
        made = self.job.origin.around_head(self.model, self.job.config, self._labels())
        return self.job.renewed(state, made)

    def rule_statistic(self, state: ServerState) -> AdapterState:
        """Return what the run's server rule takes from public text before round 1, as the function does."""
        return rule_statistic(self.job, self.model, state)

    def _labels(self) -> Labels:
        return Labels(self.label_names, tuple(tuple(phrases) for phrases in self._phrases()))

    def calibrated(self, adapter: AdapterState) -> AdapterState:
        """Return ``adapter`` at the scale that suits, by public phrases: about the labels, or FedVeil's own."""
        from fedveil.common.starts.calibration import calibrated
        from fedveil.common.starts.public_text import PACKAGED, known_sha256, read_text

        task = self.model.task
        examples: list[Example] = [
            replace(wording_of(task).phrase(text), label=label)
            for label, texts in enumerate(self._phrases())
            for text in texts
            if task.labelled
        ]
        if not task.labelled:
            examples = [wording_of(task).text(text) for text in read_text(PACKAGED, known_sha256(PACKAGED))]
        return calibrated(self.model, adapter, self.model.prepare(examples))

    def _phrases(self) -> list[Sequence[str]]:
        return phrases_of(self.job.config.head, self.label_names, self.label_phrases)

    def score(self, adapter: AdapterState) -> Score:
        """Return accuracy and loss of the model under ``adapter``; while that rests, by the features that it had."""
        self.model.write(adapter)
        below = self.model.module.head is not None and self.model.task.labelled and not self.model.head_only
        return self.model.score(self.records, self._slices, with_features(self.model, self.records) if below else ())


def rule_statistic(job: Job, model: FederatedModel, state: ServerState) -> AdapterState:
    """Return what a run's server rule takes from public text before round 1.

    Args:
        job: the run.
        model: the run's, whatever was written into it.
        state: any of the run's: the factors that no site trains are those of its start, or made again after the head's
            rounds.

    Raises:
        DataError, ModelError: the text cannot be read, is not public to the run, or says nothing.
    """
    frozen = {
        layer: {n: t for n, t in state.adapter[layer].items() if n in factors and not state.trains(layer, n)}
        for layer, factors in model.start.items()
        if layer in state.adapter
    }
    model.write(merge(model.start, frozen))
    return job.rule.measure(model, job.config)

"""The model of a run: frozen base, attached adapter, and a head where the task has one.

Server and sites build it from the same configuration and get bit-identical tensors; afterwards
only adapter states move. It is built once per process (``model_of``) and rewritten every round.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters import Adapter
from fedveil.common.adapters.attach import attach, write_factors
from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.split import split_columns
from fedveil.common.config.sections import HeadConfig, ModelConfig
from fedveil.common.errors import ConfigError, ModelError, ProtocolError
from fedveil.common.log import place_of
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import HEAD, METRIC, OWN, AdapterState
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import (
    autocast,
    choose_attention,
    choose_batch_tokens,
    choose_device,
    choose_precision,
    choose_private_tokens,
)
from fedveil.common.model.lowered import lowered
from fedveil.common.model.recomputed import computed_once, recompute_layers
from fedveil.common.model.score import Score
from fedveil.common.model.shapes import FixedBatch, Shapes
from fedveil.common.tasks import TASKS, Batch, Record, Task, wording_of
from fedveil.common.tasks.base import OWNER
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.featured import FEATURES, TANGENTS, Collator, FeatureCollator, put_features
from fedveil.common.tasks.module import Metric
from fedveil.common.tasks.tangent import Tangent
from fedveil.privacy.randomness import stream

log = logging.getLogger("fedveil.site")


class FederatedModel:
    """A model whose adapter state can be read, written, trained and scored."""

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        task: Task,
        head: HeadConfig,
        *,
        seed: int,
        label_names: Sequence[str] = (),
        label_phrases: Sequence[Sequence[str]] = (),
        feature_scale: float = 0.0,
        max_length: int = 128,
        device: str = "auto",
        precision: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.base, self.adapter = base, adapter
        self.max_length = task.limit(base, max_length)
        self.classes = len(label_names)
        self.device = choose_device(device)
        tokens = choose_private_tokens(self.device)
        self.head_only = not adapter.trained
        """Whether sites train the head alone, so that what is below it says the same of a record in every round."""
        self.task = task
        self.feature_shapes = task.shapes(base, self.max_length, tokens)
        """What features are computed in where the head alone is trained; ``client.rehearsal`` narrows it alike."""
        self.precision = choose_precision(precision, self.device)
        choose_attention(base.module, self.device)
        self.lowers = True
        """Whether ``many_passes`` lowers weights; off for a model that leaves autocast on its own."""
        self.peft_model = attach(adapter, base.module, seed)
        self.module = task.module(self.peft_model, base, self.classes if task.labelled else 0, feature_scale)
        self.module.to(self.device)
        self.collator: Collator = FeatureCollator(task, self.module.width) if self.head_only else task
        self.shapes = self.collator.shapes(base, self.max_length, tokens)
        """What private gradients are computed in; ``client.rehearsal`` narrows it where the device demands that."""
        self.initial_shapes: Shapes | None = None
        """The same of round 0, once it is rehearsed."""
        self.vector_shapes: dict[tuple[int, ...], Shapes] = {}
        """The same inside ``head_alone`` and ``linearised``, once entered, by the shape of a record's tangents."""
        self.head_trained = head.policy == "trained"
        if self.module.head is not None:
            start_head(self, self.module.head, head, seed, phrases_of(head, label_names, label_phrases))
            self.module.head.requires_grad_(self.head_trained)
            if head.metric == "public":
                self.module.metric = Metric(self.module.width).to(self.device)
        _turn_dropout_off(self.module)
        if checkpointing:
            recompute_layers(self.peft_model, base.name)
        self.statistic: Callable[[Batch], Tensor] | None = None
        """While a start measures: what stands in place of the records' losses after each pass, shape (records,)."""
        self.start: AdapterState = self.read()
        """The adapter state before any training; later states are written over the model, never over this."""

    @property
    def head(self) -> dict[str, nn.Parameter]:
        """The live parameters of the head, trained or not; empty where the task has none."""
        return dict(self.module.head.named_parameters()) if self.module.head is not None else {}

    @property
    def folded_head(self) -> dict[str, Tensor]:
        """The head as a stock model takes it, on features as they are; empty where the task has none."""
        head, metric = self.module.head, self.module.metric
        return {k: p.detach() for k, p in self.head.items()} if metric is None or head is None else metric.folded(head)

    def places(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the live parameters behind a full adapter state, by layer and factor.

        The head is part of the state only when it is trained: a frozen one never travels.
        """
        places = parameters_of(self.adapter, self.peft_model)
        if self.head_trained and self.head:
            places[HEAD] = self.head
        if self.module.metric is not None:
            places[METRIC] = dict(self.module.metric.named_parameters())
        return places

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the part of ``places`` that sites train: exactly what is clipped and noised.

        Inside ``linearised`` that is the way from the point, whose numbers stand in the order of ``below_head``.
        """
        if self.module.tangent is not None:
            return {TANGENTS: {"step": self.module.tangent.step}}
        kept = {
            layer: {name: p for name, p in factors.items() if p.requires_grad}
            for layer, factors in self.places().items()
        }
        return {layer: factors for layer, factors in kept.items() if factors}

    def read(self) -> AdapterState:
        """Return a copy of all factors, and of the head when it is trained (float32, CPU)."""
        return {
            layer: {name: p.detach().float().cpu().clone() for name, p in factors.items()}
            for layer, factors in self.places().items()
        }

    def write(self, state: AdapterState) -> None:
        """Copy ``state``, any part of a full one, into the model.

        Raises:
            ProtocolError: a name or a shape does not fit; nothing is written then.
        """
        places = self.places()
        own = [(layer, name, tensor) for layer in OWN for name, tensor in state.get(layer, {}).items()]
        for layer, name, tensor in own:
            if name not in places.get(layer, {}) or places[layer][name].shape != tensor.shape:
                raise ProtocolError(f"the model has no {layer} tensor {name!r} of shape {tuple(tensor.shape)}")
        write_factors(self.adapter, self.peft_model, {k: v for k, v in state.items() if k not in OWN})
        with torch.no_grad():
            for layer, name, tensor in own:
                places[layer][name].copy_(tensor)

    def prepare(self, examples: Sequence[Example]) -> list[Record]:
        """Return records as the model takes them, cut to the run's ``max_length``, or to what has room in it."""
        return self.task.prepare(self.base, examples, self.max_length)

    def featurise(self, records: Sequence[Record], before_pass: Callable[[], None] = lambda: None) -> list[Record]:
        """Put into each record, in place of what it was read as, the features that a head alone is trained on.

        Each is computed in a shape that follows from the record alone, and once: a record that has its features keeps
        them. One that cannot be computed stays as it was read, so that the next call tries again. Where more than the
        head is trained, nothing happens.

        Args:
            records: as of ``prepare``.
            before_pass: called before each pass, and may raise.

        Returns:
            The records to train on, in order; one that could not be computed is left out, which is to contribute zero.
        """
        if not self.head_only:
            return list(records)
        left = [record for record in records if FEATURES not in record]
        for length, group in self.feature_shapes.groups([self.collator.size(record) for record in left]):
            chosen = [left[i] for i in group]
            self._featurise(chosen, self.fixed_batch(chosen, length, self.feature_shapes.rows_of(length)), before_pass)
        return [record for record in records if FEATURES in record]

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """Return what the head sees of a batch's records, shape (records, hidden), under the run's precision."""
        with autocast(self.device, self.precision):
            features = self.module.features(batch)
        return features[: batch.records] if isinstance(batch, FixedBatch) else features

    def _featurise(self, records: Sequence[Record], batch: FixedBatch, before_pass: Callable[[], None]) -> None:
        """Put features into ``records``, of which ``batch`` is made; if the pass fails, each passes alone in it."""
        before_pass()
        try:
            features = self.features(batch)
        except Exception as error:
            if batch.records == 1:
                log.warning("a record could not be computed and contributes zero: %s", place_of(error))
                return
            for row, record in enumerate(records):
                self._featurise([record], batch.alone(row), before_pass)
            return
        put_features(records, batch, features)

    def batch(self, records: Sequence[Record]) -> Batch:
        """Return ``records`` as tensors on the model's device."""
        return {k: v.to(self.device) for k, v in self.collator.collate(self.base, _bare(records)).items()}

    def fixed_batches(self, records: Sequence[Record], shapes: Shapes | None = None) -> Iterator[FixedBatch]:
        """Yield ``records`` in batches whose shapes follow from each record alone, by ``shapes`` or the model's own."""
        for batch, _ in self.fixed_groups(records, shapes):
            yield batch

    def fixed_groups(
        self, records: Sequence[Record], shapes: Shapes | None = None
    ) -> Iterator[tuple[FixedBatch, list[int]]]:
        """Yield the same with the positions of each batch's records; of one length they keep their order."""
        shapes = shapes or self.shapes
        for length, group in shapes.groups([self.collator.size(record) for record in records]):
            yield self.fixed_batch([records[i] for i in group], length, shapes.rows_of(length)), group

    def length_batches(self, records: Sequence[Record], budget: int) -> Iterator[Batch]:
        """Yield ``records`` in batches of like length, each of at most ``budget`` tokens (``length_batches``)."""
        for group in length_batches([self.collator.size(record) for record in records], budget):
            yield self.batch([records[i] for i in group])

    def fixed_batch(self, records: Sequence[Record], length: int, rows: int) -> FixedBatch:
        """Return ``records`` (at least one, at most ``rows``) as ``rows`` rows of ``length`` tokens."""
        records = _bare(records)
        filler = [self.collator.filler(self.base, records[0])] * (rows - len(records))
        tensors = self.collator.collate(self.base, [*records, *filler], length)
        moved = {key: value.to(self.device) for key, value in tensors.items()}
        return FixedBatch(moved, len(records))

    @property
    def attention(self) -> str:
        """How the base model computes attention, as transformers calls it."""
        return str(self.base.module.config._attn_implementation)  # type: ignore[union-attr]

    @contextmanager
    def head_alone(self) -> Iterator[None]:
        """Let the head alone take a gradient, on features of the model as it is; put all back afterwards.

        Inside it ``featurise`` computes features, and records that have them pass in one shape.

        Raises:
            ModelError: the model has no head.
        """
        with self._on_vectors(()):
            self._needed_head().requires_grad_(True)
            yield

    @contextmanager
    def linearised(self, around: AdapterState) -> Iterator[dict[str, dict[str, nn.Parameter]]]:
        """Let the way from ``around`` take a gradient in place of the adapter; the head stays.

        Inside it records have features and tangents, both of the model at ``around`` (``client.linearised``), and pass
        in one shape, and the logits are linear in what is trained. Afterwards the adapter is as far from ``around`` as
        the way was made, unless an error ended the context.

        Args:
            around: the trained tensors of every adapted layer at the point of linearisation.

        Yields:
            What is trained, by layer and factor.

        Raises:
            ModelError: the model has no head, or trains nothing below it.
        """
        below = self.below_head()
        if not below:
            raise ModelError("nothing below the head is trained, so there is nothing to linearise")
        begun = torch.cat([around[layer][name].flatten() for layer, name in below]).to(self.device)
        tangent = Tangent(len(begun)).to(self.device)
        with torch.no_grad():
            way = torch.cat([p.flatten() for p in below.values()]) - begun
            tangent.step.copy_(way)
        with self._on_vectors((self.classes - 1, len(tangent.step))):
            self.module.tangent = tangent
            try:
                yield self.trained()
            finally:
                self.module.tangent = None
        with torch.no_grad():
            moved = (tangent.step - way).split([p.numel() for p in below.values()])
            for parameter, part in zip(below.values(), moved, strict=True):
                parameter.add_(part.view_as(parameter))

    def columns_alone(self, chosen: Chosen | None) -> AbstractContextManager[None]:
        """Let the chosen columns alone take a gradient in place of the adapter; the head stays as it is.

        Inside it ``trained`` has these columns alone, and afterwards every factor is whole again, with what was trained
        in it.

        Args:
            chosen: by layer and factor; None: every trained tensor whole, so that nothing happens.
        """
        return nullcontext() if chosen is None else split_columns(self.adapter, self.peft_model, chosen)

    def below_head(self) -> dict[tuple[str, str], nn.Parameter]:
        """Return what sites train but for the head, by layer and factor, in the order of a tangent's numbers."""
        trained = self.trained()
        return {
            (layer, name): trained[layer][name]
            for layer in sorted(trained)
            if layer != HEAD
            for name in sorted(trained[layer])
        }

    def _needed_head(self) -> nn.Linear:
        if self.module.head is None:
            raise ModelError(f"the task {self.task.name!r} has no head that could be trained alone")
        return self.module.head

    @contextmanager
    def _on_vectors(self, tangents: tuple[int, ...]) -> Iterator[None]:
        """Take records as vectors, and no gradient anywhere; put all back afterwards."""
        self._needed_head()
        before = [(p, p.requires_grad) for p in self.module.parameters()]
        collator, shapes, only = self.collator, self.shapes, self.head_only
        self.module.requires_grad_(False)
        self.collator, self.head_only = FeatureCollator(self.task, self.module.width, tangents), True
        self.shapes = self.vector_shapes.get(tangents) or self.collator.shapes(self.base, self.max_length, 0)
        try:
            yield
        finally:
            self.vector_shapes[tangents] = self.shapes
            self.collator, self.shapes, self.head_only = collator, shapes, only
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)
                parameter.grad = None

    def computed_once(self) -> AbstractContextManager[None]:
        """Return the context in which no layer is computed again in the backward pass."""
        return computed_once(self.peft_model)

    def many_passes(self) -> AbstractContextManager[None]:
        """Return the context of many passes in a row: frozen weights are in the run's precision inside it."""
        # The head computes in float32, outside autocast.
        return lowered(self.peft_model, self.precision if self.lowers else torch.float32)

    def losses(self, batch: Batch) -> Tensor:
        """Return one loss per record under the run's precision, shape (records,), float32; filler has none."""
        with autocast(self.device, self.precision):
            losses = self.task.sums(self.module, batch).losses
        if self.statistic is not None:
            losses = self.statistic(batch)
        return losses[: batch.records] if isinstance(batch, FixedBatch) else losses

    def score(self, records: Sequence[Record], slices: Sequence[int] = ()) -> Score:
        """Return accuracy and mean loss on ``records`` (at least one); ``slices`` as of score_records."""
        return score_records(
            self.module,
            self.task,
            self.base,
            records,
            self.device,
            self.precision,
            slices=slices,
            collator=self.collator,
        )


def _bare(records: Sequence[Record]) -> list[Record]:
    """Return records without whose they are, which no batch has."""
    return [{k: v for k, v in record.items() if k != OWNER} if OWNER in record else record for record in records]


@torch.no_grad()
def score_records(
    module: nn.Module,
    task: Task,
    base: BaseModel,
    records: Sequence[Record],
    device: torch.device,
    precision: torch.dtype,
    batch_tokens: int = 0,
    slices: Sequence[int] = (),
    collator: Collator | None = None,
) -> Score:
    """Return accuracy and mean loss of any module of the task's kind on ``records`` (at least one).

    ``slices`` are each record's slice of the test data, by its number; empty: there is none. ``collator`` makes the
    batches; None: the task does.
    """
    collator = collator or task
    was_training = module.training
    module.eval()
    totals, right, of_label = torch.zeros(3, dtype=torch.float64), Counter[int](), Counter[int]()
    slice_right, of_slice = Counter[int](), Counter(slices)
    for group in length_batches(
        [collator.size(record) for record in records], choose_batch_tokens(batch_tokens, device)
    ):
        batch = {k: v.to(device) for k, v in collator.collate(base, [records[i] for i in group]).items()}
        with autocast(device, precision):
            sums = task.sums(module, batch)
        totals += torch.stack([sums.loss.sum(), sums.correct.sum(), sums.weight.sum()]).double().cpu()
        if task.counted:
            labels = batch["labels"].tolist()
            of_label.update(labels)
            right.update(label for label, hit in zip(labels, sums.correct.tolist(), strict=True) if hit)
            slice_right.update(slices[i] for i, hit in zip(group, sums.correct.tolist(), strict=True) if slices and hit)
    module.train(was_training)
    loss, correct, weight = totals.tolist()
    by_label = range(max(of_label, default=-1) + 1)
    return Score(
        accuracy=correct / weight,
        loss=loss / weight,
        right=tuple(right[label] for label in by_label),
        records=tuple(of_label[label] for label in by_label),
        slice_right=tuple(slice_right[number] for number in sorted(of_slice)),
        slice_records=tuple(of_slice[number] for number in sorted(of_slice)),
    )


def _turn_dropout_off(module: nn.Module) -> None:
    # Per-record gradients need train mode, but the base is frozen: its dropout would only add
    # noise that no one accounts for.
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        for child in module.modules():
            if hasattr(getattr(child, "config", None), name):
                setattr(child.config, name, 0.0)
            if isinstance(getattr(child, "attention_dropout", None), float):
                child.attention_dropout = 0.0  # type: ignore[assignment]


@torch.no_grad()
def start_head(
    model: FederatedModel, linear: nn.Linear, head: HeadConfig, seed: int, phrases: Sequence[Sequence[str]]
) -> None:
    """Set the classification head's start; uses no record, so it costs no privacy.

    ``label-words`` writes into each row how the base model's features of public phrases about
    that label differ from their mean over labels, scaled to ``head.margin``; the bias makes a record
    whose features are that mean equally likely for all labels.

    Raises:
        ConfigError: the base model cannot tell the labels' phrases apart, and the head is frozen.
    """
    linear.bias.zero_()
    linear.weight.zero_()
    if head.start == "random":
        rows = torch.randn(linear.weight.shape, generator=stream(seed, "head"))
        linear.weight.copy_(F.normalize(rows, dim=-1))
    elif head.start == "label-words":
        model.module.eval()
        means = torch.stack([_mean_features(model, texts) for texts in phrases])
        centred = means - means.mean(0)
        # A label's logit on its own features leads the mean of the others by |row|² C / (C - 1).
        lead = centred.pow(2).sum(1).mean() * len(phrases) / max(1, len(phrases) - 1)
        told_apart = bool(lead > 1e-12)
        if head.policy == "frozen" and not told_apart:
            # Through a head that stays zero every adapter gradient is zero: sites would pay for sending noise.
            raise ConfigError(
                f"{model.base.name!r} cannot tell the labels' phrases apart, so the head starts at zero, and a frozen "
                "one trains no adapter: set head.phrases to other words, head.start to 'random' or head.policy to "
                "'trained'"
            )
        linear.weight.copy_(centred * (head.margin / lead) if told_apart else torch.zeros_like(centred))
        linear.bias.copy_(-linear.weight @ means.mean(0))


def phrases_of(
    head: HeadConfig, label_names: Sequence[str], label_phrases: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """Return the phrases about each label: those configured, else the data set's own, else the names.

    Raises:
        ConfigError: there are phrases for another number of labels than the data have.
    """
    if not head.phrases:
        return list(label_phrases) or [[name] for name in label_names]
    phrases: list[Sequence[str]] = [part.split("|") for part in head.phrases.split(";")]
    if len(phrases) != len(label_names):
        raise ConfigError(
            f"head.phrases speaks of {len(phrases)} labels, the data have {len(label_names)} "
            f"({', '.join(label_names)}): separate labels by ';' and phrases of one label by '|'"
        )
    return phrases


def _mean_features(model: FederatedModel, phrases: Sequence[str]) -> Tensor:
    records = model.prepare([wording_of(model.task).phrase(phrase) for phrase in phrases])
    # One phrase at a time and in float32: the start must not depend on batching or on the device's precision.
    features = torch.cat([model.module.features(model.batch([record])) for record in records])
    return features.mean(0)


@lru_cache(maxsize=1)
def model_of(
    config: ModelConfig,
    adapter: Adapter,
    head: HeadConfig,
    seed: int,
    label_names: tuple[str, ...],
    label_phrases: tuple[tuple[str, ...], ...],
    device: str,
    precision: str,
    files: str,
) -> FederatedModel:
    """Return this process's model for these settings, built on the first call and then kept.

    The next user writes its own state over what the last one left, so nothing carries over.
    """
    return FederatedModel(
        load_base_model(config.name, config.task, head.pool, config.quantise, files),
        adapter,
        TASKS[config.task].with_pool(head.pool),
        head,
        seed=seed,
        label_names=label_names,
        label_phrases=label_phrases,
        feature_scale=config.feature_scale,
        max_length=config.max_length,
        device=device,
        precision=precision,
        checkpointing=config.checkpointing,
    )

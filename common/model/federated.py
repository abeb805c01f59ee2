"""The model of a run: frozen base, attached adapter, and a head where the task has one.

Server and sites build it from the same configuration and get bit-identical tensors; afterwards
only adapter states move. It is built once per process (``model_of``) and rewritten every round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedveil.common.adapters import Adapter
from fedveil.common.adapters.attach import attach, write_factors
from fedveil.common.adapters.base import parameters_of
from fedveil.common.config.sections import HeadConfig, ModelConfig
from fedveil.common.errors import ProtocolError
from fedveil.common.log import place_of
from fedveil.common.messages.state import HEAD, METRIC, OWN, AdapterState
from fedveil.common.model.base import BaseModel, load_base_model, turn_dropout_off
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import (
    autocast,
    choose_attention,
    choose_device,
    choose_precision,
    choose_private_tokens,
)
from fedveil.common.model.head import set_up_head
from fedveil.common.model.lowered import lowered
from fedveil.common.model.recomputed import recompute_layers
from fedveil.common.model.score import Score
from fedveil.common.model.scoring import score_records
from fedveil.common.model.shapes import FixedBatch, Shapes
from fedveil.common.model.sharing import Sharing, Unshared, unshared
from fedveil.common.tasks import Batch, Record, Task
from fedveil.common.tasks.base import UNBATCHED, WEIGHT
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.featured import FEATURES, TANGENTS, Collator, FeatureCollator, put_features

log = logging.getLogger("fedveil.site")


class FederatedModel:
    """A model whose adapter state can be read, written, trained and scored."""

    head_only: bool
    """Whether sites train the head alone, so that a record has the same features in every round."""
    feature_shapes: Shapes
    """Shapes in which features are computed where the head alone is trained; ``client.rehearsal`` narrows them."""
    lowers: bool = True
    """Whether ``many_passes`` lowers weights; off for a model that leaves autocast on its own."""
    sharing: Sharing = Unshared()
    """What may compute passes on other cores (``client.cores``)."""
    shapes: Shapes
    """Shapes in which private gradients are computed; ``client.rehearsal`` narrows them for some devices."""
    initial_shapes: Shapes | None = None
    """The same of round 0, once it is rehearsed."""
    shown: AdapterState | None = None
    """In round 0, the public tensors that came with its task (``Start.shown``)."""

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
        self.base, self.adapter, self.task = base, adapter, task
        self.max_length, self.classes = task.limit(base, max_length), len(label_names)
        self.device = choose_device(device)
        tokens = choose_private_tokens(self.device)
        self.head_only, self.feature_shapes = not adapter.trained, task.shapes(base, self.max_length, tokens)
        self.precision = choose_precision(precision, self.device)
        choose_attention(base.module, self.device)
        self.peft_model = attach(adapter, base.module, seed)
        classes = self.classes if task.labelled else 0
        self.module = task.module(self.peft_model, base, classes, feature_scale).to(self.device)
        self.collator: Collator = FeatureCollator(task, self.module.width) if self.head_only else task
        self.shapes = self.collator.shapes(base, self.max_length, tokens)
        self.vector_shapes: dict[tuple[int, ...], Shapes] = {}
        """The same of vectors (``common.model.alone``), once used, by the shape of a record's tangents."""
        self.head_trained = head.policy == "trained"
        set_up_head(self, head, seed, label_names, label_phrases)
        turn_dropout_off(self.module)
        if checkpointing:
            recompute_layers(self.peft_model, base.name)
        self.statistic: Callable[[Batch], Tensor] | None = None
        """While a start measures: what replaces the records' losses after each pass, shape (records,)."""
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

        Inside ``step_alone`` that is the step, whose numbers are in the order of ``below_head``.
        """
        if self.module.tangent is not None:
            return {TANGENTS: {"step": self.module.tangent.step}}
        places = self.places().items()
        trained = {layer: {name: p for name, p in factors.items() if p.requires_grad} for layer, factors in places}
        return {layer: factors for layer, factors in trained.items() if factors}

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
        """Replace what each record was read as by its features, if sites train the head alone.

        Each is computed in a shape that follows from the record alone, and once: a record that has its features keeps
        them. One that cannot be computed stays as it was read, so that the next call tries again.

        Args:
            records: of ``prepare``.
            before_pass: called before each pass, and may raise.

        Returns:
            The records to train on, in order; one that could not be computed is left out, which is to contribute zero.
        """
        if not self.head_only:
            return list(records)
        left = [record for record in records if FEATURES not in record]
        groups = dict[int, list[int]]()
        with self.sharing.opened(self, "features") if left else nullcontext(unshared) as share:
            for batch, features in share(self.noted_batches(left, self.feature_shapes, groups), before_pass):
                chosen = [left[i] for i in groups.pop(id(batch))]
                if features is None:
                    self._featurise(chosen, batch, before_pass)
                else:
                    put_features(chosen, batch, features)
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
        tensors = self.collator.collate(self.base, _bare(records)) | _weights(records)
        return {k: v.to(self.device) for k, v in tensors.items()}

    def fixed_batches(self, records: Sequence[Record], shapes: Shapes | None = None) -> Iterator[FixedBatch]:
        """Yield ``records`` in batches whose shapes follow from each record alone, by ``shapes`` or the model's own."""
        for batch, _ in self.fixed_groups(records, shapes):
            yield batch

    def noted_batches(
        self, records: Sequence[Record], shapes: Shapes, groups: dict[int, list[int]]
    ) -> Iterator[FixedBatch]:
        """Yield ``fixed_batches``, and put into ``groups`` the positions of each one's records, by its identity."""
        for batch, group in self.fixed_groups(records, shapes):
            groups[id(batch)] = group
            yield batch

    def fixed_groups(
        self, records: Sequence[Record], shapes: Shapes | None = None
    ) -> Iterator[tuple[FixedBatch, list[int]]]:
        """Yield the same with the positions of each batch's records; those of one length keep their order."""
        shapes = shapes or self.shapes
        sizes = [self.collator.size(record) for record in records]
        for length, group in shapes.groups(sizes):
            yield self.fixed_batch([records[i] for i in group], length, shapes.rows_of(length)), group

    def length_batches(self, records: Sequence[Record], budget: int) -> Iterator[Batch]:
        """Yield ``records`` in batches of like length, each of at most ``budget`` tokens (``length_batches``)."""
        for group in length_batches([self.collator.size(record) for record in records], budget):
            yield self.batch([records[i] for i in group])

    def fixed_batch(self, records: Sequence[Record], length: int, rows: int) -> FixedBatch:
        """Return ``records`` (at least one, at most ``rows``) as ``rows`` rows of ``length`` tokens."""
        weights, records = _weights(records, rows), _bare(records)
        filler = [self.collator.filler(self.base, records[0])] * (rows - len(records))
        tensors = self.collator.collate(self.base, [*records, *filler], length)
        moved = {key: value.to(self.device) for key, value in (tensors | weights).items()}
        return FixedBatch(moved, len(records))

    @property
    def attention(self) -> str:
        """How the base model computes attention, as transformers calls it."""
        return str(self.base.module.config._attn_implementation)  # type: ignore[union-attr]

    def below_head(self) -> dict[tuple[str, str], nn.Parameter]:
        """Return what sites train but for the head, by layer and factor, in the order of a tangent's numbers."""
        trained = self.trained()
        return {
            (layer, name): trained[layer][name]
            for layer in sorted(trained)
            if layer != HEAD
            for name in sorted(trained[layer])
        }

    def many_passes(self) -> AbstractContextManager[None]:
        """Return the context of many passes in a row: frozen weights are in the run's precision inside it."""
        # The head computes in float32, outside autocast.
        return lowered(self.peft_model, self.precision if self.lowers else torch.float32)

    def losses(self, batch: Batch) -> Tensor:
        """Return one loss per record under the run's precision, shape (records,), float32; filler has none.

        That of a row of an unfolded record is multiplied by its weight.
        """
        inputs = {key: value for key, value in batch.items() if key != WEIGHT} if WEIGHT in batch else batch
        with autocast(self.device, self.precision):
            losses = self.task.sums(self.module, inputs).losses
        if WEIGHT in batch:
            losses = losses * batch[WEIGHT].to(losses.dtype)
        if self.statistic is not None:
            losses = self.statistic(batch)
        return losses[: batch.records] if isinstance(batch, FixedBatch) else losses

    def score(self, records: Sequence[Record], slices: Sequence[int] = (), vectors: Sequence[Record] = ()) -> Score:
        """Return accuracy and mean loss on ``records`` (at least one); for all else see score_records."""
        where = self.base, records, self.device, self.precision
        return score_records(self.module, self.task, *where, slices=slices, collator=self.collator, vectors=vectors)


def _bare(records: Sequence[Record]) -> list[Record]:
    """Return records without what no task's batch has, such as whose they are."""
    return [
        {k: v for k, v in record.items() if k not in UNBATCHED} if UNBATCHED & record.keys() else record
        for record in records
    ]


def _weights(records: Sequence[Record], rows: int = 0) -> Batch:
    """Return the weights of rows of unfolded records, those of filler 0; nothing for records as they are."""
    if not records or WEIGHT not in records[0]:
        return {}
    filler = [0.0] * (rows - len(records))
    return {WEIGHT: torch.tensor([*(record[WEIGHT] for record in records), *filler], dtype=torch.float64)}


@lru_cache(maxsize=1)
def model_of(
    config: ModelConfig,
    task: Task,
    adapter: Adapter,
    head: HeadConfig,
    seed: int,
    label_names: tuple[str, ...],
    label_phrases: tuple[tuple[str, ...], ...],
    device: str,
    precision: str,
    files: str,
) -> FederatedModel:
    """Return this process's model for these settings; its next user writes over all that the last one left."""
    return FederatedModel(
        load_base_model(config.name, task, head.pool, config.quantise, files),
        adapter,
        task.with_pool(head.pool),
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

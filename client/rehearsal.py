"""The rehearsal: made-up records pass first, and what cannot be trained privately is refused, unpaid.

The account assumes that a record adds its own clipped gradient to a sum and changes nothing else. Not every
model keeps to that: one may project something shared beside the records, scale positions by the longest record of
a batch, or remember what passed before. So, on records that are no one's, with factors away from zero:

1. **No record moves another.** Short, middle and longest records in row 0 and in the last row of a batch, in float32:
   each gradient is that of the record alone, without hooks and in the same shape, to 1e-4 of it.
2. **To the last bit.** In the run's own precision, for every shape that the run can use, in ascending and then in
   descending order: a record that fills a batch has one gradient in all its rows, and the same behind shorter ones.
   Where a device cannot do that, with that many threads, fewer rows are tried, at last one: no other record is there.
   A model of few numbers may round one record equally by chance where it does not the next, so it is shown several.
   Where shapes inside a pass follow from what the records hold, as with experts, no row has another beside it.
3. **It fits.** Every shape of 2 is a full one, so memory that does not suffice shows here and not after the charge.

Scales, head, metric and factors are the rehearsal's own: a server could choose some under which nothing shows.

Left to the round, such a model would be refused after the charge, at every retry again, or not at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedveil.client.comparison import ComparedSteps, FeatureSteps, LossSteps, check_own
from fedveil.client.exact_shapes import settle_shapes
from fedveil.client.made_up import AWAY, away_from_zero, in_float32, inventor, made_up_rows, whole_inventor
from fedveil.client.timing import Timing
from fedveil.common.errors import MechanismError, ModelError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.alone import columns_alone, head_alone, step_alone
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.recomputed import computed_once
from fedveil.common.model.shapes import FixedBatch, Shapes
from fedveil.common.starts import PaidStart
from fedveil.common.starts.gradient import initial_shapes
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import unfolds
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.entropy import rehearsal_entropy
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream

FEW, SHOWN = 1_000_000, 8
"""Numbers of a base model below which so many records fill by turns a batch whose rows are no multiple of 4. Of a tiny
ViT in 22 rows that a CPU computes unequally 8 of 12 records show it, and of MiniLM (22 million) each of 12, in float32
and in bfloat16."""
ROWS = 3
"""Rows of the batches in which gradients are compared with those of a record alone."""
_PLAN = gaussian_plan(
    clip_norm=1.0, noise_multiplier=1.0, sample_rate=1.0, expected_batch_size=1.0, delta=1e-5, max_epsilon=1.0
)
log = logging.getLogger("fedveil.site")


def rehearse(model: FederatedModel) -> Timing:
    """Check the plain steps and time them; afterwards ``model.shapes`` are shapes that this device computes rightly.

    Nothing is released, and nothing else of the model changes.

    Raises:
        ModelError: the model cannot be trained privately; the message says why.
    """
    return _Rehearsal(model).run()


def rehearse_columns(model: FederatedModel, chosen: Chosen) -> Timing:
    """Check the steps on chosen columns, in layers of their shapes, the others staying; as ``rehearse``."""
    with away_from_zero(model), columns_alone(model, chosen):
        return _Rehearsal(model).run()


def rehearse_initial(model: FederatedModel, start: PaidStart) -> Timing:
    """Check round 0, whose gradient is that of what ``start`` is made from, or else its losses; as ``rehearse``."""
    if start.on_losses:
        return _OfLosses(model).run()
    with start.opened(model):
        return (_Rehearsal if start.on_features else _OfStart)(model).run()


def rehearse_features(model: FederatedModel) -> Timing:
    """Check the features that a head alone is trained on: they are a record's own as its gradient is; as ``rehearse``.

    Afterwards ``model.feature_shapes`` are shapes that this device computes rightly.
    """
    return _OfFeatures(model).run()


def rehearse_linearised(model: FederatedModel) -> Timing:
    """Check the steps on vectors (``client.linearised``), whose derivatives ``rehearse`` has seen; as ``rehearse``."""
    around: AdapterState = {}
    for (layer, name), p in model.below_head().items():
        away = AWAY * torch.randn(p.shape, generator=stream(0, "rehearsal", layer, name))
        around.setdefault(layer, {})[name] = p.detach() + away.to(p.device)
    with step_alone(model, around):
        return _Rehearsal(model).run()


def rehearse_head(model: FederatedModel) -> Timing:
    """Check the steps on features (``client.head_alone``), which ``rehearse_features`` has seen; as ``rehearse``."""
    with head_alone(model):
        return _Rehearsal(model).run()


class _Rehearsal:
    """One model, with the parameters that require a gradient as the trained ones."""

    what: ClassVar[str] = "gradient"
    """What of a record is compared."""

    def __init__(self, model: FederatedModel) -> None:
        self.model = model
        self.trained = [p for p in model.module.parameters() if p.requires_grad]
        self.layers = {id(p): _layer_of(name) for name, p in model.module.named_parameters()}
        self.invent, self.whole = inventor(model, model.collator), whole_inventor(model, model.collator)
        self.seconds: dict[int, float] = {}
        numbers = sum(p.numel() for p in model.base.module.parameters())
        self.small = numbers < FEW
        self.clipped: tuple[float, int] = (0.0, 1)
        """Seconds of two passes with clip, sum and noise, less the passes, and their rows."""

    @property
    def shapes(self) -> Shapes:
        return self.model.shapes

    @shapes.setter
    def shapes(self, found: Shapes) -> None:
        self.model.shapes = found

    def run(self) -> Timing:
        try:
            with rehearsal_entropy(), away_from_zero(self.model):
                self._none_moves_another()
                settle_shapes(self)
                return self._timing()
        except MechanismError as error:
            raise self._refusal(str(error)) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._refusal(
                f"{self.shapes.rows_of(self.shapes.longest)} records of {self.shapes.longest} tokens do not fit this "
                "site's memory: lower model.max-length or adapter.rank, or set model.checkpointing to true"
            ) from error

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self.model.base.name!r} cannot be trained privately with these settings: {reason}")

    # --- 1 ---

    def _none_moves_another(self) -> None:
        grid = self.shapes.lengths
        lengths = sorted({grid[0], grid[len(grid) // 2], grid[-1]})
        pairs = {length: self._watched(length) for length in lengths}
        self.model.module.train()
        with in_float32(self.model):
            # Ascending, each before anything longer has passed: what a model keeps of that shows in the comparison.
            alone = {length: [self._alone(record, length) for record in pairs[length]] for length in lengths}
            with self.steps() as steps:
                for length in reversed(lengths):
                    self._check_own(steps, length, pairs[length], alone[length])

    def _check_own(
        self, steps: ComparedSteps, length: int, pair: Sequence[Record], alone: Sequence[Sequence[Tensor]]
    ) -> None:
        """Compare two records in the first and in the last row, in both orders, with what each is by itself."""
        other = self.invent(max(1, length // 2), 1)
        layers = [self.layers[id(parameter)] for parameter in self.trained]
        for first, last in ((0, 1), (1, 0)):
            batch = self.model.fixed_batch([pair[first], other, pair[last]], length, ROWS)
            samples = steps.samples(batch, self.model.losses)
            for row, number in ((0, first), (ROWS - 1, last)):
                check_own([sample[row] for sample in samples], alone[number], layers, self.what)

    def _alone(self, record: Record, length: int) -> list[Tensor]:
        """Return a record's gradient without hooks and beside filler alone, in the shape of the comparison.

        In the shortest shape no layer is computed again (``model.checkpointing``): what that changes shows there. In
        longer ones memory may not have room for all activations.
        """
        once = computed_once(self.model.peft_model) if length == self.shapes.lengths[0] else nullcontext()
        for parameter in self.trained:
            parameter.grad = None
        with once:
            self.model.losses(self.model.fixed_batch([record], length, ROWS)).sum().backward()
        found: list[Tensor] = []
        for parameter in self.trained:
            if parameter.grad is None:
                raise self._refusal(
                    f"the model does not use the layer {self.layers[id(parameter)]!r}: name others in adapter.targets"
                )
            found.append(parameter.grad)
            parameter.grad = None
        return found

    # --- 2 and 3 ---

    def equal_rows(self, steps: ComparedSteps, length: int, rows: int) -> list[Tensor] | None:
        """Return the gradients of records that fill a batch, as long as the shape takes; None if its rows differ."""
        one: list[Tensor] = []
        for number in self.shown(rows):
            batch = self.model.fixed_batch([self.longest(length, number)] * rows, length, rows)
            found = steps.samples(batch, self.model.losses)
            if rows > 1 and not all(bool((sample == sample[:1]).all()) for sample in found):
                return None
            one += [sample[0].cpu() for sample in found]
        return one

    def shown(self, rows: int) -> range:
        """Return the numbers of the records that fill a batch of ``rows`` rows by turns."""
        return range(100, 100 + (SHOWN if self.small and rows % 4 else 1))

    def among_others(self, steps: ComparedSteps, length: int, rows: int, numbers: Iterable[int]) -> list[Tensor]:
        """Return the same records' gradients in the last row, behind others that are shorter."""
        found: list[Tensor] = []
        for number in numbers:
            batch = self.others(length, rows, self.longest(length, number))
            found += [sample[-1].cpu() for sample in steps.samples(batch, self.model.losses)]
        return found

    def others(self, length: int, rows: int, last: Record | None) -> FixedBatch:
        records = [self.invent(1 + 3 * i % max(1, length - 1), i) for i in range(rows)]
        return self.model.fixed_batch([*records[: rows - 1], last or records[-1]], length, rows)

    def longest(self, length: int, number: int = 100) -> Record:
        return self.invent(max(1, length - 1), number)

    def _watched(self, length: int) -> list[Record]:
        """Return a record that leaves the shape room, and one as long as it takes."""
        return [self.invent(max(1, length - 4), 101), self.longest(length)]

    def _timing(self) -> Timing:
        with self.steps() as steps:
            began = time.monotonic()
            steps.release([], self.model.losses)
            empty = time.monotonic() - began
        longest = self.whole(self.shapes.longest, 1)
        began = time.monotonic()
        self.model.score([longest])
        score = time.monotonic() - began
        rows = {length: self.shapes.rows_of(length) for length in self.seconds}
        clip = max(0.0, self.clipped[0] - empty) / self.clipped[1]
        passes = {length: seconds + rows[length] * clip for length, seconds in self.seconds.items()}
        if not unfolds(self.model.task):
            return Timing(passes, rows, empty, score)
        began = time.monotonic()
        unfolded = len(made_up_rows(self.model, longest))
        return Timing(passes, rows, empty, score, time.monotonic() - began, unfolded)

    def steps(self) -> AbstractContextManager[ComparedSteps]:
        return PrivateSteps(self.model.module, torch.optim.SGD(self.trained, lr=0.0), _PLAN)


class _OfStart(_Rehearsal):
    """Round 0, while the adapted layers' own weights are open."""

    @property
    def shapes(self) -> Shapes:
        return initial_shapes(self.model)

    @shapes.setter
    def shapes(self, found: Shapes) -> None:
        self.model.initial_shapes = found


class _OfFeatures(_Rehearsal):
    """What the frozen base model says of a record."""

    what = "feature vector"

    def __init__(self, model: FederatedModel) -> None:
        super().__init__(model)
        self.trained = [nn.Parameter(torch.zeros(0))]  # stands for them: nothing below the head has a gradient
        self.layers = {id(self.trained[0]): "features"}
        self.invent = self.whole = whole_inventor(model, model.task)

    @property
    def shapes(self) -> Shapes:
        return self.model.feature_shapes

    @shapes.setter
    def shapes(self, found: Shapes) -> None:
        self.model.feature_shapes = found

    def _alone(self, record: Record, length: int) -> list[Tensor]:
        return [self.model.features(self.model.fixed_batch([record], length, ROWS))[0]]

    def steps(self) -> AbstractContextManager[ComparedSteps]:
        return nullcontext(FeatureSteps(self.model))


class _OfLosses(_OfFeatures):
    """What the model with an adapter loses on a record."""

    what = "loss"

    @property
    def shapes(self) -> Shapes:
        return self.model.shapes

    @shapes.setter
    def shapes(self, found: Shapes) -> None:
        self.model.shapes = found

    def _alone(self, record: Record, length: int) -> list[Tensor]:
        batch = self.model.fixed_batch([record], length, ROWS)
        return [sample[0] for sample in LossSteps(self.model).samples(batch, self.model.losses)]

    def steps(self) -> AbstractContextManager[ComparedSteps]:
        return nullcontext(LossSteps(self.model))


def _layer_of(name: str) -> str:
    """Return the layer of a parameter, as the base model calls it.

    >>> _layer_of("encoder.base_model.model.layer.0.query.lora_B.default.weight")
    'layer.0.query'
    """
    return (
        name.rpartition("base_model.model.")[2]
        .partition(".lora_")[0]
        .removesuffix(".weight")
        .removesuffix(".base_layer")
    )

"""The rehearsal: made-up records pass first, and what cannot be trained privately is refused, unpaid.

The account assumes that a record adds its own clipped gradient to a sum and changes nothing else. Not every
model keeps to that: one may project something shared beside the records, scale positions by the longest record of
a batch, or remember what passed before. So, on records that are no one's, with factors away from zero:

1. **No record moves another.** Short, middle and longest records in row 0 and in the last row of a batch, in float32:
   each gradient is that of the record alone, without hooks and in the same shape, to 1e-4 of it.
2. **To the last bit.** In the run's own precision, for every shape that the run can use, in ascending and then in
   descending order: a record that fills a batch has one gradient in all its rows, and the same behind shorter ones.
   Where a device cannot do that, with so many threads, fewer rows are tried, at last one: no other record is there.
   A model of few numbers may round one record alike by chance where it does not the next, so it is shown several.
   Where shapes inside a pass follow from what the records hold, as with experts, no row has another beside it.
3. **It fits.** Every shape of 2 is a full one, so memory that does not suffice shows here and not after the charge.

Scales, head, metric and factors are the rehearsal's own: a server could choose some under which nothing shows.

Left to the round, such a model would be refused after the charge, at every retry again, or not at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedveil.client.deadline import Timing
from fedveil.client.inner_shapes import follow_from_records
from fedveil.common.adapters.base import parameters_of
from fedveil.common.errors import MechanismError, ModelError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import METRIC, AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch, Shapes
from fedveil.common.starts import PaidStart
from fedveil.common.starts.gradient import initial_shapes
from fedveil.common.tasks import Record
from fedveil.common.tasks.featured import Collator
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.entropy import rehearsal_entropy
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream

MIXED = 1e-4
"""Deviation of a record's gradient, over its norm, above which records are mixed. Honest models: 1e-6; float32."""
SMALL = 1e-2
"""Share of a record's whole gradient below which a tensor's is not held against its own norm, but against that."""
COARSE = 0.05
"""The same between passes of one record in bfloat16, whose rounding alone is about a percent."""
LEAST = 1e-9
"""Norm of a whole gradient, and its inverse, outside which float32 might not show what is compared."""
AWAY = 0.05
"""Standard deviation of the factors while a model rehearses."""
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
    with _away_from_zero(model), model.columns_alone(chosen):
        return _Rehearsal(model).run()


def rehearse_initial(model: FederatedModel, start: PaidStart) -> Timing:
    """Check round 0, whose gradient is that of what ``start`` is made from; as ``rehearse``."""
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
    with model.linearised(around):
        return _Rehearsal(model).run()


def rehearse_head(model: FederatedModel) -> Timing:
    """Check the steps on features (``client.head_alone``), which ``rehearse_features`` has seen; as ``rehearse``."""
    with model.head_alone():
        return _Rehearsal(model).run()


class _Rehearsal:
    """One model, with the parameters that require a gradient as the trained ones."""

    what: ClassVar[str] = "gradient"
    """What of a record is compared."""

    def __init__(self, model: FederatedModel) -> None:
        self.model = model
        self.trained = [p for p in model.module.parameters() if p.requires_grad]
        self.layers = {id(p): _layer_of(name) for name, p in model.module.named_parameters()}
        self.invent = _inventor(model, model.collator)
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
            with rehearsal_entropy(), _away_from_zero(self.model):
                self._none_moves_another()
                self._settle_shapes()
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
        with _in_float32(self.model):
            # Ascending, each before anything longer has passed: what a model keeps of that shows in the comparison.
            alone = {length: [self._alone(record, length) for record in pairs[length]] for length in lengths}
            with self._steps() as steps:
                for length in reversed(lengths):
                    short, long = pairs[length]
                    other = self.invent(max(1, length // 2), 1)
                    for order, wanted in (([short, other, long], (0, 1)), ([long, other, short], (1, 0))):
                        found = steps.samples(self.model.fixed_batch(order, length, ROWS), self.model.losses)
                        for row, number in zip((0, ROWS - 1), wanted, strict=True):
                            self._compare([sample[row] for sample in found], alone[length][number])

    def _alone(self, record: Record, length: int) -> list[Tensor]:
        """Return a record's gradient without hooks and beside filler alone, in the shape of the comparison.

        In the shortest shape no layer is computed again (``model.checkpointing``): what that changes shows there. In
        longer ones memory may not have room for all activations.
        """
        once = self.model.computed_once() if length == self.shapes.lengths[0] else nullcontext()
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

    def _compare(self, found: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        whole = float(torch.stack([w.double().norm() for w in want]).norm())
        if not LEAST < whole < 1 / LEAST:
            raise self._refusal(f"a made-up record has no {self.what} that could be compared: zero or not finite")
        for parameter, f, w in zip(self.trained, found, want, strict=True):
            scale = max(float(w.double().norm()), SMALL * whole)
            if not float((f.double() - w.double()).norm()) <= MIXED * scale:
                raise self._refusal(
                    f"in the layer {self.layers[id(parameter)]!r} a record's {self.what} depends on the records beside "
                    "it or before it; choose a model that computes each record by itself, or other adapter.targets"
                )

    # --- 2 and 3 ---

    def _settle_shapes(self) -> None:
        if self._mixed_inside():
            log.warning("records of this model share products whose sizes they decide: they pass one by one, slowly")
            for length in self.shapes.lengths:
                self.shapes = self.shapes.narrowed(length, 1)
        before = self.shapes
        try:
            wanted = self._narrowed()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not self.model.lowers:
                raise
            self.model.lowers = False  # some layer leaves autocast, and meets a weight of another precision
            wanted = self._narrowed()
        if self.model.device.type != "cpu" and wanted != before and self.model.attention != "eager":
            self.model.base.module.set_attn_implementation("eager")  # type: ignore[operator]
            wanted = self._narrowed()
        if wanted != before and any(rows == 1 for _, rows in wanted.narrow):
            # Alone in its pass a record is beside no other, whatever the device does.
            log.warning("this device does not compute equal rows to equal bits: some records pass one by one, slowly")
        self.shapes = wanted

    def _mixed_inside(self) -> bool:
        """Return whether the records of a batch are together in products whose sizes follow from what they hold."""
        shapes = self.shapes
        for length in (shapes.lengths[0], shapes.lengths[-1]):
            rows = shapes.rows_of(length)
            longest = [self._longest(length, 100 + row) for row in range(rows)]
            batches = (self._others(length, rows, None), self.model.fixed_batch(longest, length, rows))
            if rows > 1 and follow_from_records(self.model, batches):
                return True
        return False

    def _narrowed(self) -> Shapes:
        """Return the shapes with as many rows of each length as are equal to the last bit; all of them pass."""
        shapes, first, shown = self.shapes, dict[int, list[Tensor]](), dict[int, range]()
        with self.model.many_passes(), self._steps() as steps:
            for length in shapes.lengths:
                for rows in _fewer(shapes.rows_of(length)):
                    found = self._equal_rows(steps, length, rows)
                    if found is not None:
                        break
                first[length], shown[length] = self._finite(found), self._shown(rows)
                if rows < shapes.rows_of(length):
                    shapes = shapes.narrowed(length, rows)
            for length in reversed(shapes.lengths):
                began = time.monotonic()
                now = self._among_others(steps, length, shapes.rows_of(length), shown[length])
                self.seconds[length] = (time.monotonic() - began) / len(shown[length])
                if not all(map(torch.equal, first[length], now)):
                    shapes = shapes.narrowed(length, 1)
                    alone = self._among_others(steps, length, 1, shown[length])
                    self._remembers(first[length], alone)
                    self._repeats(alone, self._among_others(steps, length, 1, shown[length]))
            # The clip and the sum need memory too: most of it where most rows are, and in the longest.
            ends = (shapes.lengths[0], shapes.lengths[-1])
            began = time.monotonic()
            steps.release([self._others(length, shapes.rows_of(length), None) for length in ends], self.model.losses)
            more = time.monotonic() - began - sum(self.seconds[length] for length in ends)
            self.clipped = more, sum(map(shapes.rows_of, ends))
        return shapes

    def _equal_rows(self, steps: _Steps, length: int, rows: int) -> list[Tensor] | None:
        """Return the gradients of records that fill a batch, as long as the shape takes; None if its rows differ."""
        one: list[Tensor] = []
        for number in self._shown(rows):
            batch = self.model.fixed_batch([self._longest(length, number)] * rows, length, rows)
            found = steps.samples(batch, self.model.losses)
            if rows > 1 and not all(bool((sample == sample[:1]).all()) for sample in found):
                return None
            one += [sample[0].cpu() for sample in found]
        return one

    def _shown(self, rows: int) -> range:
        """Return the numbers of the records that fill a batch of so many rows by turns."""
        return range(100, 100 + (SHOWN if self.small and rows % 4 else 1))

    def _among_others(self, steps: _Steps, length: int, rows: int, numbers: Iterable[int]) -> list[Tensor]:
        """Return the same records' gradients in the last row, behind others that are shorter."""
        found: list[Tensor] = []
        for number in numbers:
            batch = self._others(length, rows, self._longest(length, number))
            found += [sample[-1].cpu() for sample in steps.samples(batch, self.model.losses)]
        return found

    def _others(self, length: int, rows: int, last: Record | None) -> FixedBatch:
        records = [self.invent(1 + 3 * i % max(1, length - 1), i) for i in range(rows)]
        return self.model.fixed_batch([*records[: rows - 1], last or records[-1]], length, rows)

    def _longest(self, length: int, number: int = 100) -> Record:
        return self.invent(max(1, length - 1), number)

    def _finite(self, found: Sequence[Tensor] | None) -> list[Tensor]:
        """Return gradients that say something; a comparison of zeros, or of what is no number, would not."""
        if found is None or not all(bool(gradient.isfinite().all()) for gradient in found):
            raise self._refusal(f"a made-up record's {self.what} is not finite, so nothing can be compared")
        return list(found)

    def _remembers(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Refuse a model whose gradient of a record changes with what passed before it."""
        coarse = MIXED if self.model.precision == torch.float32 else COARSE
        whole, apart = (
            float(torch.stack([g.double().norm() for g in gradients]).norm())
            for gradients in (before, [n.double() - b.double() for b, n in zip(before, now, strict=True)])
        )
        if not apart <= coarse * whole:
            raise self._refusal(f"a record's {self.what} depends on what was computed before it")

    def _repeats(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Refuse a model that gives a record that is alone other bits each time: how many passed before it shows.

        Of devices a CPU alone is known to add in a fixed order.
        """
        if self.model.device.type == "cpu" and not all(map(torch.equal, before, now)):
            raise self._refusal(f"a record's {self.what} depends on what was computed before it, if only by rounding")

    def _watched(self, length: int) -> list[Record]:
        """Return a record that leaves the shape room, and one as long as it takes."""
        return [self.invent(max(1, length - 4), 101), self._longest(length)]

    def _timing(self) -> Timing:
        with self._steps() as steps:
            began = time.monotonic()
            steps.release([], self.model.losses)
            empty = time.monotonic() - began
        began = time.monotonic()
        self.model.score([self.invent(self.shapes.longest, 1)])
        score = time.monotonic() - began
        rows = {length: self.shapes.rows_of(length) for length in self.seconds}
        clip = max(0.0, self.clipped[0] - empty) / self.clipped[1]
        passes = {length: seconds + rows[length] * clip for length, seconds in self.seconds.items()}
        return Timing(passes, rows, empty, score)

    def _steps(self) -> AbstractContextManager[_Steps]:
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
        self.invent = _inventor(model, model.task)

    @property
    def shapes(self) -> Shapes:
        return self.model.feature_shapes

    @shapes.setter
    def shapes(self, found: Shapes) -> None:
        self.model.feature_shapes = found

    def _alone(self, record: Record, length: int) -> list[Tensor]:
        return [self.model.features(self.model.fixed_batch([record], length, ROWS))[0]]

    def _steps(self) -> AbstractContextManager[_Steps]:
        return nullcontext(_FeatureSteps(self.model))


class _Steps(Protocol):
    """What is compared of a batch's records, and what a round does with all of them."""

    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]: ...

    def release(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> list[Tensor]: ...


class _FeatureSteps:
    def __init__(self, model: FederatedModel) -> None:
        self._model = model

    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        del losses
        return [self._model.features(batch)]

    def release(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> list[Tensor]:
        for batch in batches:
            self.samples(batch, losses)
        return []


def _inventor(model: FederatedModel, collator: Collator) -> Callable[[int, int], Record]:
    """Return what makes up a record of so many tokens; the number picks what it holds and its label."""
    made_up, classes = collator.inventor(model.base, model.max_length), max(1, model.classes)
    return lambda length, number: made_up(length, number, number % classes)


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


@contextmanager
def _away_from_zero(model: FederatedModel) -> Iterator[None]:
    """Give factors, head, metric and scales values of no one's choice, and put back what was there.

    A server that chose them could make gradients so small that nothing shows, and send others afterwards.
    """
    factors = [
        (name, parameter)
        for layer in parameters_of(model.adapter, model.peft_model).values()
        for name, parameter in layer.items()
    ]
    head = list(model.head.values())
    metric = list(model.places().get(METRIC, {}).values())
    layers: list[Any] = [m for m in model.peft_model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    own = [*(parameter for _, parameter in factors), *head, *metric]
    before = [parameter.detach().clone() for parameter in own]
    scales, feature_scale = [dict(layer.scaling) for layer in layers], model.module.feature_scale
    draw = stream(0, "rehearsal")
    try:
        with torch.no_grad():
            for name, parameter in factors:
                if name in model.adapter.traits.ones:
                    parameter.fill_(1.0)
                else:
                    parameter.copy_(AWAY * torch.randn(parameter.shape, generator=draw))
            for parameter in head:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
            for parameter in metric:
                # Not the identity: times that, a row stays what it is to the bit, in whatever order a device adds.
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5)
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))
        if feature_scale:
            model.module.feature_scale = 1.0
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(own, before, strict=True):
                parameter.copy_(value)
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
        if feature_scale:
            model.module.feature_scale = feature_scale


def _fewer(rows: int) -> Iterator[int]:
    """Yield numbers of rows to try, most first: others than multiples of 4 are often cut unevenly between threads.

    >>> list(_fewer(13))
    [13, 12, 8, 4, 2, 1]
    """
    yield from sorted({rows, *range(4, rows, 4), *(n for n in (2, 1) if n < rows)}, reverse=True)


@contextmanager
def _in_float32(model: FederatedModel) -> Iterator[None]:
    """Let the model compute in float32, where rounding is far below ``MIXED``."""
    precision = model.precision
    model.precision = torch.float32
    try:
        yield
    finally:
        model.precision = precision

"""Made-up records pass before a site's first round: what cannot be trained privately is refused, unpaid.

The account assumes that a record adds its own clipped gradient to a sum and changes nothing else. Not every
model keeps to that: one may project something shared beside the records, scale positions by the longest record of
a batch, or remember what passed before. So, on records that are no one's, with factors away from zero:

1. **No record moves another.** Short, middle and longest records in row 0 and in the last row of a batch, in float32:
   each gradient is that of the record alone, computed without hooks, to 1e-4 of it.
2. **To the last bit.** In the run's own precision, for every shape that the run can use, in ascending and then in
   descending order: a record's gradient is the same in another row and beside others, long ones and short ones.
   Where a device cannot do that, plain attention is tried, and then shapes of one row, where no other record is.
3. **It fits.** Every shape of 2 is a full one, so memory that does not suffice shows here and not after the charge.

Left to the round, such a model would be refused after the charge, at every retry again, or not at all.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from client.deadline import Timing
from common.errors import MechanismError, ModelError
from common.examples import Example
from common.initial_gradient import initial_shapes, open_weights
from common.model import FederatedModel
from common.privacy.dpsgd import PrivateSteps
from common.privacy.plan import PrivacyPlan
from common.randomness import stream
from common.shapes import FixedBatch, Shapes
from common.tasks import Record

MIXED = 1e-4
"""Deviation of a record's gradient, over its norm, above which records are mixed. Honest models: 1e-6; float32."""
SMALL = 1e-2
"""Share of a record's whole gradient below which a tensor's is not held against its own norm, but against that."""
AWAY = 0.02
"""Standard deviation of what is added to the factors, so that none is zero."""
_PLAN = PrivacyPlan(
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


def rehearse_initial(model: FederatedModel) -> Timing:
    """Check round 0, whose gradient is that of the adapted layers' own weights; as ``rehearse``."""
    with open_weights(model):
        return _Rehearsal(model, initial=True).run()


@dataclass(frozen=True)
class _Case:
    """A made-up batch of one length: where the watched records stand in it."""

    batch: FixedBatch
    rows: tuple[int, ...]
    """Row of each watched record, in one order in all cases of a length."""


class _Rehearsal:
    """One model, with the parameters that require a gradient as the trained ones."""

    def __init__(self, model: FederatedModel, *, initial: bool = False) -> None:
        self.model, self.initial = model, initial
        self.trained = [p for p in model.module.parameters() if p.requires_grad]
        self.layers = {id(p): _layer_of(name) for name, p in model.module.named_parameters()}
        self.invent = _inventor(model)
        self.seconds: dict[int, float] = {}

    @property
    def shapes(self) -> Shapes:
        return initial_shapes(self.model) if self.initial else self.model.shapes

    def run(self) -> Timing:
        try:
            with _away_from_zero(self.model):
                self._none_moves_another()
                self._settle_shapes()
                return self._timing()
        except MechanismError as error:
            raise self._refusal(str(error)) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._refusal(
                f"{self.shapes.rows_of(self.shapes.longest)} records of {self.shapes.longest} tokens do not fit this "
                "site's memory: lower model.max-length or adapter.rank"
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
            alone = {length: [self._alone(record) for record in pairs[length]] for length in lengths}
            with self._steps() as steps:
                for length in reversed(lengths):
                    short, long = pairs[length]
                    other = self.invent(length // 2, 1)
                    for order, wanted in (([short, other, long], (0, 1)), ([long, other, short], (1, 0))):
                        found = steps.samples(self.model.fixed_batch(order, length, 3), self.model.losses)
                        for row, number in zip((0, 2), wanted, strict=True):
                            self._compare([sample[row] for sample in found], alone[length][number])

    def _alone(self, record: Record) -> list[Tensor]:
        loss = self.model.losses(self.model.batch([record])).sum()
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        if any(gradient is None for gradient in found):
            unused = next(p for p, gradient in zip(self.trained, found, strict=True) if gradient is None)
            raise self._refusal(
                f"the model does not use the layer {self.layers[id(unused)]!r}: name others in adapter.targets"
            )
        return list(found)

    def _compare(self, found: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        whole = float(torch.stack([w.double().norm() for w in want]).norm())
        for parameter, f, w in zip(self.trained, found, want, strict=True):
            scale = max(float(w.double().norm()), SMALL * whole)
            if not float((f.double() - w.double()).norm()) <= MIXED * scale:
                raise self._refusal(
                    f"in the layer {self.layers[id(parameter)]!r} a record's gradient depends on the records beside it "
                    "or before it; choose a model that computes each record by itself, or other adapter.targets"
                )

    # --- 2 and 3 ---

    def _settle_shapes(self) -> None:
        try:
            same = self._same_bits()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not self.model.lowers:
                raise
            self.model.lowers = False  # some layer leaves autocast, and meets a weight of another precision
            same = self._same_bits()
        if same:
            return
        if self.model.device.type != "cpu":
            self.model.base.module.set_attn_implementation("eager")  # type: ignore[operator]
            if self._same_bits():
                return
        # Alone in its pass a record is beside no other, whatever the device does.
        log.warning("this device does not compute equal rows to equal bits: every record passes by itself, slowly")
        self.model.shapes = self.model.shapes.single()
        if not self._same_bits(tolerance=MIXED):
            raise self._refusal("a record's gradient depends on what was computed before it")

    def _same_bits(self, tolerance: float = 0.0) -> bool:
        grid = self.shapes.lengths
        cases = {length: self._cases(length) for length in grid}
        with self.model.many_passes(), self._steps() as steps:
            first = {length: self._picked(steps, cases[length][0]) for length in grid}
            for length in reversed(grid):
                began = time.monotonic()
                now_here = self._picked(steps, cases[length][1])
                self.seconds[length] = time.monotonic() - began
                for before, now in zip(first[length], now_here, strict=True):
                    if float((before - now).double().norm()) > tolerance * float(before.double().norm()):
                        return False
                del first[length]
        return True

    def _picked(self, steps: PrivateSteps, case: _Case) -> list[Tensor]:
        return [sample[list(case.rows)].cpu() for sample in steps.samples(case.batch, self.model.losses)]

    def _cases(self, length: int) -> tuple[_Case, _Case]:
        """Return the watched records first among records as long as the shape takes, then last among shorter ones."""
        rows = self.shapes.rows_of(length)
        watched = self._watched(length)[:rows]
        full = [self.invent(length - 1, i) for i in range(rows - len(watched))]
        partial = [self.invent(1 + 3 * i % (length - 1), i) for i in range(rows - len(watched))]
        here, there = range(len(watched)), range(rows - len(watched), rows)
        return (
            _Case(self.model.fixed_batch([*watched, *full], length, rows), tuple(here)),
            _Case(self.model.fixed_batch([*partial, *reversed(watched)], length, rows), tuple(reversed(there))),
        )

    def _watched(self, length: int) -> list[Record]:
        """Return a record that leaves the shape room, and one as long as it takes."""
        return [self.invent(max(1, length - 4), 101), self.invent(length - 1, 100)]

    def _timing(self) -> Timing:
        with self._steps() as steps:
            began = time.monotonic()
            steps.release([], self.model.losses)
            empty = time.monotonic() - began
        began = time.monotonic()
        self.model.score([self.invent(self.shapes.longest, 1)])
        rows = {length: self.shapes.rows_of(length) for length in self.seconds}
        return Timing(self.seconds, rows, empty, time.monotonic() - began)

    def _steps(self) -> PrivateSteps:
        return PrivateSteps(self.model.module, torch.optim.SGD(self.trained, lr=0.0), _PLAN)


def _inventor(model: FederatedModel) -> Callable[[int, int], Record]:
    """Return what makes up a record of so many tokens; the number picks its tokens and its label."""
    tokenizer, embeddings = model.base.tokenizer, model.base.module.get_input_embeddings()  # type: ignore[operator]
    special = set(tokenizer.all_special_ids)
    usual = [token for token in range(min(len(tokenizer), embeddings.num_embeddings)) if token not in special]
    (like,) = model.tokenise([Example(text="one", label=0, completion="two")])
    classes = model.module.head.out_features if model.task.has_head else 1

    def invent(length: int, number: int) -> Record:
        draw = random.Random(f"{length}/{number}")
        return model.task.made_up(like, draw.choices(usual, k=length), number % classes)

    return invent


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
    """Add a little to every factor and to the head, and put back what was there."""
    factors = [parameter for layer in model.places().values() for parameter in layer.values()]
    before = [parameter.detach().clone() for parameter in factors]
    draw = stream(0, "rehearsal")
    try:
        with torch.no_grad():
            for parameter in factors:
                parameter.add_((AWAY * torch.randn(parameter.shape, generator=draw)).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(factors, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _in_float32(model: FederatedModel) -> Iterator[None]:
    """Let the model compute in float32, where rounding is far below ``MIXED``."""
    precision = model.precision
    model.precision = torch.float32
    try:
        yield
    finally:
        model.precision = precision

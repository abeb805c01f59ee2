"""DP-SGD at a site: per-record gradients, clip, sum, noise, public divisor (Abadi et al. 2016, alg. 1).

Opacus computes per-record gradients (hooks, model not wrapped; linear layers and stated maps compute their own,
``privacy.linear_samples``) and scales the sum. Around it is what a federation needs and Opacus leaves open:

* one joint clip over all trained tensors; norms and clip in float64, whatever the forward pass is in;
* an exact sum: each clipped gradient is rounded toward zero, number by number, to a public grid (``privacy.grid``), and
  whole numbers are added, so that no order and no division of a batch ever shows;
* a record whose gradient is not finite contributes zero instead of destroying the update;
* noise also on an empty batch, so that emptiness is not visible;
* noise from the operating system's entropy, rounded with the sum to a public grid before it goes anywhere;
* the divisor is a public constant, never the realised batch;
* only a gradient that came from here, or was made of one after clip and noise, reaches the optimiser.

Guarantee: with per-record losses, adding or removing one record changes the noiseless sum by at
most ``clip_norm`` in L2 over all trained tensors together. Where several rows belong to one unit
(``privacy.together``), their gradients are summed first, and that holds for adding or removing the
unit with all of them. It needs every record's gradient to be its
own to the last bit, no matter which others are beside it: the batches have shapes that follow from each record alone
(``common.model.shapes``), and a model that mixes records, or keeps something from one pass to the next, is
refused before its first round (``client.rehearsal``). A record whose gradient cannot be computed in its
own shape contributes zero.

Bit-equality in every row is tested on CPUs, in float32 and bfloat16. No GPU has been tested so far, so
steps on a GPU carry noise for 1.01 times the clip beside it (``privacy.plan.rounding_margin``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from fedveil.common.errors import MechanismError
from fedveil.common.log import place_of
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.model.sharing import Share, in_order, unshared
from fedveil.common.own_gradients import OwnGradients
from fedveil.common.tasks.base import WEIGHT
from fedveil.privacy import grid
from fedveil.privacy.linear_samples import SampleHooks
from fedveil.privacy.randomness import add_private_noise
from fedveil.privacy.secure_sum.masks import Words
from fedveil.privacy.secure_sum.rounding import rounded, total
from fedveil.privacy.together import Together

if TYPE_CHECKING:
    from fedveil.privacy.plan import PrivacyPlan

log = logging.getLogger("fedveil.site")
PASSING = ("activations", "max_batch_len", "_current_grad_sample")
TRACES = (*PASSING, "grad_sample", "summed_grad", "_forward_counter", "words")
"""What Opacus hangs on layers and parameters; ``PASSING`` is what it keeps within one pass."""


class ClipAndNoise(DPOptimizer):
    """Opacus' optimiser with an exact sum of what is clipped, finite records only, and operating-system noise out."""

    step_of_sum: float
    """Step of the grid on which gradients are added, see ``privacy.grid``."""

    def __init__(self, *own: Any, **named: Any) -> None:
        super().__init__(*own, **named)
        self.step_of_sum = grid.sum_grid(self.max_grad_norm, self.noise_multiplier * self.max_grad_norm)
        self._units = 0

    def clip_and_accumulate(self) -> None:
        """Clip every record's joint gradient, round it toward zero to the grid, and add it to the step's sum, exactly.

        Toward zero, so that a clipped gradient only gets shorter. Norms and clip are in float64, because a float32 norm
        of a layer of a million weights is up to a percent short. One tensor's samples are widened at a time.

        Raises:
            MechanismError: there are more records than a sum of whole steps holds.
        """
        samples = [_rows(sample) for sample in self.grad_samples]
        squares = torch.zeros(len(samples[0]), dtype=torch.float64, device=samples[0].device)
        for sample in samples:
            # Widened number by number as it is read, not as a copy.
            squares += torch.linalg.vector_norm(sample, dim=1, dtype=torch.float64).square()
        finite = squares.isfinite()
        # As much longer as float64's norm and factor may be too short or too long: 2⁻⁵³ for each number and operation.
        lengths = squares.sqrt() * (1 + (sum(sample.shape[1] for sample in samples) + 16) * 2.0**-53)
        # A norm below the clip leaves its record as it is.
        factors = torch.where(finite, self.max_grad_norm / lengths.clamp(min=self.max_grad_norm), 0.0)
        in_steps, spoilt = (factors / self.step_of_sum)[:, None], not bool(finite.all())
        clipped = []
        for parameter, sample in zip(self.params, samples, strict=True):
            widened = sample.to(torch.float64, copy=True).mul_(in_steps).trunc_()
            if spoilt:  # 0 times infinity is not 0
                widened[~finite] = 0.0
            clipped.append(widened.sum(0).mul_(self.step_of_sum).view(parameter.shape))
        self.merge(clipped, len(squares))

    def merge(self, clipped: Sequence[Tensor], units: int) -> None:
        """Add sums of clipped gradients of so many units, whole steps of the grid, one for each parameter."""
        self._units = units + (0 if self.params[0].summed_grad is None else self._units)
        if self._units > grid.most_units(self.max_grad_norm, self.step_of_sum):
            # No count: it is private, and errors are read by others.
            raise MechanismError("a step has more records than a sum of whole numbers holds at this clip and noise")
        for parameter, part in zip(self.params, clipped, strict=True):
            parameter.summed_grad = part if parameter.summed_grad is None else parameter.summed_grad + part

    def add_noise(self) -> None:
        """Write sum + N(0, (noise_multiplier · clip_norm)²), rounded to a public grid, into every ``grad``."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            # The grid before all else: float32 is finer near zero, and rounds only what may be public.
            parameter.grad = self.noised(parameter, std).to(parameter)

    def noised(self, parameter: Any, std: float) -> Tensor:
        """Return a parameter's sum with its noise on the grid, in float64 and of the parameter's shape."""
        return add_private_noise(parameter.summed_grad, std)

    def read(self, plan: PrivacyPlan, margin: float) -> None:
        """Note what ``noised`` needs of a plan beside the standard deviation, and the margin on it: here nothing."""


class ClipAndShare(ClipAndNoise):
    """The same with a part of the noise, as whole steps of a grid that is the same at all sites of a sum."""

    share: float
    """Standard deviation of the part, before the margin; the grids follow from it."""
    margin: float

    def read(self, plan: PrivacyPlan, margin: float) -> None:
        """Note the site's part of the noise."""
        self.share, self.margin = plan.noise_std, margin
        self.step_of_sum = grid.sum_grid(plan.event.clip_norm, self.share)

    def noised(self, parameter: Any, std: float) -> Tensor:
        """Hang the noised sum on the parameter as ``words``, and return the same as numbers."""
        parameter.words = rounded(parameter.summed_grad.flatten(), self.share, self.margin)
        return total([parameter.words], self.share).view(parameter.shape)


def _rows(sample: Tensor) -> Tensor:
    """Return per-record gradients as one row a record."""
    return sample.reshape(len(sample), math.prod(sample.shape[1:]))


class PrivateSteps:
    """Context in which a model takes DP-SGD steps; hooks are on the model only inside it.

    Args:
        module: the model, with exactly the trained parameters requiring a gradient.
        optimizer: any torch optimiser over exactly those parameters.
        plan: clip, noise and public divisor.
        noise_margin: factor on the noise beyond what the ledger is charged for, see ``privacy.plan.rounding_margin``.
        before_pass: called before each pass; what it raises ends the step.

    A mechanism that clips or noises otherwise overrides ``clipping``, and is priced as another kind of event.

    Raises:
        MechanismError: the optimiser does not cover exactly the trained parameters, or it is
            stepped with a gradient that did not come from here; or the model normalises by
            its batch, anywhere, so that one record moves what the others contribute.
    """

    clipping: ClassVar[type[ClipAndNoise]] = ClipAndNoise
    """What clips each record, sums, and noises the sum."""
    words: Words | None = None
    """See ``privacy.steps.Steps``."""
    share: Share
    """What may compute batches of a step elsewhere, as ``whole_sums`` does, or ``samples`` where a unit has several
    rows."""
    order: tuple[nn.Parameter, ...] = ()
    """The trained parameters in the canonical order of what is sent."""

    _hooked: Sequence[nn.Module] = ()
    """The layers that have hooks, inside the context."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        plan: PrivacyPlan,
        *,
        noise_margin: float = 1.0,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        covered = [p for group in optimizer.param_groups for p in group["params"]]
        if {id(p) for p in trained} != {id(p) for p in covered}:
            raise MechanismError(
                f"the optimiser has {len(covered)} tensors, the model trains {len(trained)}: "
                "every trained tensor, and no other, must pass through the clip"
            )
        for name, child in module.named_modules():
            if isinstance(child, OwnGradients) and type(child) not in GradSampleHooks.GRAD_SAMPLERS:
                register_grad_sampler(type(child))(type(child).gradients)
            # A frozen one as well: Opacus looks at trained modules only, and per-record gradients need train mode.
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                raise MechanismError(
                    f"the layer {name!r} is a {type(child).__name__}, through which each record moves the others: "
                    "choose a base model without batch normalisation"
                )
        self._module, self._optimizer = module, optimizer
        self._before_pass, self.share = before_pass, unshared
        # Opacus hangs grad_sample and summed_grad on parameters, which torch's types do not know.
        self._trained: list[Any] = trained
        self._mechanism = self.clipping(
            optimizer,
            noise_multiplier=plan.event.noise_multiplier * noise_margin,
            max_grad_norm=plan.event.clip_norm,
            expected_batch_size=plan.expected_batch_size,
        )
        self._unit = plan.unit
        self._mechanism.read(plan, noise_margin)
        self._released: list[tuple[Tensor, int]] = []
        # From now on, also after the context: this optimiser never sees a raw gradient.
        optimizer.register_step_pre_hook(self._check)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters, in the order of ``release``."""
        return tuple(self._trained)

    def __enter__(self) -> PrivateSteps:
        self._module.train()
        self._hooks = SampleHooks(self._module)
        self._hooked = self._hooks.hooked
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.cleanup()
        # Nothing of a record may outlive the context, also when it ends in the middle of a step:
        # Opacus leaves activations on layers and per-record gradients on parameters.
        for holder in (*self._module.modules(), *self._trained):
            for name in TRACES:
                vars(holder).pop(name, None)
        for parameter in self._trained:
            parameter.grad = None

    def step(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        """Take one optimiser step on one logical batch, given as any number of parts (also none).

        Args:
            batches: the parts; how the batch is cut never changes the result.
            losses: returns one loss per record, shape (records,), for a part.
        """
        self._privatise(batches, losses)
        released = [parameter.grad for parameter in self._trained]
        self._mechanism.zero_grad(set_to_none=True)
        for parameter, gradient in zip(self._trained, released, strict=True):
            parameter.grad = gradient
        self._released = [(p.grad, p.grad._version) for p in self._trained]
        self._optimizer.step()
        self._released = []
        self._forget()

    def release(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return what one step would hand to the optimiser, one tensor per trained parameter, without stepping.

        It costs exactly what a step costs. The order is that of the module's parameters.
        """
        self._privatise(batches, losses)
        gradients = [parameter.grad.clone() for parameter in self._trained]
        self._forget()
        return gradients

    def samples(self, batch: Any, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return each trained tensor's gradients of the records of one part; nothing is stepped, released or noised.

        Returns:
            One tensor of shape (records, *parameter's) for each trained parameter, in the order of ``trained``.

        Raises:
            MechanismError: some trained tensor gets no gradient of its own from each record.
        """
        try:
            self._differentiate(batch, losses)
            return [parameter.grad_sample for parameter in self._trained]
        finally:
            self._abandon()

    def whole_sums(self, batch: FixedBatch, losses: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return one part's clipped gradients, summed, float64, whole steps of the grid; they are added to no step.

        Returns:
            One tensor of each trained parameter's shape, in the order of ``trained``. What fails raises.
        """
        self._check_whole(batch)
        try:
            self._mechanism.zero_grad(set_to_none=True)
            self._differentiate(batch, losses)
            self._mechanism.clip_and_accumulate()
            return [parameter.summed_grad for parameter in self._trained]
        finally:
            self._mechanism.zero_grad(set_to_none=True)
            self._abandon()

    def _privatise(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        self._mechanism.zero_grad(set_to_none=True)
        seen, share = False, unshared if self._unit.grouped else self.share  # of grouped units, parts are shared
        for batch, wholes in share(batches, self._before_pass):
            if wholes is None:
                seen = self._accumulate(batch, losses) or seen
            else:
                self._mechanism.merge(wholes, batch.records)
                seen = True
        for parameter in self._trained:
            # Opacus reads the device and the number of parts off grad_sample.
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        if not seen:
            self._mechanism.clip_and_accumulate()
        self._mechanism.add_noise()
        self._mechanism.scale_grad()

    def _accumulate(self, batch: Any, losses: Callable[[Any], Tensor]) -> bool:
        """Add a part's clipped gradients, one of each unit, to the sum; return whether there were any."""
        if isinstance(batch, Together):
            return self._accumulate_together(batch, losses)
        self._check_whole(batch)
        seen = False
        for _ in self._passes(batch, losses):
            self._mechanism.clip_and_accumulate()
            seen = True
        return seen

    def _check_whole(self, batch: Any) -> None:
        """Raise MechanismError where rows of a batch may be parts of units, which it has not together."""
        if self._unit.grouped or (isinstance(batch, dict) and WEIGHT in batch):
            # Clipped row by row, a unit would move the sum by a clip for each of its rows.
            raise MechanismError(f"rows that belong to one {self._unit.name} did not come together: nothing is summed")

    def _accumulate_together(self, units: Together, losses: Callable[[Any], Tensor]) -> bool:
        """Sum the gradients of each unit's rows in float64, and add what the clip leaves of it to the step's sum."""
        unit_sums = [p.new_zeros((units.units, *p.shape), dtype=torch.float64) for p in self._trained]
        seen = False
        for part, owners, samples in in_order(self.share, units.parts, self._before_pass):
            for rows in self._passes(part, losses) if samples is None else [range(part.records)]:
                gradients = samples or (parameter.grad_sample for parameter in self._trained)
                # One after the other: a device that adds in no fixed order would let others' rows decide the rounding.
                for total_of_unit, gradient in zip(unit_sums, gradients, strict=True):
                    for sample, row in zip(gradient, rows, strict=True):
                        total_of_unit[owners[row]] += sample
                seen = True
        if seen:
            for total_of_unit, parameter in zip(unit_sums, self._trained, strict=True):
                parameter.grad_sample = total_of_unit
            self._mechanism.clip_and_accumulate()
            self._forget()
        return seen

    def _passes(self, batch: Any, losses: Callable[[Any], Tensor]) -> Iterator[range]:
        """Yield which rows of a part have passed, while their gradients are in every ``grad_sample``.

        If the pass fails, each record of it passes alone in the same shape, which gives the same gradient, and one that
        fails there contributes zero.
        """
        self._before_pass()
        try:
            self._differentiate(batch, losses)
        except MechanismError:
            raise
        except Exception as error:
            self._abandon()
            if not isinstance(batch, FixedBatch):
                raise
            if batch.records == 1:
                log.warning("a record could not be computed and contributes zero: %s", place_of(error))
                return
            for row in range(batch.records):
                for _ in self._passes(batch.alone(row), losses):
                    yield range(row, row + 1)
            return
        yield range(len(self._trained[0].grad_sample))
        self._forget()

    def _differentiate(self, batch: Any, losses: Callable[[Any], Tensor]) -> None:
        """Leave in every trained tensor's ``grad_sample`` the gradient of each record of ``batch``."""
        self._forget()  # a layer adds to what is there
        values = losses(batch)
        values.sum().backward()
        rows = batch.rows if isinstance(batch, FixedBatch) else len(values)
        for parameter in self._trained:
            sample = getattr(parameter, "grad_sample", None)
            if sample is None or len(sample) != rows:
                # No count: how many records were drawn is private, and errors are read by others.
                raise MechanismError(
                    f"a trained tensor of shape {tuple(parameter.shape)} got no gradient of its own for each record: "
                    "the model does not use it, or mixes records"
                )
            parameter.grad_sample = sample[: len(values)]

    def _forget(self) -> None:
        for parameter in self._trained:
            parameter.grad_sample = None
            parameter.grad = None

    def _abandon(self) -> None:
        """Drop what a pass that failed half-way has left: the next one's hooks would take it for its own."""
        self._forget()
        for holder in (*self._hooked, *self._trained):
            for name in PASSING:
                vars(holder).pop(name, None)
        for parameter in self._trained:
            parameter._forward_counter = 0

    def _check(self, optimizer: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        released = {id(gradient): version for gradient, version in self._released}
        for parameter in self._trained:
            gradient = parameter.grad
            if gradient is None or released.get(id(gradient)) != gradient._version:
                raise MechanismError("the optimiser was stepped with a gradient that did not pass clip and noise")


class SummedSteps(PrivateSteps):
    """One step whose noised sum is sent as words, in place of what an optimiser would make of it.

    The server divides and steps: it is given the sum of all sites alone, and no model here moves.
    """

    clipping: ClassVar[type[ClipAndNoise]] = ClipAndShare

    def step(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        """Clip, sum and noise one logical batch, and keep the words; a second step of a round is an error.

        Raises:
            MechanismError: there are words already, which the ledger was charged for; a second sum was not.
        """
        if self.words is not None:
            raise MechanismError("a round of a secure sum is one step: a second sum was not paid for")
        self._privatise(batches, losses)
        self.words = np.concatenate([parameter.words for parameter in self.order])  # type: ignore[attr-defined]
        self._forget()

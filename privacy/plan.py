"""The plan of a site: what a mechanism makes of public figures, and what then samples, clips and noises.

The training loop knows no mechanism: it asks its plan which records a step takes, in what batches they
pass, and for the steps themselves. A plan that pays holds the event that its ledger is charged for, so
that what is done and what is paid are read from one place.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from fedveil.common.check import clip_norm, in_range, positive
from fedveil.common.errors import MechanismError, PrivacyError
from fedveil.privacy.accounting import Release, check_terms
from fedveil.privacy.events import Event, SampledGaussian, sampled_gaussian
from fedveil.privacy.figures import most_delta_text
from fedveil.privacy.grid import check_sum
from fedveil.privacy.privacy_filter import promised_noise
from fedveil.privacy.steps import Steps, nothing
from fedveil.privacy.together import together
from fedveil.privacy.units import RECORD, Unit

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
    from fedveil.common.messages.state import AdapterState
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks import Batch, Record
    from fedveil.common.tasks.base import Coins
    from fedveil.privacy.dpsgd import PrivateSteps
    from fedveil.privacy.together import Together


class Plan(ABC):
    """What one site does to its records in a run: public, fixed before a record reaches the model."""

    @abstractmethod
    def batches(
        self, model: FederatedModel, records: Sequence[Record], public: torch.Generator, first: int
    ) -> Iterator[Sequence[int]]:
        """Yield the positions of the records that each step takes, from step ``first`` of the run on.

        Args:
            model: knows the sizes of records.
            records: the site's.
            public: a stream of the run's public seed; a plan that promises anything about records leaves it alone.
            first: steps of the run that were taken before.
        """

    @abstractmethod
    def parts(self, model: FederatedModel, records: Sequence[Record]) -> Iterable[Batch | Together]:
        """Return one step's records as the batches in which they pass the model."""

    @abstractmethod
    def rows(self, model: FederatedModel, rows: Sequence[Record], records: int) -> Iterable[Together]:
        """Return the batches of one step's unfolded records (``Task.unfold``), each row with whose it is.

        Args:
            model: that they pass.
            rows: of all the step's records.
            records: how many these are.
        """

    @abstractmethod
    def coins(self, public: torch.Generator) -> Coins:
        """Return what unfolding draws from: ``public``, or entropy where the plan promises anything about records."""

    @abstractmethod
    def steps(
        self, model: FederatedModel, optimizer: Optimizer, before_pass: Callable[[], None] = nothing
    ) -> AbstractContextManager[Steps]:
        """Return the context in which ``model`` takes steps.

        Args:
            model: whose trained parameters are those that require a gradient.
            optimizer: over exactly those.
            before_pass: called before each pass; what it raises ends the step.
        """

    def outgoing(self, contribution: AdapterState, received: AdapterState) -> AdapterState:
        """Return what leaves the site, from what a strategy sends up of the trained tensors, and what it received.

        As it is, where every step was noised. A plan that clips and noises a whole round does it here.
        """
        del received
        return contribution

    def told_size(self, public_size: int) -> int:
        """Return the size that a site sends to the server, given its public size."""
        return public_size

    @property
    def noises_rounds(self) -> bool:
        """Whether what a round changed is noised as it leaves the site (``outgoing``), and no step of it."""
        return type(self).outgoing is not Plan.outgoing

    @abstractmethod
    def longest_gradient(self, numbers: int, event: Event | None) -> float:
        """Server: return about how long one step's gradient can be; infinite if nothing bounds it.

        Of a plan that noises rounds it is about how long a round's whole change can be.

        Args:
            numbers: elements of all trained tensors together.
            event: the one that the site says it was charged for; its noise counts where it is larger.
        """


def rounding_margin(device: torch.device) -> float:
    """Return by how much the noise exceeds the plan's, beside the shapes, where bit-equality was never tested."""
    return 1.0 if device.type == "cpu" else 1.01


@dataclass(frozen=True)
class PrivacyPlan(Plan):
    """The plan of a site that pays: Poisson samples, one L2 clip a unit, Gaussian noise, a public divisor.

    Another mechanism states its own ``kind`` and overrides what it does otherwise.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    kind: ClassVar[str] = SampledGaussian.name
    """Of the event that a step is charged as."""

    event: Event
    """What one optimiser step releases, and is charged for."""
    expected_batch_size: float
    """Divisor of the noised sum, in units. A constant made of public figures (the event's rate times the public
    size), never the realised batch and never the exact number of records."""
    delta: float
    max_epsilon: float
    """Budget of the data set, for the mechanism's unit, add or remove one."""
    unit: Unit = RECORD
    """What is drawn, clipped and counted as one."""

    def __post_init__(self) -> None:
        if self.event.kind != self.kind:
            # What the steps do would be priced as something else.
            raise MechanismError(f"{type(self).__name__} does what is priced as {self.kind!r}, not {self.event.kind!r}")
        clip_norm(clip_norm=self.event.clip_norm)
        self.event.check()
        positive(expected_batch_size=self.expected_batch_size, max_epsilon=self.max_epsilon)
        in_range(0, 0.5, delta=self.delta)
        # The divisor is the rate times the public size.
        check_sum(self.expected_batch_size / self.event.sample_rate, self.event.clip_norm, self.noise_std)

    @classmethod
    def for_run(
        cls,
        privacy: PrivacyConfig,
        training: TrainingConfig,
        total_steps: int,
        public_size: int,
        before: Sequence[Release] = (),
    ) -> Self:
        """Return the plan of a site that may take part in every one of the run's ``total_steps``.

        A noise multiplier of 0 in the configuration asks for the least one that keeps all ``total_steps``
        within the budget, on a data set that has spent nothing but ``before`` (releases that the run itself
        makes ahead of its first step, such as an initialisation); any other is used as it is, even if the
        budget then ends before the run does (the ledger stops it). ``public_size`` is the number of
        units that the site declares, not the one that it counts.

        Raises:
            ConfigError: a figure is out of range, or none that an honest job has (``check_terms``).
            PrivacyError: delta is above one over the public size, so that publishing a whole unit
                at random would satisfy it.
        """
        positive(total_steps=total_steps, public_size=public_size)
        if privacy.delta > 1 / public_size:
            raise PrivacyError(
                f"privacy.delta is {privacy.delta:g}, above 1/{public_size} = {1 / public_size:.3g} of the public "
                f"size {public_size}: set privacy.delta to {most_delta_text(public_size)} or less"
            )
        event = cls.event_of(privacy, training, privacy.noise_multiplier or 1.0)
        check_terms([Release(event, total_steps), *before], privacy.delta)
        if not privacy.noise_multiplier:
            least = promised_noise(event, privacy.epsilon, privacy.delta, total_steps, before)
            event = event.having(noise_multiplier=least)
        return cls(
            event=event,
            expected_batch_size=event.sample_rate * public_size,
            delta=privacy.delta,
            max_epsilon=privacy.epsilon,
            unit=privacy.mechanism.unit,
        )

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        """Return what one step releases at a noise multiplier, by the run's settings."""
        figures = {"noise_multiplier": noise_multiplier, "sample_rate": training.sample_rate}
        return Event(cls.kind, {**figures, "clip_norm": privacy.clip_norm})

    def sample(self, size: int) -> list[int]:
        """Return the numbers of one Poisson sample of ``size`` units, from the operating system's entropy."""
        from fedveil.privacy import randomness  # It brings torch, which no command line needs.

        chosen: list[int] = randomness.private_poisson_sample(size, self.event.sample_rate).tolist()
        return chosen

    def draws(self, records: Sequence[Record]) -> Iterator[list[int]]:
        """Yield the positions of one sample of units after another: of each that is drawn all of its records."""
        members = self.unit.members(records)
        while True:
            yield [position for number in self.sample(len(members)) for position in members[number]]

    def batches(
        self, model: FederatedModel, records: Sequence[Record], public: torch.Generator, first: int
    ) -> Iterator[list[int]]:
        """Yield one sample after another; the public stream has no part in it, nor has what came before."""
        del model, public, first
        return self.draws(records)

    def parts(
        self, model: FederatedModel, records: Sequence[Record], shapes: Shapes | None = None
    ) -> Iterable[Batch | Together]:
        """Return batches whose shapes follow from each record alone, by ``shapes`` or the model's own.

        Where several records belong to one unit, theirs come together.
        """
        if self.unit.grouped:
            return together(model, records, self.unit.members(records), shapes)
        return model.fixed_batches(records) if shapes is None else model.fixed_batches(records, shapes)

    def rows(self, model: FederatedModel, rows: Sequence[Record], records: int) -> Iterable[Together]:
        """Return rows with all others of their unit, a record or who it belongs to, in shapes of their own."""
        del records  # the divisor is public
        return together(model, rows, self.unit.owned(rows))

    def coins(self, public: torch.Generator) -> Coins:
        """Return the operating system's entropy; the public stream has no part in it."""
        from fedveil.privacy import randomness  # It brings torch, which no command line needs.

        del public
        return randomness.private_uniform

    @contextmanager
    def steps(
        self, model: FederatedModel, optimizer: Optimizer, before_pass: Callable[[], None] = nothing
    ) -> Iterator[PrivateSteps]:
        """Return the context of steps that clip each record and noise the sum, see ``privacy.dpsgd``."""
        from fedveil.common.messages.tensors import entries

        margin, kind = rounding_margin(model.device), self.stepping()
        own = kind(model.module, optimizer, self, noise_margin=margin, before_pass=before_pass)
        own.order = tuple(parameter for _, _, parameter in entries(model.trained()))  # type: ignore[arg-type,misc]
        with model.many_passes(), own as steps:
            yield steps

    def stepping(self) -> type[PrivateSteps]:
        """Return what takes the steps; a mechanism that clips or noises otherwise has one with another ``clipping``."""
        from fedveil.privacy import dpsgd  # It brings Opacus, which no server needs.

        return dpsgd.PrivateSteps

    def longest_gradient(self, numbers: int, event: Event | None) -> float:
        """Return C (1 + σ√d / b); of a round that is noised as it leaves the site C (1 + σ√d)."""
        noise = max(self.event.noise_multiplier, event.noise_multiplier if event else 0.0)
        divisor = 1.0 if self.noises_rounds else self.expected_batch_size
        return self.event.clip_norm * (1 + noise * math.sqrt(numbers) / divisor)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that this site draws for one release, on each coordinate of the sum."""
        return self.event.noise_multiplier * self.event.clip_norm

    @property
    def gradient_noise_std(self) -> float:
        """Standard deviation of the noise on one coordinate of the averaged gradient."""
        return self.noise_std / self.expected_batch_size

    def release(self, steps: int) -> Release:
        """Return what the ledger must be charged before ``steps`` (>= 1) optimiser steps."""
        return Release(self.event, steps)


def gaussian_plan(
    clip_norm: float,
    noise_multiplier: float,
    sample_rate: float,
    expected_batch_size: float,
    delta: float,
    max_epsilon: float,
) -> PrivacyPlan:
    """Return the plan of these figures, without a run."""
    event = sampled_gaussian(noise_multiplier, sample_rate, clip_norm)
    return PrivacyPlan(event, expected_batch_size, delta, max_epsilon)

"""Faults to build in on purpose, by patching from outside: the product has no switch for any of them.

Each is a context. Inside it everything trains, samples or pays as if a programmer had made that
mistake, so an audit that stays silent there proves nothing when it is silent about the real code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fedveil.client import budget
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.tasks.base import Sums
from fedveil.privacy import MECHANISMS, dpsgd, randomness
from fedveil.privacy import plan as planning
from fedveil.privacy.accounting import Release
from fedveil.privacy.entropy import replaced_entropy, system_integers
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import add_private_noise
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.together import together

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A mistake that can be planted; ``SOUND`` is none."""

    name: str
    """Empty: no fault."""
    plant: Plant = nullcontext


def same_seeds() -> None:
    """Set every seedable generator of this process, as a run with a public seed might."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def zero_noise(total: Tensor, _: float) -> Tensor:
    """Stand in for ``add_private_noise`` without noise."""
    return total.double()


def float_noise(total: Tensor, std: float) -> Tensor:
    """Stand in for ``add_private_noise`` with noise by inverse CDF of 52 bits, added in float64, on no grid."""
    bits = (system_integers(total.numel()) >> np.uint64(12)).astype(np.float64)
    noise = torch.special.ndtri(torch.from_numpy((bits + 0.5) * 2.0**-52)) * std
    return total.double() + noise.reshape(total.shape)


def noise_in_floating_point() -> AbstractContextManager[Any]:
    """Noise whose lowest bits, and gaps in the tails, tell what it was added to."""
    return patch.object(dpsgd, "add_private_noise", float_noise)


def noise_halved() -> AbstractContextManager[Any]:
    """Half the standard deviation."""
    return patch.object(dpsgd, "add_private_noise", lambda total, std: add_private_noise(total, std / 2))


@contextmanager
def noise_on_steps(has: Callable[[int], bool]) -> Iterator[None]:
    """No noise on the steps, counted from 0, that ``has`` denies it."""
    steps, add_noise = count(), dpsgd.ClipAndNoise.add_noise

    def sometimes(mechanism: Any) -> None:
        with nullcontext() if has(next(steps)) else patch.object(dpsgd, "add_private_noise", zero_noise):
            add_noise(mechanism)

    with patch.object(dpsgd.ClipAndNoise, "add_noise", sometimes):
        yield


def noise_on_every_second_step() -> AbstractContextManager[Any]:
    """No noise on the first step, the third and so on."""
    return noise_on_steps(lambda step: step % 2 == 1)


@contextmanager
def clip_times(factor: float) -> Iterator[None]:
    """Gradients up to ``factor`` times the bound, noise for the bound."""
    clip = dpsgd.ClipAndNoise.clip_and_accumulate

    def lax(mechanism: Any) -> None:
        mechanism.max_grad_norm *= factor
        clip(mechanism)
        mechanism.max_grad_norm /= factor

    with patch.object(dpsgd.ClipAndNoise, "clip_and_accumulate", lax):
        yield


def clip_doubled() -> AbstractContextManager[Any]:
    """Gradients up to twice the bound, noise for the bound."""
    return clip_times(2)


@contextmanager
def ledger_reset() -> Iterator[None]:
    """Every ledger that is opened is a new one: a fresh accountant each round."""
    opened = Ledger.__init__

    def forgetful(ledger: Ledger, path: Path, **words: Any) -> None:
        Path(path).unlink(missing_ok=True)
        opened(ledger, path, **words)

    with patch.object(Ledger, "__init__", forgetful):
        yield


def shared_seed() -> AbstractContextManager[Any]:
    """Noise and batches from a generator that every site seeds alike."""
    return replaced_entropy(lambda count: np.random.randint(0, 2**64, count, dtype=np.uint64))


def shuffled_epochs() -> Callable[[int, float], Tensor]:
    """Return a sampler that deals out shuffled records in batches of one size, as data loaders do."""
    pending: list[int] = []

    def sample(size: int, rate: float) -> Tensor:
        nonlocal pending
        if len(pending) < round(size * rate):
            pending = torch.randperm(size).tolist()
        taken, pending = pending[: round(size * rate)], pending[round(size * rate) :]
        return torch.tensor(taken)

    return sample


def shuffled_batches() -> AbstractContextManager[Any]:
    """Shuffled batches of one size, priced as Poisson samples."""
    return patch.object(randomness, "private_poisson_sample", shuffled_epochs())


def token_mean_loss() -> AbstractContextManager[Any]:
    """The mean over all tokens of the batch, as stock trainers take it, instead of one loss a record."""

    def losses(sums: Sums) -> Tensor:
        return sums.loss / sums.weight.sum() * len(sums.loss)

    return patch.object(Sums, "losses", property(losses))


def faulty_row(**overrides: Any) -> AbstractContextManager[Any]:
    """A mechanism that is wrong in its own row: ``overrides`` are its plan's, beside all that ``dp-sgd`` states."""
    plans = type("FaultyPlan", (PrivacyPlan,), overrides)
    return patch.dict(MECHANISMS, {"dp-sgd": type("FaultyRow", (DPSGD,), {"plans": plans})()})


class _Quiet(dpsgd.ClipAndNoise):
    """Clips and sums, and adds nothing."""

    def add_noise(self) -> None:
        for parameter in self.params:
            parameter.grad = parameter.summed_grad.to(parameter)


class _QuietSteps(dpsgd.PrivateSteps):
    clipping = _Quiet


class _ByTheBatch(dpsgd.PrivateSteps):
    """Divides by the records that the step has drawn, at least one."""

    def step(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        parts = list(batches)
        self._mechanism.expected_batch_size = max(1, sum(part.records for part in parts))
        super().step(parts, losses)


def row_without_noise() -> AbstractContextManager[Any]:
    """A row whose plan forgets the noise that it is priced with."""
    return faulty_row(stepping=lambda _: _QuietSteps)


def row_with_another_rate() -> AbstractContextManager[Any]:
    """A row whose plan draws twice as many records as it is priced for."""

    def sample(plan: PrivacyPlan, size: int) -> list[int]:
        drawn: list[int] = randomness.private_poisson_sample(size, min(1.0, 2 * plan.event.sample_rate)).tolist()
        return drawn

    return faulty_row(sample=sample)


def row_with_realised_divisor() -> AbstractContextManager[Any]:
    """A row whose plan divides by the batch that was drawn."""
    return faulty_row(stepping=lambda _: _ByTheBatch)


def row_with_another_price() -> AbstractContextManager[Any]:
    """A row whose plan is charged for more noise than it adds."""

    def release(plan: PrivacyPlan, steps: int) -> Release:
        return Release(plan.event.having(noise_multiplier=1.5 * plan.event.noise_multiplier), steps)

    return faulty_row(release=release)


def row_with_another_count() -> AbstractContextManager[Any]:
    """A row whose plan is charged for one step, however many it takes."""
    return faulty_row(release=lambda plan, _: Release(plan.event, 1))


def each_row_clipped() -> AbstractContextManager[Any]:
    """Each record of a person clipped by itself, as if it were a person."""

    def by_row(model: Any, records: Any, members: Sequence[Sequence[int]], shapes: Any = None) -> Iterator[Any]:
        return together(model, records, [[row] for own in members for row in own], shapes)

    return patch.object(planning, "together", by_row)


def persons_divided() -> AbstractContextManager[Any]:
    """The records of a person in two batches of the step, each clipped for itself."""

    def halves(model: Any, records: Any, members: Sequence[Sequence[int]], shapes: Any = None) -> Iterator[Any]:
        yield from together(model, records, [own[::2] for own in members], shapes)
        yield from together(model, records, [own[1::2] for own in members if len(own) > 1], shapes)

    return patch.object(planning, "together", halves)


@contextmanager
def divisor_of_records() -> Iterator[None]:
    """A divisor that counts the site's records instead of taking the size that it declares."""
    planned = budget.plan_of

    def counted(job: Any, site: Any, *rest: Any) -> Any:
        plan = planned(job, site, *rest)
        return replace(plan, expected_batch_size=plan.event.sample_rate * len(site.data.examples))

    with patch.object(budget, "plan_of", counted):
        yield


SOUND = Fault("")
HALVED = Fault("noise halved", noise_halved)
EVERY_SECOND = Fault("no noise on every second step", noise_on_every_second_step)
DOUBLED = Fault("clip doubled", clip_doubled)
UNCLIPPED = Fault("no clip", lambda: clip_times(1e4))
RESET = Fault("ledger reset each round", ledger_reset)
FLOATING = Fault("noise in floating point", noise_in_floating_point)
SHARED_SEED = Fault("one seed for all sites", shared_seed)
SHUFFLED = Fault("shuffled batches", shuffled_batches)
FLOAT_SUM = Fault(
    "sum in float32",
    lambda: patch.object(
        dpsgd.ClipAndNoise, "clip_and_accumulate", lambda own: super(dpsgd.ClipAndNoise, own).clip_and_accumulate()
    ),
)
TOKEN_MEAN = Fault("mean over the batch's tokens", token_mean_loss)
ROW_CLIPPED = Fault("each record of a person clipped by itself", each_row_clipped)
PERSON_DIVIDED = Fault("a person divided over batches", persons_divided)
PRIVATE_SIZE = Fault("divisor counts the records", divisor_of_records)
ROW_QUIET = Fault("a row that forgets the noise", row_without_noise)
ROW_RATE = Fault("a row that samples at another rate", row_with_another_rate)
ROW_DIVISOR = Fault("a row that divides by the batch", row_with_realised_divisor)
ROW_PRICE = Fault("a row that prices other noise", row_with_another_price)
ROW_COUNT = Fault("a row that prices one step", row_with_another_count)
ROWS = (ROW_QUIET, ROW_RATE, ROW_DIVISOR, ROW_PRICE, ROW_COUNT)
"""Mistakes that a new row of ``MECHANISMS`` may bring."""
FAULTS = (HALVED, EVERY_SECOND, DOUBLED, RESET, FLOATING, SHARED_SEED, SHUFFLED, TOKEN_MEAN, PRIVATE_SIZE)

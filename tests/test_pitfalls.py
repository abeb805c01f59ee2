"""The mechanism does what the ledger was charged for: as many steps, at that noise, clip and rate, by public figures.

The other pitfalls have their tests beside what they are about; docs/privacy.md has the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from one_site import OneSite, clinic

from client import local_training
from common.privacy import dpsgd
from common.privacy.dpsgd import PrivateSteps
from common.privacy.ledger import Ledger

STEPS, RATE, PUBLIC, RECORDS = 3, 0.25, 50, 40


@dataclass(frozen=True)
class Draw:
    """One noised step as the mechanism took it."""

    noise: float
    clip: float
    divisor: float


@dataclass
class Spy:
    """What the mechanism did, and what the sampler was asked for."""

    draws: list[Draw]
    samples: list[tuple[int, float]]
    empty: bool = False
    """Whether every sample is to come out empty."""


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy([], [])
    add_noise, sample = dpsgd._Mechanism.add_noise, local_training.private_poisson_sample

    def noisy(mechanism: Any) -> None:
        seen.draws.append(
            Draw(mechanism.noise_multiplier, mechanism.max_grad_norm, float(mechanism.expected_batch_size))
        )
        add_noise(mechanism)

    def sampled(size: int, rate: float) -> torch.Tensor:
        seen.samples.append((size, rate))
        return torch.arange(0) if seen.empty else sample(size, rate)

    monkeypatch.setattr(dpsgd._Mechanism, "add_noise", noisy)
    monkeypatch.setattr(local_training, "private_poisson_sample", sampled)
    return seen


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, "training.local-steps": STEPS, "training.sample-rate": RATE}, tmp_path, RECORDS)


def check_that_what_was_charged_is_what_was_done(site: OneSite, spy: Spy) -> None:
    site.train(1)
    spy.empty = True
    site.train(2)
    with Ledger(site.ledger) as ledger:
        rows = ledger.entries()
    assert sum(row.count for row in rows) == len(spy.draws) == 2 * STEPS, "charged steps are not the noised steps"
    assert {(row.noise_multiplier, row.clip_norm) for row in rows} == {(d.noise, d.clip) for d in spy.draws}
    assert spy.samples == [(RECORDS, row.sample_rate) for row in rows for _ in range(row.count)]
    assert {draw.divisor for draw in spy.draws} == {RATE * PUBLIC}, "the divisor knows how many records there are"


def test_what_was_charged_is_what_was_done_also_on_empty_batches(site: OneSite, spy: Spy) -> None:
    check_that_what_was_charged_is_what_was_done(site, spy)


def skip_empty_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PrivateSteps.step

    def skipping(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            step(steps, parts, losses)

    monkeypatch.setattr(PrivateSteps, "step", skipping)


def noise_less_than_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    def quieter(*args: Any, **kwargs: Any) -> PrivateSteps:
        return PrivateSteps(*args, **{**kwargs, "noise_margin": 0.9})

    monkeypatch.setattr(local_training, "PrivateSteps", quieter)


def divide_by_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = dpsgd._Mechanism.__init__

    def counted(mechanism: Any, *args: Any, **kwargs: Any) -> None:
        scale(mechanism, *args, **{**kwargs, "expected_batch_size": RATE * RECORDS})

    monkeypatch.setattr(dpsgd._Mechanism, "__init__", counted)


def shuffle_instead_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    # Over the spy: the mechanism no longer asks the Poisson sampler.
    monkeypatch.setattr(
        local_training, "private_poisson_sample", lambda size, rate: torch.randperm(size)[: round(rate * size)]
    )


@pytest.mark.parametrize(
    "fault", [skip_empty_batches, noise_less_than_charged, divide_by_the_records, shuffle_instead_of_sampling]
)
def test_a_fault_built_in_is_found(fault: Any, site: OneSite, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_that_what_was_charged_is_what_was_done(site, spy)

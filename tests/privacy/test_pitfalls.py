"""The mechanism does what the ledger was charged for: as many steps, at that noise, clip and rate, by public figures.

The other pitfalls have their tests beside what they are about; docs/concepts/evidence.md has the list.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from audits.account import PUBLIC, RECORDS, account_faults, account_site, spying
from audits.faults import (
    HALVED,
    PRIVATE_SIZE,
    RESET,
    ROW_COUNT,
    ROW_DIVISOR,
    ROW_PRICE,
    ROW_QUIET,
    ROW_RATE,
    SHUFFLED,
    Fault,
)
from audits.tiny_site import tiny_site
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.messages.round import TrainResult
from fedveil.privacy import dpsgd, plan
from fedveil.privacy.dpsgd import PrivateSteps

GPU = torch.device("cuda")


def test_what_was_charged_is_what_was_done_also_on_empty_batches(tmp_path: Path) -> None:
    assert account_faults(account_site(tmp_path)) == []


def skip_empty_batches() -> AbstractContextManager[Any]:
    step = PrivateSteps.step

    def skipping(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            step(steps, parts, losses)

    return patch.object(PrivateSteps, "step", skipping)


def noise_less_than_charged() -> AbstractContextManager[Any]:
    def quieter(*args: Any, **kwargs: Any) -> PrivateSteps:
        return PrivateSteps(*args, **{**kwargs, "noise_margin": 0.9})

    return patch.object(dpsgd, "PrivateSteps", quieter)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("empty batches skipped", skip_empty_batches), "charged steps are not the noised steps"),
        (Fault("less noise than charged", noise_less_than_charged), "noise or clip differ"),
        (PRIVATE_SIZE, "the divisor knows"),
        (SHUFFLED, "do not come from the sampler"),
        (RESET, "charged steps are not the noised steps"),
        (ROW_QUIET, "charged steps are not the noised steps"),
        (ROW_RATE, "do not come from the sampler at the rate"),
        (ROW_DIVISOR, "the divisor knows"),
        (ROW_PRICE, "carry other noise than was charged"),
        (ROW_COUNT, "charged steps are not the noised steps"),
        (HALVED, "carry other noise than was charged"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_fault_built_in_is_found(fault: Fault, words: str, tmp_path: Path) -> None:
    assert any(words in wrong for wrong in account_faults(account_site(tmp_path), fault))


MARGINS = pytest.mark.parametrize(("precision", "margin"), [("float32", 1.0), ("bfloat16", 1.0), ("bfloat16", 1.01)])


def with_margin(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the margin be that of another device, where it is not 1."""
    if margin != 1.0:
        real = plan.rounding_margin
        monkeypatch.setattr(plan, "rounding_margin", lambda _: real(GPU))


@MARGINS
def test_a_round_carries_the_noise_that_was_charged_and_the_margin_of_precision_and_device(
    precision: str, margin: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_margin(margin, monkeypatch)
    site = tiny_site(tmp_path, RECORDS, precision=precision)
    with spying() as spy:
        site.train(1)
    with Ledger(site.ledger) as ledger:
        (row,) = ledger.entries()
    assert len(spy.draws) == row.count
    assert all(draw.noise == pytest.approx(margin * row.event.noise_multiplier) for draw in spy.draws)


@MARGINS
def test_round_0_does_what_was_charged_for_it(
    precision: str, margin: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_margin(margin, monkeypatch)
    own = {"sample-rate": 0.3, "noise-multiplier": 5.0}
    settings = {"adapter.start": "dp-gradient"} | {f"start.{key}": value for key, value in own.items()}
    site = tiny_site(tmp_path, RECORDS, strategy="fed-sb", precision=precision, **settings)
    site.rule(min_noise_multiplier=7.0)
    with spying() as spy:
        reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    with Ledger(site.ledger) as ledger:
        (row,) = ledger.entries()
    assert (row.purpose, row.count) == ("initialisation", 1)
    assert (row.event.noise_multiplier, row.event.sample_rate, row.event.clip_norm) == (7.0, 0.3, 1.0), (
        "policy and settings did not hold"
    )
    assert spy.samples == [(RECORDS, 0.3)], "the records were not drawn by the sampler at the rate that was charged"
    (draw,) = spy.draws
    assert (draw.noise, draw.clip) == (pytest.approx(7.0 * margin), 1.0)
    assert draw.divisor == pytest.approx(0.3 * PUBLIC), "the divisor knows how many records there are"

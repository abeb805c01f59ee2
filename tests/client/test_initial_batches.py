"""Round 0 cuts its batch by the bytes of the records' gradients, and the cut does not change what is sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audits.tiny_site import OneSite, clinic
from audits.worlds import plan
from fedveil.client import app
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import l2_norm, subtract
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.starts import dp_gradient
from fedveil.common.starts import gradient as initial_gradient
from fedveil.common.starts.gradient import private_gradient, record_bytes
from fedveil.privacy.plan import PrivacyPlan

pytestmark = pytest.mark.rough_prices

RECORDS = 40


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    own = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0, "privacy.epsilon": 50.0}
    return clinic({**toy_settings, **own}, tmp_path, RECORDS)


def parts_of(site: OneSite, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[FixedBatch]:
    """Return the parts in which the site computes round 0 with ``limit`` bytes for the records' gradients."""
    seen: list[FixedBatch] = []

    def spy(model: FederatedModel, parts: Iterable[FixedBatch], figures: PrivacyPlan, _: Any) -> AdapterState:
        seen.extend(parts)
        return private_gradient(model, seen, figures)

    site.memory.clear()
    site.model().initial_shapes = None
    app.process.rehearsals.forget()
    with monkeypatch.context() as patch:
        patch.setattr(initial_gradient, "BATCH_BYTES", limit)
        patch.setattr(dp_gradient, "private_gradient", spy)
        reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    assert sum(part.records for part in seen) == RECORDS
    return seen


def test_a_record_weighs_as_much_as_the_adapted_layers(site: OneSite) -> None:
    # Tiny BERT, both of its layers: query, value, attention output (16 × 16), intermediate and output (16 × 24).
    assert record_bytes(site.model()) == 2 * (3 * 16 * 16 + 2 * 16 * 24) * 4


def test_parts_keep_to_the_bytes_and_the_gradient_does_not_depend_on_them(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = site.model()
    one = record_bytes(model)
    cuts = {most: parts_of(site, most * one, monkeypatch) for most in (0, 3, 1000)}
    largest = {most: max(part.rows for part in parts) for most, parts in cuts.items()}
    assert (largest[0], largest[3]) == (1, 3), "round 0 holds more records' gradients at once than it may"
    assert largest[1000] > 3, "the tokens alone cut as finely: the test tests nothing"
    gradients = {most: private_gradient(model, parts, plan(clip=0.05)) for most, parts in cuts.items()}
    for most in (0, 3):
        apart = l2_norm(subtract(gradients[most], gradients[1000])) / l2_norm(gradients[1000])
        assert apart < 1e-5, f"cut by {largest[most]} records the gradient is off by {apart:.1e} of its length"

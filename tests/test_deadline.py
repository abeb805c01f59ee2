"""A site with ``reply-after`` answers at a fixed time, whatever its records are; what cannot be in time sends noise."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from one_site import OneSite, clinic

from client import app, deadline
from client.deadline import Deadline, Timing, TooLate
from common.errors import PolicyRefusal
from common.messages import Refusal, TrainResult
from common.model import FederatedModel
from common.tensors import entries

TIMING = Timing(passes={8: 0.1, 24: 0.3}, rows={8: 40, 24: 10}, empty=0.5, score=0.01)


def test_the_worst_round_has_all_its_records_in_the_slowest_shape() -> None:
    # 25 expected records: 55 at six deviations, so six passes of 24 tokens and two of 8.
    assert TIMING.worst(steps=2, batch=25.0, scored=0) == pytest.approx(2 * (0.5 + 6 * 0.3))
    assert TIMING.worst(steps=2, batch=25.0, scored=100) == pytest.approx(2 * (0.5 + 6 * 0.3) + 1.0)


def test_a_time_below_the_worst_is_refused_and_none_is_as_fast_as_it_goes() -> None:
    with pytest.raises(PolicyRefusal, match=r"reply-after = 3; by made-up records a round of this run may take 4\.6"):
        Deadline(3.0).allow(4.6)
    Deadline(5.0).allow(4.6)
    Deadline().allow(1e9)
    Deadline().check(1e9)


def test_no_pass_is_begun_that_might_not_end_in_time_and_a_models_own_time_does_not_count() -> None:
    deadline = Deadline(10.0, began=time.monotonic() - 8.0)
    deadline.check(reserve=1.0)
    with pytest.raises(TooLate):
        deadline.check(reserve=3.0)
    before = deadline.began
    with deadline.extended():
        time.sleep(0.05)
    assert 0.05 <= deadline.began - before < 5.0


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every pass of a step take longer than it was rehearsed to take."""
    losses = FederatedModel.losses

    def later(model: FederatedModel, batch: Any) -> Any:
        time.sleep(seconds)
        return losses(model, batch)

    monkeypatch.setattr(FederatedModel, "losses", later)


def test_a_round_that_would_be_late_sends_noise_in_time(
    site: OneSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.train(1, run="warm")
    seconds = _worst(site) + 1.0
    site.rule(reply_after=seconds)
    slow(monkeypatch, 0.7 * seconds)
    began = time.monotonic()
    task = site.task(1)
    reply = site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert time.monotonic() - began < 2 * seconds
    assert any("noise alone is sent: TooLate" in record.getMessage() for record in caplog.records)
    moved = [float((t != task.state[layer][name]).double().mean()) for layer, name, t in entries(reply.contribution)]
    assert all(share > 0.9 for share in moved)
    assert len(site.charges()) == 2


def test_a_policy_whose_time_is_too_short_refuses_before_the_charge(site: OneSite) -> None:
    site.train(1, run="warm")
    site.rule(reply_after=1e-6)
    reply = site.ask(site.task(1))
    assert isinstance(reply, Refusal)
    assert (reply.kind, "reply-after = 1e-06" in reply.reason) == ("policy", True)
    assert len(site.charges()) == 1


def _worst(site: OneSite) -> float:
    (timing,) = app._process.rehearsed.values()
    return timing.worst(10, 50.0, 0)


@pytest.mark.parametrize("long", [False, True], ids=["short records", "one long record"])
def test_the_answer_leaves_at_its_time_whatever_the_records_are(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [100.0], list[float]()
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(deadline.time, "sleep", lambda seconds: slept.append(seconds))
    at = Deadline(10.0, began=clock[0])
    clock[0] += 7.0 if long else 0.2
    at.wait()
    assert clock[0] + slept[0] == pytest.approx(110.0)


def test_an_answer_behind_its_time_is_said_at_the_site(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Deadline(1.0, began=time.monotonic() - 3.0).wait()
    assert "is not covered by the claim" in caplog.text

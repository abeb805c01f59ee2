"""Fixtures of the folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
from deployed import FakeControl

from fedveil.common.run_lines import Status
from fedveil.deploy import registry
from fedveil.deploy import submit as submission


@pytest.fixture
def fake_control(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeControl]:
    def make(*results: Status, statuses: tuple[str, ...] = ()) -> FakeControl:
        control = FakeControl(list(results), list(statuses))
        for module in (submission, registry):
            monkeypatch.setattr(module, "control_of", lambda folder: nullcontext(control))
        return control

    return make

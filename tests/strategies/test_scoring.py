"""What a run says of its model is what its saved adapter does."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies import STRATEGIES

pytestmark = pytest.mark.rough_prices


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stock_peft_scores_a_runs_adapter_as_the_runs_last_line_does(
    strategy: str, toy_settings: dict[str, Any]
) -> None:
    """In bfloat16; ``test_contracts`` and ``test_systems`` have the other precision."""
    settings = {**toy_settings, "strategy": strategy, "precision": "bfloat16", "privacy.mode": "none", "rounds": 1}
    folder = run_in_process({**settings, "training.learning-rate": 0.05, "server.optimizer": "none"}, 2)
    last, scored = read_lines(RoundLine, folder)[-1], evaluate_run(folder)
    # A change beside the base is added to its weights in the export, which rounds them.
    beside = STRATEGIES[strategy].adapters.default == "lora-merged"
    assert scored.accuracy == last.accuracy
    assert scored.loss == pytest.approx(last.loss, rel=1e-3 if beside else 0, abs=0)

"""rsLoRA, ``adapter.scale = "sqrt-rank"``: what is added does not shrink as the rank grows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runs import seeded_entropy
from peft import PeftModel
from private_problem import gap, problem, train_privately
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from fedveil.common.adapters import LoRA, LoRAFrozenA
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.adapters.layers import layers_of
from fedveil.common.config.sections import SCALES
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.randomness import stream
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

RSLORA = {"adapter.scale": "sqrt-rank"}


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_run_is_loras_at_alpha_times_the_root_of_the_rank_bit_for_bit(
    mode: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**toy_settings, "strategy": "fedavg-lora", "adapter.rank": 4, "privacy.mode": mode}
    ended = []
    for more in ({**RSLORA, "adapter.alpha": 6.0}, {"adapter.alpha": 12.0}, {"adapter.alpha": 6.0}):
        own = {**settings, **more, "output": str(tmp_path / str(len(ended)))}  # and ledgers of its own
        with seeded_entropy():
            ended.append(load_file(run_in_process(own, 2) / "adapter" / "adapter_model.safetensors"))
    rooted, same, plain = ended
    assert all(torch.equal(rooted[name], same[name]) for name in rooted)
    assert any(not torch.equal(rooted[name], plain[name]) for name in rooted), "the scale changes nothing"


def test_it_trains_as_lora_does_at_another_rate_and_clip_under_dp_sgd() -> None:
    A, x, y, noise = problem(4)
    plain, rooted = (LoRAFrozenA(len(A), 6.0, ("l",), scale=scale) for scale in ("rank", "sqrt-rank"))
    c = rooted.scaling / plain.scaling
    assert c == pytest.approx(math.sqrt(len(A)))
    wanted, clipped = train_privately(plain, A, x, y, noise, 0.05, 0.6)
    found, _ = train_privately(rooted, A, x, y, noise, 0.05 / c**2, c * 0.6)
    assert clipped > 0.2
    assert gap(wanted, found) < 1e-12
    assert gap(wanted, train_privately(rooted, A, x, y, noise, 0.05, 0.6)[0]) > 1e-3


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_the_noise_in_the_weights_is_alpha_times_that_of_one_column_at_every_rank(rank: int) -> None:
    out, into, alpha, std, draws = 40, 64, 8.0, 0.3, 400
    A = orthonormal_rows(rank, into, stream(1, "A")).double()
    noise = std * torch.randn(draws, out, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    for scale, wanted in (("sqrt-rank", alpha), ("rank", alpha / math.sqrt(rank))):
        adapter = LoRAFrozenA(rank, alpha, ("l",), scale=scale)
        squares = [float(adapter.delta({"A": A, "B": x}).square().sum()) for x in noise]
        # Of k normal numbers the mean square has the relative error √(2/k), here at most 0.6 %.
        assert sum(squares) / draws == pytest.approx((wanted * std) ** 2 * out, rel=0.03)


def test_an_alpha_that_is_left_open_is_the_scale_1_under_either_rule() -> None:
    """What is calibrated is the length of A (``common.starts.calibration``), at that scale."""
    for scale in SCALES:
        job = configure({"strategy": "ffa-lora", "adapter.alpha": 0.0, "adapter.scale": scale})
        assert job.adapter.scaling == pytest.approx(1.0, rel=1e-12)
        assert (job.adapter.scale, job.adapter.rank) == (scale, 8)


def test_the_export_says_rslora_and_scores_as_the_run(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process({**toy_settings, **RSLORA, "privacy.mode": "none"}, 2)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 3, 6.0)
    last = read_lines(RoundLine, folder)[-1]
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (last.accuracy, last.loss)


def test_stock_peft_computes_with_the_same_scale(model_folder: Any, tmp_path: Path) -> None:
    adapter = LoRA(3, 6.0, ("query",), STARTS["orthonormal"](), scale="sqrt-rank")
    base: nn.Module = AutoModel.from_pretrained(model_folder("bert"))
    model = attach(adapter, base, 1)
    adapter.export(model, read_factors(adapter, model), tmp_path, model_folder("bert"))
    stock: Any = PeftModel.from_pretrained(AutoModel.from_pretrained(model_folder("bert")), str(tmp_path))
    for attached in (model, stock):
        scales = {scale for layer in layers_of(attached).values() for scale in layer.scaling.values()}
        assert scales == {6.0 / math.sqrt(3)} == {adapter.scaling}


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ('strategy="fed-sb" adapter.scale="sqrt-rank"', "'sqrt-rank' has no effect on 'lora-sb'.*leave it at 'rank'"),
        ('adapter.scale="root"', "adapter.scale"),
    ],
)
def test_a_scale_that_an_adapter_does_not_have_is_refused(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(parse_settings([chosen]))

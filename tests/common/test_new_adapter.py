"""An adapter that nothing else knows of: its file and its row are enough for tables, planner, wire and a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from docs.make.tables import strategy_table
from fedveil.common.adapters import ADAPTERS, Place
from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.layers import ADAPTER_NAME, layer_shape, layers_of
from fedveil.common.adapters.lora import LoRA
from fedveil.common.adapters.low_rank import lora_modules
from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import decode_state, encode_state, layout_of
from fedveil.common.messages.state import HEAD, Factors
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.planner.forecast import forecast
from fedveil.server.model import ServerModel
from fedveil.strategies import STRATEGIES
from fedveil.strategies.base import Facts, Takes
from fedveil.strategies.fedavg import FedAvgLoRA
from fedveil.strategies.job import configure
from fedveil.strategies.payload import payload, preset_adapter, travels

pytestmark = pytest.mark.rough_prices


class Scale(nn.Module):
    """z ↦ h * z, elementwise over the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


@dataclass(frozen=True)
class Scaled(LoRA):
    """W = W0 + s diag(Z) B A with a trained vector Z (out,) over seeded, frozen A and B."""

    name: ClassVar[str] = "scaled"
    trained: ClassVar[tuple[str, ...]] = ("Z",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "B")
    traits: ClassVar[Traits] = Traits(linear=True, noise="s diag(x_Z) B A")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(out, into), "Z": (out,)}

    def prepare(self, model: Any) -> None:
        for layer in layers_of(model).values():
            B = lora_modules(layer)["B"]
            layer.lora_B[ADAPTER_NAME] = nn.Sequential(B, Scale(layer_shape(layer)[0]))

    def factor_modules(self, layer: Any) -> dict[str, nn.Module]:
        B, Z = layer.lora_B[ADAPTER_NAME]
        return {"A": layer.lora_A[ADAPTER_NAME], "B": B, "Z": Z}

    def constants(self, place: Place) -> Factors:
        return {"B": torch.ones(place.out, self.rank)}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        return factors["Z"][:, None] * super().delta(factors)

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        return {"A": factors["A"], "B": factors["Z"][:, None] * factors["B"]}


@dataclass(frozen=True)
class ScaledAverage(FedAvgLoRA):
    """The average over the made-up adapter."""

    name: ClassVar[str] = "scaled-average"
    facts: ClassVar[Facts] = Facts("none", exact="linear")
    adapters: ClassVar[Takes] = Takes("scaled")


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, Scaled.name, Scaled)
    monkeypatch.setitem(STRATEGIES, ScaledAverage.name, ScaledAverage)


def test_the_table_has_its_row_with_bytes_of_its_own() -> None:
    (row,) = (line for line in strategy_table().splitlines() if "`scaled-average`" in line)
    assert row.split(" | ")[1:] == [
        "`scaled`",
        "Z",
        "18,432",
        "18,432",
        "yes",
        "s diag(x_Z) B A",
        "dp-sgd, secure-sum, client-level, none |",
    ]


@pytest.mark.parametrize("chosen", [{"adapter.name": "scaled"}, {"strategy": "scaled-average"}])
def test_the_plan_counts_what_the_run_sends(chosen: dict[str, Any], toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "strategy": "fedavg-lora", "privacy.mode": "none", "rounds": 1, **chosen}
    job = configure(settings)
    before = forecast(job, (60, 60), calibrated=False)
    rounds = read_lines(RoundLine, run_in_process(settings, 2))
    assert before.payloads[job.strategy.name] == (before.traffic.down, before.traffic.up)
    assert sum(line.bytes_up for line in rounds) == 2 * before.traffic.up
    # Five layers in each of two blocks with outputs 16, 16, 16, 24 and 16, and a head of 2 × 16 + 2.
    assert before.traffic.up == 4 * (2 * (4 * 16 + 24) + 34)
    other = preset_adapter(STRATEGIES["fed-sb"], job.adapter.rank)
    shapes = [(16, 16)] * 6 + [(24, 16), (16, 24)] * 2
    assert before.payloads["fed-sb"][1] == payload(STRATEGIES["fed-sb"](), other, shapes)[1] + 4 * 34


def test_a_job_for_other_strategies_is_planned_beside_it(toy_settings: dict[str, Any]) -> None:
    before = forecast(configure({**toy_settings, "privacy.mode": "none"}), (60, 60), calibrated=False)
    assert {"scaled-average", "ffa-lora"} <= set(before.payloads)


def test_the_wires_layout_is_that_of_its_shapes(toy_settings: dict[str, Any]) -> None:
    job = configure({**toy_settings, "adapter.name": "scaled", "strategy": "fedavg-lora"})
    server = ServerModel(job)
    layers = layers_of(server.model.peft_model)
    expected = {name: {"Z": job.adapter.shapes(*layer_shape(layer))["Z"]} for name, layer in layers.items()}
    layout = server.reply_layout(1)
    assert {name: shapes for name, shapes in layout.items() if name != HEAD} == expected
    sent = server.trained_start()
    assert layout_of(decode_state(encode_state(sent), layout)) == layout
    down, up = travels(job.strategy, job.adapter, 24, 16)
    assert layout_of(down) == layout_of(up) == {"layer": {"Z": (24,)}}


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_it_trains_exports_and_scores_in_a_run(mode: str, toy_settings: dict[str, Any]) -> None:
    own = {"adapter.name": "scaled", "strategy": "fedavg-lora", "privacy.mode": mode}
    folder = run_in_process({**toy_settings, **own}, 2)
    exported = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    assert all(tensor.any() for name, tensor in exported.items() if "lora_B" in name), "Z stayed 0 somewhere"
    assert evaluate_run(folder).accuracy == read_lines(RoundLine, folder)[-1].accuracy


def test_a_strategy_that_needs_other_factors_refuses_it(toy_settings: dict[str, Any]) -> None:
    for strategy in ("ffa-lora", "fed-sb", "fed-svd"):
        with pytest.raises(ConfigError, match="not on 'scaled', which trains Z and freezes A and B"):
            configure({**toy_settings, "strategy": strategy, "adapter.name": "scaled"})

"""Calibration of a start: gradients as long as with random rows, by the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from starts_world import RANK, TEXTS, Folder, moments, tiny

from audits.tiny_models import TARGETS, write_reviews
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.base import FreeScale
from fedveil.common.adapters.layers import layers_of, stored_transposed
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.starts.calibration import calibrated
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.common.starts.gradient import mean_gradient
from fedveil.common.tasks import wording_of
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.starts.eva import EVA
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]


# --- calibration ------------------------------------------------------------------------------------------------------
def gradients(model: FederatedModel, state: AdapterState, records: list[Any]) -> list[float]:
    """Return the length of each record's gradient of all B, taken off the model as it trains."""
    model.write(state)
    model.module.eval()
    factors = [p for layer, own in model.trained().items() if layer != HEAD for p in own.values()]
    found = [torch.autograd.grad(model.losses(model.batch([record])).sum(), factors) for record in records]
    return [float(torch.stack([g.norm() for g in one]).norm()) for one in found]


def random_rows(state: AdapterState, generator: torch.Generator) -> AdapterState:
    return {
        layer: {"A": orthonormal_rows(RANK, factors["A"].shape[1], generator)}
        for layer, factors in state.items()
        if layer != HEAD
    }


@pytest.fixture(scope="module")
def with_random_rows(model_folder: Folder) -> tuple[AdapterState, float]:
    """Return what is beside the rows of A, and of a hundred models with random ones the length that is wanted.

    That is each record's root mean square, as it trains, and the median over records.
    """
    model = tiny(model_folder("bert"), "bert", STARTS["orthonormal"]())
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares = torch.zeros(len(records), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for _ in range(100):
        drawn = random_rows(model.start, generator)
        squares += torch.tensor(gradients(model, merge(model.start, drawn), records)).square() / 100
    beside = {layer: {n: t.clone() for n, t in f.items() if n != "A"} for layer, f in model.start.items()}
    return beside, float(squares.sqrt().median())


@pytest.mark.parametrize("name", ["eva", "shards", "svd-of-weights", "kaiming", "minor-of-weights", "nystrom"])
def test_after_calibration_gradients_are_as_long_as_with_random_rows(
    model_folder: Folder, with_random_rows: tuple[AdapterState, float], name: str
) -> None:
    model = tiny(model_folder("bert"), "bert", STARTS[name]())
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    state = model.start
    if name == "eva":
        found = moments(model, TEXTS)
        given = {layer: model.adapter.begin(EVA().from_statistic(held, RANK), {}) for layer, held in found.items()}
        state = merge(state, given)
    beside, wanted = with_random_rows
    for layer, factors in beside.items():
        assert all(torch.equal(state[layer][n], tensor) for n, tensor in factors.items()), "more than A is another"
    after = torch.tensor(gradients(model, calibrated(model, state, records), records)).median()
    assert float(after) == pytest.approx(wanted, rel=0.03)  # a hundred draws know it to 1 %


@pytest.mark.parametrize("name", ["lora-frozen-b", "lora-diagonal", "lora-increments", "salt"])
def test_so_are_those_of_an_adapter_that_trains_something_else_than_b(model_folder: Folder, name: str) -> None:
    """Factors of a free scale alone are scaled; the median is that of a hundred models of random directions."""
    model = tiny(model_folder("bert"), "bert", STARTS["svd-of-weights"](), name)
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares, generator = torch.zeros(len(records), dtype=torch.float64), torch.Generator().manual_seed(4)
    for _ in range(100):
        drawn: AdapterState = {}
        for layer, factors in model.start.items():
            if layer != HEAD:
                letters = [n for n in ("A", "B", "C") if n in model.adapter.frozen]
                rows = {n: orthonormal_rows(RANK, max(factors[n].shape), generator) for n in letters}
                sides = {n: made.T if n == "B" else made for n, made in rows.items()}
                drawn[layer] = {**factors, **model.adapter.begin(sides, {**factors, **sides})}
        squares += torch.tensor(gradients(model, merge(model.start, drawn), records)).square() / 100
    free = cast(FreeScale, model.adapter.traits.free_scale).factors
    long = {
        layer: {n: 7 * t if n in free else t for n, t in f.items()} if layer != HEAD else f
        for layer, f in model.start.items()
    }
    for state in (model.start, long):
        made = calibrated(model, state, records)
        after = float(torch.tensor(gradients(model, made, records)).median())
        assert after == pytest.approx(float(squares.sqrt().median()), rel=0.08)
        for layer, factors in made.items():
            for factor, tensor in factors.items():
                if layer == HEAD or factor not in free:
                    assert torch.equal(tensor, model.start[layer][factor])


def test_calibration_is_the_ratio_of_medians_and_moves_a_alone(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"), "bert", STARTS["shards"](normalised=False))  # type: ignore[call-arg]
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    thrice = {
        layer: {n: 3 * t if n == "A" else t for n, t in f.items()} if layer != HEAD else f
        for layer, f in model.start.items()
    }
    made, again = (calibrated(model, state, records) for state in (model.start, thrice))
    for layer, factors in made.items():
        for name, tensor in factors.items():
            assert torch.allclose(tensor, again[layer][name], rtol=1e-5), f"{layer}.{name} depends on A's length before"
            if name != "A":
                assert torch.equal(tensor, model.start[layer][name])
    assert max(gradients(model, thrice, records)) > 2 * max(gradients(model, made, records))


def test_a_calibrated_run_sends_its_a_once_and_a_head_of_zeros_is_refused(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "ffa-lora", "adapter.start": "svd-of-weights", "adapter.alpha": 0.0, "rounds": 2}
    lines = read_lines(RoundLine, run_in_process({**toy_settings, **own}, 2))
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert lines[1].bytes_down > lines[2].bytes_down
    server = ServerModel(configure({**toy_settings, **own, "head.start": "zeros"}))
    with pytest.raises(ModelError, match=r"adapter\.alpha cannot be calibrated"):
        server.calibrated(server.start)


@pytest.mark.parametrize("start", ["svd-of-weights", "lora-ga"])
def test_calibration_of_both_factors_scales_the_change_and_leaves_the_start_and_the_model(
    model_folder: Folder, toy_settings: dict[str, Any], start: str, tmp_path: Path
) -> None:
    """PiSSA and LoRA-GA: one scale in every layer, so that the model begins as its base and is exported as it is."""
    own = {"strategy": "fedavg-lora", "adapter.name": "lora-increments", "adapter.start": start, "adapter.alpha": 0.0}
    if start == "lora-ga":
        own["start.data"] = str(write_reviews(tmp_path / "public.csv", 40, seed=1))
    else:
        own["start.singular-values"] = True
    server = ServerModel(configure({**toy_settings, **own}))
    state = server.start
    if start == "lora-ga":
        state = server.job.begin(state, server.public_statistic()).adapter
    made = server.calibrated(state)
    scales = {float(factors["s"]) for layer, factors in made.items() if layer != HEAD}
    assert len(scales) == 1
    assert scales != {1.0}
    for layer, factors in made.items():
        for name, tensor in factors.items():
            assert name == "s" or torch.equal(tensor, state[layer][name]), (
                f"{layer}.{name} is not as the start gives it"
            )
    before, after = server.score(state), server.score(made)
    assert after == before, "the model begins as another one"
    # What came out of training, and what stock PEFT makes of its export, are one model.
    folder = run_in_process({**toy_settings, **own, "rounds": 2}, 2)
    lines = read_lines(RoundLine, folder)
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert lines[1].bytes_down > lines[2].bytes_down, "the scale does not travel once"
    scored = evaluate_run(folder)
    assert scored.loss == pytest.approx(lines[-1].loss, rel=1e-5)


def test_a_scale_is_calibrated_of_both_factors_gradients_by_the_formula(model_folder: Folder) -> None:
    """The median over records of √Σ (r/m + r/n)‖G‖², over that of √Σ ‖Bᵀ G‖² + ‖G Aᵀ‖², from gradients of weights."""
    model = tiny(model_folder("bert"), "bert", STARTS["svd-of-weights"](), "lora-increments")
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares = torch.zeros(3, len(records), dtype=torch.float64)
    for i, record in enumerate(records):
        for layer, held in mean_gradient(model, [model.batch([record])]).items():
            G, f = held["G"].double(), {n: t.double() for n, t in model.start[layer].items()}
            of_b, of_a = (G @ f["A"].T).square().sum(), (f["B"].T @ G).square().sum()
            squares[0, i] += (RANK / G.shape[0] + RANK / G.shape[1]) * G.square().sum()
            squares[1, i] += of_a + of_b
            squares[2, i] += of_b
    want, have, one = squares.sqrt().median(1).values.tolist()
    made = calibrated(model, model.start, records)
    for layer, factors in made.items():
        if layer != HEAD:
            assert float(factors["s"]) == pytest.approx(want / have, rel=1e-4)
            assert float(factors["s"]) != pytest.approx(want / one, rel=0.02), "one half would do: nothing is proved"


def test_a_square_layer_that_is_stored_transposed_is_calibrated_as_it_computes(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "gpt2", "attn.c_proj")
    model = tiny(model_folder("gpt2"), "gpt2", STARTS["svd-of-weights"]())
    assert all(stored_transposed(layer) for layer in layers_of(model.peft_model).values())
    records = model.prepare([wording_of(model.task).text(text) for text in TEXTS])
    squares = torch.zeros(2, len(records), dtype=torch.float64)
    for i, record in enumerate(records):
        for layer, held in mean_gradient(model, [model.batch([record])]).items():
            G, A = held["G"].double(), model.start[layer]["A"].double()
            assert G.shape[0] == G.shape[1], "another shape would be an error, and no wrong length"
            squares[0, i] += RANK / G.shape[1] * G.square().sum()
            squares[1, i] += (G.T @ A.T).square().sum()
    wanted, turned = squares.sqrt().median(1).values.tolist()
    found = gradients(model, calibrated(model, model.start, records), records)
    assert float(torch.tensor(found).median()) == pytest.approx(wanted, rel=1e-3)
    plain = float(torch.tensor(gradients(model, model.start, records)).median())
    assert plain / turned != pytest.approx(1.0, rel=0.02), "either orientation is as long: nothing is proved"


def test_an_adapter_has_a_scale_that_a_start_may_choose_or_says_why_not() -> None:
    for adapter in ADAPTERS.values():
        free = adapter.traits.free_scale
        assert free, adapter.name
        assert isinstance(free, str) or {*free.factors} <= {*adapter.frozen}, adapter.name


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"strategy": "fed-sb"}, "'lora-sb' has orthonormal factors"),
        ({"strategy": "fedavg-lora"}, "'lora' trains A, so that a length given to it does not last: give it a number"),
        ({"strategy": "fedex-lora"}, "'lora-merged' trains A"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora"}, "'dora' trains A, .* magnitudes, which have no scale"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora-magnitude"}, "'dora-magnitude' trains magnitudes alone"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora-frozen-norm"}, "trains magnitudes beside B"),
        ({"strategy": "fedavg-lora", "adapter.name": "randlora"}, "'randlora' has random bases of length 1"),
        ({"strategy": "fedavg-lora", "adapter.name": "none"}, "'none' has no factor: give it a number"),
        ({"strategy": "fed-svd"}, "gives A another length"),
        (
            {"strategy": "ffa-lora", "adapter.start": "public-gradient", "start.data": "a.csv"},
            "'public-gradient' moves the weights by start.step",
        ),
        (
            {"strategy": "fedavg-lora", "adapter.name": "lora-frozen-b", "adapter.start": "public-metric"},
            "'public-metric' has a length of its own",
        ),
        (
            {"strategy": "ffa-lora", "model.task": "image-classification", "head.start": "random"},
            "public phrases, but model.task 'image-classification' holds no words",
        ),
    ],
)
def test_alpha_is_calibrated_only_where_the_scale_is_free(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.alpha is 0, .*{named}"):
        configure({"adapter.alpha": 0.0, **values})

"""Intruder dimensions: invariants Q1 to Q4, in float64 on layers of every orientation, and of whole runs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import MadeRun
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from spoilt_files import nothing_opened, spoil
from swept_rows import row as swept
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import fedveil.contrib.experiments.intruders
import fedveil.contrib.experiments.spectra
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.errors import ConfigError, DataError, ModelError
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import entries, merge
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.contrib.experiments.__main__ import app
from fedveil.contrib.experiments.intruders import _factors, intruders_of, noise_alone
from fedveil.contrib.experiments.spectra import Spectrum, count_above, spectrum_of, top_of
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.sweep.groups import groups
from fedveil.experiments.sweep.summary import markdown_of
from fedveil.server.checkpoint import saved_state
from fedveil.server.noise import site_noise
from fedveil.server.optimizer import server_step
from fedveil.server.ruled import within_noise
from fedveil.strategies.job import configure
from fedveil.strategies.rules import RULES

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

SHAPES = ((90, 90), (110, 80), (80, 110), (30, 12), (12, 30))
RANK = 4


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(out: int, into: int, length: float) -> tuple[Tensor, Spectrum, Tensor, Tensor]:
    """Return a weight, its spectrum, and a change whose rows of A are orthonormal."""
    weight = normal(out, into)
    A = torch.linalg.qr(normal(into, RANK, seed=2))[0].T
    return weight, spectrum_of(weight), length * normal(out, RANK, seed=3), A


@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_q1_values_and_cosines_are_those_of_the_whole_decomposition(out: int, into: int) -> None:
    weight, before, B, A = changed(out, into, 2.0)
    for own in (B, torch.cat([B[:, :1]] * RANK, 1)):  # the second without full rank
        vectors, values, _ = torch.linalg.svd(weight + own @ A, full_matrices=False)
        made = top_of(before, own, A, 10)
        assert float((made.values - values[:10]).abs().max()) < 1e-10
        assert float((made.cosines - (before.left.T @ vectors[:, :10]).abs().amax(0)).abs().max()) < 1e-8


def test_q1_a_span_that_is_taken_for_the_whole_space_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, before, B, A = changed(110, 80, 2.0)
    wanted = torch.linalg.svdvals(weight + B @ A)[:10]
    monkeypatch.setattr(fedveil.contrib.experiments.spectra, "_coordinates", lambda basis, columns: basis.T @ columns)
    assert float((top_of(before, B, A, 10).values - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_q2_the_inertia_count_is_the_number_of_singular_values_above_a_bound(out: int, into: int) -> None:
    weight, before, B, A = changed(out, into, 1.0)
    values = torch.linalg.svdvals(weight + B @ A)
    for bound in torch.linspace(0.05, 1.2 * float(values[0]), 40).tolist():
        assert count_above(before, B, A, bound) == int((values > bound).sum()), bound


@pytest.mark.parametrize(("out", "into"), [(200, 160), (160, 200)])
def test_q4_nothing_makes_no_intruder_and_noise_that_is_long_enough_makes_one_for_each_of_its_columns(
    out: int, into: int
) -> None:
    """On a spectrum that falls as that of the default model's layers does, by a hundredth from value to value."""
    columns, count = 8, min(out, into)
    left, right = (torch.linalg.qr(normal(side, count, seed=side))[0] for side in (out, into))
    weight = left @ torch.diag(10 * 0.99 ** torch.arange(count, dtype=torch.float64)) @ right.T
    before, A = spectrum_of(weight), torch.linalg.qr(normal(into, columns, seed=2))[0].T
    zero = torch.zeros(out, columns, dtype=torch.float64)
    none = top_of(before, zero, A, 10)
    assert float((1 - none.cosines).abs().max()) < 1e-8
    assert torch.equal(none.values, none.values.sort(descending=True).values)
    edge = float(before.values[9])

    def intruders(times: float, seed: int) -> int:
        """Return how many noise makes whose least singular value is ``times`` the weight's tenth."""
        noise = normal(out, columns, seed=100 + seed)
        noise *= times * edge / float(torch.linalg.svdvals(noise)[-1])
        return int((top_of(before, noise, A, 10).cosines < 0.5).sum())

    assert [intruders(1.2, seed) for seed in range(20)] == 20 * [columns]
    assert [intruders(0.2, seed) for seed in range(20)] == 20 * [0]
    assert count_above(before, zero, A, edge * (1 + 1e-9)) == 9
    assert count_above(before, zero, A, edge * (1 - 1e-9)) == 10


NOISY: dict[str, Any] = {
    "training.optimizer": "sgd",
    "training.learning-rate": 1.0,
    "training.local-steps": 1,
    "server.optimizer": "none",
    "rounds": 1,
    "privacy.clip-norm": 0.1,
}


@pytest.fixture(scope="module")
def gpt2(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose layers are kept transposed, and whose noise drowns all."""
    from audits.tiny_models import TARGETS, toy_run

    settings = toy_run(model_folder("gpt2"), tmp_path_factory.mktemp("gpt2"))
    noise = {"privacy.noise-multiplier": 3000.0, "adapter.start": "orthonormal"}
    return run_in_process({**settings, **NOISY, **noise, "adapter.targets": TARGETS["gpt2"]}, 2)


def test_q3_a_transposed_layer_is_oriented_first_and_noise_stands_beside_noise(gpt2: Path) -> None:
    rows = intruders_of(gpt2)
    state, job = saved_state(gpt2), configure(swept_settings(gpt2))

    base = load_base_model(job.config.model.name, job.config.model.task)
    layers = layers_of(attach(job.adapter, base.module, job.config.seed))
    for row in rows:
        weight, factors = base_weight(layers[row.layer]).double(), state.adapter[row.layer]
        delta = job.adapter.delta(factors).double()
        assert weight.shape == delta.shape
        old, values, _ = torch.linalg.svd(weight, full_matrices=False)
        new = torch.linalg.svd(weight + delta, full_matrices=False)[0][:, : row.top]
        assert row.intruders == int(((old.T @ new).abs().amax(0) < 0.5).sum())
        assert row.edge == pytest.approx(float(values[row.top - 1]), rel=1e-6)
        assert row.largest == pytest.approx(float(torch.linalg.svdvals(delta)[0]), rel=1e-6)
        assert row.above == int((torch.linalg.svdvals(weight + delta) > row.edge * (1 + 1e-9)).sum())
    assert any(layer.fan_in_fan_out for layer in layers.values() if hasattr(layer, "fan_in_fan_out"))
    # The run is noise, so both counts are of draws of one law.
    assert sum(row.intruders for row in rows) == pytest.approx(sum(row.of_noise or 0 for row in rows), abs=len(rows))
    assert all(row.intruders for row in rows)


@pytest.mark.parametrize("new", ["outputs", "inputs"])
def test_q3_pefts_own_count_is_of_the_stored_orientation_and_ours_is_not(new: str) -> None:
    """Golden: PEFT 0.21 takes a Conv1D's weight, (in, out), for one of (out, in); it fails when PEFT changes."""
    # What is longer than the other side has directions that the weight does not reach: there a change is new.
    out, into, s = (30, 20, 2.0) if new == "outputs" else (20, 30, 2.0)
    U, V = (torch.linalg.qr(normal(side, side, seed=side))[0] for side in (out, into))
    weight = (U[:, :20] * torch.arange(20, 0, -1)) @ V[:, :20].T
    old, fresh = slice(0, RANK), slice(20, 20 + RANK)
    columns, rows = (U[:, fresh], V[:, old]) if new == "outputs" else (U[:, old], V[:, fresh])
    B, A = 50 * columns, rows.T
    counts: dict[str, int] = {}
    for kind in ("Linear", "Conv1D"):
        layer: nn.Module = nn.Linear(into, out) if kind == "Linear" else Conv1D(out, into)
        stored = weight if kind == "Linear" else weight.T
        layer.weight = nn.Parameter(stored.float().contiguous())
        config = LoraConfig(r=RANK, lora_alpha=s * RANK, target_modules=["0"], fan_in_fan_out=kind == "Conv1D")  # type: ignore[arg-type]
        model = get_peft_model(nn.Sequential(layer), config)
        adapted: Any = model.base_model.model[0]
        adapted.lora_A["default"].weight.data = A.float().contiguous()
        adapted.lora_B["default"].weight.data = (B / s).float().contiguous()
        said: list[str] = []
        reduce_intruder_dimension(model, logging_sink=said.append)
        counts[kind] = int(said[0].rpartition(" ")[2]) if "Intruders" in said[0] else 0
        made = top_of(spectrum_of(base_weight(adapted)), B, A, 10)
        counts[f"ours of {kind}"] = int((made.cosines < 0.5).sum())
        shape = tuple(adapted.lora_B["intruder_reduced"].weight.shape)
        assert shape == ((into, RANK) if kind == "Conv1D" and new == "inputs" else (out, RANK))
    right = RANK if new == "outputs" else 0
    assert counts == {"Linear": right, "Conv1D": RANK - right, "ours of Linear": right, "ours of Conv1D": right}


def swept_settings(run: Path) -> dict[str, Any]:
    from fedveil.common.run_lines import ConfigFile, read_file

    return dict(read_file(ConfigFile, run).settings)


def test_the_noise_alone_is_as_long_as_the_formula_says(gpt2: Path) -> None:
    job, state = configure(swept_settings(gpt2)), saved_state(gpt2)
    start = {layer: {**factors, "B": 0 * factors["B"]} for layer, factors in state.adapter.items() if layer != "head"}
    alone = noise_alone(job, gpt2, start, state)
    assert isinstance(alone, dict)
    numbers = torch.cat([factors["B"].flatten() for factors in alone.values()])
    real = torch.cat([factors["B"].flatten() for layer, factors in state.adapter.items() if layer != "head"])
    assert float(numbers.std()) == pytest.approx(float(real.std()), rel=6 / math.sqrt(len(numbers)))


def test_the_command_prints_both_counts_and_refuses_what_has_no_adapter(gpt2: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["intruders", str(gpt2), "--top", "5"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    rows = intruders_of(gpt2, 5)
    assert f"{sum(row.intruders for row in rows)} intruders in {len(rows)} layers" in done.output
    assert f"noise alone makes {sum(row.of_noise or 0 for row in rows)}" in done.output
    with pytest.raises(DataError, match="holds no adapter"):
        intruders_of(MadeRun(tmp_path / "run").start().folder)
    with pytest.raises(ConfigError, match="cosine must be"):
        intruders_of(gpt2, 5, 1.5)


def test_a_runs_base_model_is_compared_before_the_command_opens_it(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    own = shutil.copytree(toy_settings["model.name"], tmp_path / "model")
    run = run_in_process({**toy_settings, "rounds": 1, "model.name": str(own)}, 2)
    spoil(own)
    with nothing_opened():
        done = CliRunner().invoke(app, ["intruders", str(run)])
    assert done.exit_code == 1, done.output
    assert f"the model '{own}' here has other files" in " ".join(done.output.split())


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if adapter.trained])
def test_q1_every_adapters_change_is_counted_as_the_whole_decomposition_does(name: str) -> None:
    """Also those whose change is no product of two factors, on a layer that is not square."""
    adapter = ADAPTERS[name](RANK, 8.0, ())
    factors = {f: 0.5 * normal(*shape, seed=5 + i) for i, (f, shape) in enumerate(adapter.shapes(40, 24).items())}
    weight = normal(40, 24)
    B, A = _factors(adapter, factors, weight)
    delta = adapter.delta(factors, weight)
    assert float(delta.abs().max()) > 1e-3
    assert float((B @ A - delta).abs().max()) < 1e-10 * float(delta.abs().max())


def test_a_run_without_an_adapter_and_one_without_known_noise_are_told_apart(toy_settings: dict[str, Any]) -> None:
    open_run = run_in_process({**toy_settings, **NOISY, "privacy.mode": "none"}, 2)
    rows = intruders_of(open_run)
    assert {(row.of_noise, row.unknown) for row in rows} == {(None, "the run adds no noise")}
    alone = {"strategy": "fedavg-lora", "adapter.name": "none", "privacy.mode": "none"}
    with pytest.raises(ModelError, match="adapter 'none' changes no layer"):
        intruders_of(run_in_process({**toy_settings, **NOISY, **alone}, 2, "2"))


@pytest.mark.parametrize("name", ["dora", "lora-metric", "randlora", "salt"])
def test_q3_a_change_that_is_no_product_is_counted_beside_its_noise(toy_settings: dict[str, Any], name: str) -> None:
    own: dict[str, Any] = {"strategy": "fedavg-lora", "adapter.name": name, "adapter.alpha": 3.0}
    if name in {"lora-metric", "salt"}:
        own["adapter.start"] = {"lora-metric": "public-metric", "salt": "svd-of-weights"}[name]
    folder = run_in_process({**toy_settings, **NOISY, **own, "privacy.noise-multiplier": 300.0}, 2)
    state, job = saved_state(folder), configure(swept_settings(folder))
    base = load_base_model(job.config.model.name, job.config.model.task)
    layers = layers_of(attach(job.adapter, base.module, job.config.seed))
    rows = intruders_of(folder)
    assert len(rows) == len(layers)
    for row in rows:
        weight = base_weight(layers[row.layer]).double()
        delta = job.adapter.delta({f: t.double() for f, t in state.adapter[row.layer].items()}, weight)
        old = torch.linalg.svd(weight, full_matrices=False)[0]
        new = torch.linalg.svd(weight + delta, full_matrices=False)[0][:, : row.top]
        assert row.intruders == int(((old.T @ new).abs().amax(0) < 0.5).sum())
        assert row.of_noise is not None


def test_a_sweeps_table_has_the_counts_where_they_are_known() -> None:
    plain = swept(0.7)
    assert "intruders" not in markdown_of([plain])
    counted = [replace(swept(0.7, seed=seed), intruders=seed, intruders_of_noise=0) for seed in (1, 2)]
    assert groups(counted)[0].intruders == (1.5, 0, 0)
    text = markdown_of(counted)
    assert "intruders (of noise) |" in text
    assert "1.5 (0.0) |" in text
    assert "new directions" in text
    partly = [*counted, replace(swept(0.7, seed=3), intruders=3)]
    assert "2.0 (0.0 of 2) |" in markdown_of(partly), "a mean over two of three rows passes for one over all"
    assert "1.0 (–) |" in markdown_of([replace(counted[0], intruders_of_noise=None)])


HEAVY_BALL: dict[str, Any] = {"server.optimizer": "momentum", "server.learning-rate": 0.5, "server.momentum": 0.5}
PLAYED: dict[str, dict[str, Any]] = {
    "soft-threshold": {"strategy": "ffa-lora", "server.rule": "soft-threshold", **HEAVY_BALL, "server.momentum": 0.0},
    "lora-pro": {"strategy": "fedavg-lora", "server.rule": "lora-pro", **HEAVY_BALL},
    "allora": {"strategy": "ffa-lora", "server.rule": "allora", "server.optimizer": "adam", "adapter.alpha": 3.0},
    "align-guard": {"strategy": "ffa-lora", "server.rule": "align-guard", "align-guard.records": 4, **HEAVY_BALL},
    "heterogeneous-ranks": {"strategy": "heterogeneous-ranks", "adapter.site-ranks": "1,3", **HEAVY_BALL},
    "flexlora": {"strategy": "flexlora", "adapter.site-ranks": "1,3", "server.optimizer": "adam"},
    "client-level": {
        "privacy.mode": "client-level",
        "privacy.unit": "site",
        "privacy.cohort": 4,
        "privacy.delta": 0.01,
        "training.local-steps": 2,
    },
}
"""Settings of runs whose noise passes a rule of the server, falls on sites of unlike ranks, or is the server's own."""


def numbers_of(shape: tuple[int, ...]) -> Tensor:
    """Return what stands for draws of this shape: long, so that some of it is above any threshold."""
    return 3 * normal(*shape, seed=shape[-1])


def of_noise_alone(
    settings: dict[str, Any], patch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, Callable[[], float]]:
    """Return a run of unlike sites of which noise alone is left, that of ``numbers_of``, and how far a replay is off.

    That is the largest difference of a trained number, over the largest one, where the replay draws the same numbers.
    """

    def noised(total: Tensor, std: float, step: float = 0.0) -> Tensor:
        del step
        return -std * numbers_of(tuple(total.shape))

    nodes = simulated_nodes(3, tmp_path / "ledgers")
    for node, size in zip(nodes, (60, 40, 50), strict=True):
        node["public-size"] = size
    with patch.context() as inside:
        inside.setattr("fedveil.privacy.dpsgd.add_private_noise", noised)
        inside.setattr("fedveil.server.collect.trusted.add_private_noise", noised)
        folder = run_in_process(settings, nodes)
    state, job = saved_state(folder), configure(swept_settings(folder))
    # What sites send is a step against the noised gradient, and a trusted server's mean is a change.
    sign = -1 if job.mechanism.central else 1
    patch.setattr(
        "fedveil.contrib.experiments.intruders._with_noise",
        lambda std, _, t: (t + sign * std * numbers_of(tuple(t.shape))).to(t.dtype),
    )
    base = load_base_model(job.config.model.name, job.config.model.task)
    start = read_factors(job.adapter, attach(job.adapter, base.module, job.config.seed))

    def off() -> float:
        made = noise_alone(job, folder, merge(start, job.strategy.basis(state)), state)
        assert isinstance(made, dict)
        places = [(k, n, t) for k, n, t in entries(state.adapter) if k != HEAD and state.trains(k, n)]
        most = max(float(wanted.abs().max()) for _, _, wanted in places)
        return max(float((made[k][n].double() - wanted.double()).abs().max()) for k, n, wanted in places) / most

    return folder, off


@pytest.mark.parametrize("name", PLAYED)
def test_q5_the_noise_alone_goes_through_all_that_the_server_does(
    name: str,
    toy_settings: dict[str, Any],
    toy_generation: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of runs whose records add 0, against the run's own adapter; without the rule, or the ranks, it is another."""
    toy = toy_generation if name == "align-guard" else toy_settings
    noise = {"privacy.noise-multiplier": 3.0, "rounds": 2}
    folder, off = of_noise_alone({**toy, **NOISY, **noise, **PLAYED[name]}, monkeypatch, tmp_path)
    assert off() < 1e-6
    assert all(row.of_noise is not None and not row.unknown for row in intruders_of(folder))
    if name == "client-level":
        monkeypatch.setattr("fedveil.contrib.experiments.intruders.cohort_noise", site_noise)
    elif name in RULES:
        monkeypatch.setattr(
            "fedveil.contrib.experiments.intruders.round_step",
            lambda job, _, noise, number: partial(server_step, within_noise(job.config, noise, number)),
        )
    else:
        assert [line.rank for line in read_lines(PrivacyLine, folder)] == [1, 3, 1] * 2
        told = fedveil.contrib.experiments.intruders._results
        monkeypatch.setattr(
            "fedveil.contrib.experiments.intruders._results",
            lambda *of: [replace(result, rank=3) for result in told(*of)],
        )
    assert off() > 1e-2


def test_a_text_that_is_gone_leaves_one_line(
    toy_settings: dict[str, Any], toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    ranked = run_in_process({**toy_settings, **NOISY, **PLAYED["flexlora"]}, 2)
    lines = [json.loads(line) for line in (ranked / PrivacyLine.NAME).read_text().splitlines()]
    assert {line["rank"] for line in lines} == {1, 3}
    text = tmp_path / "public.txt"
    text.write_text("the scene was quite a story\nan actor is very warm\n")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    named = {"align-guard.text": str(text), "align-guard.text-sha256": digest}
    guarded = run_in_process({**toy_generation, **NOISY, **PLAYED["align-guard"], **named}, 2, "2")
    assert {row.unknown for row in intruders_of(guarded)} == {""}
    text.unlink()
    # A that is trained from where a statistic puts it.
    others = {key: value for key, value in swept_settings(ranked).items() if not key.startswith("flexlora.")}
    job = configure({**others, "strategy": "fedavg-lora", "adapter.name": "lora", "adapter.start": "eva"})
    state = saved_state(ranked)
    assert noise_alone(job, ranked, state.adapter, state) == (
        "its folder does not keep where round 0 let the trained factors begin"
    )
    rows = intruders_of(guarded)
    assert {row.of_noise for row in rows} == {None}
    done = CliRunner().invoke(app, ["intruders", str(guarded)], env={"COLUMNS": "400"})
    assert f"nothing stands beside it: {rows[0].unknown}\n" in done.output
    assert "public.txt" in rows[0].unknown

"""DoRA: against PEFT's own layer, its gradients against the paper's formulas, and its averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_models import bias_forgotten, furthest_from_alone, losses, random_values, stock
from made_run import spent
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel
from typer.testing import CliRunner

from audits.tiny_models import TARGETS
from fedveil.cli.main import app
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.layer import AdaptedLinear
from fedveil.common.adapters.layers import layers_of
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError, MechanismError, ModelError, ProtocolError
from fedveil.common.messages.tensors import start_fingerprint
from fedveil.common.run_lines import BaselineFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.common.starts import STARTS
from fedveil.contrib.adapters.dora import DoRA, row_norms
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

OUT, INTO, RANK, ALPHA = 7, 5, 3, 6.0
Folder = Callable[[str], str]
each_family = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
each_scale = pytest.mark.parametrize("scale", ["rank", "sqrt-rank"])
FIGURES = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)


def dora(family: str = "bert", scale: str = "rank") -> DoRA:
    return DoRA(RANK, ALPHA, tuple(TARGETS[family].split(",")), STARTS["kaiming"](), scale)


def numbers(seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Return factors and a base weight of one layer, float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {**dora().shapes(OUT, INTO), "W0": (OUT, INTO)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors, tensors.pop("W0")


@each_scale
def test_the_norms_of_the_rows_are_those_of_the_sum(scale: str) -> None:
    factors, weight = numbers()
    s = dora(scale=scale).scaling
    wanted = (weight + s * factors["B"] @ factors["A"]).norm(dim=1)
    found = row_norms(weight, factors["A"], factors["B"], s)
    assert float((found - wanted).abs().max()) < 1e-12
    assert float((row_norms(weight, factors["A"], factors["B"], 1.01 * s) - wanted).abs().max()) > 1e-3


def test_the_change_is_the_papers_weight_less_the_base() -> None:
    factors, weight = numbers()
    V = weight + dora().scaling * factors["B"] @ factors["A"]
    wanted = factors["mu"][:, None] * V / V.norm(dim=1, keepdim=True)
    assert float((weight + dora().delta(factors, weight) - wanted).abs().max()) < 1e-12


def ours_and_pefts(model_folder: Folder, family: str, scale: str) -> tuple[DoRA, nn.Module, Any, Tensor]:
    """Return the adapter, our model and PEFT's of the same random numbers, in float64, and tokens for them."""
    adapter = dora(family, scale)
    model = attach(adapter, stock(model_folder(family), family), 1)
    state = random_values(read_factors(adapter, model))
    write_factors(adapter, model, state)
    config = adapter.peft_config(fan_in_fan_out=family == "gpt2")
    theirs: Any = get_peft_model(stock(model_folder(family), family), config)
    for name, layer in layers_of(theirs).items():
        layer.lora_A["default"].weight.data = state[name]["A"].clone()
        layer.lora_B["default"].weight.data = state[name]["B"].clone()
        cast(Any, layer.lora_magnitude_vector["default"]).weight.data = state[name]["mu"].clone()
    tokens = torch.randint(4, 20, (3, 7), generator=stream(1, "tokens"))
    return adapter, model.double().eval(), theirs.double().eval(), tokens


@each_family
@each_scale
def test_a_model_computes_what_pefts_own_layer_does(model_folder: Folder, family: str, scale: str) -> None:
    _, model, theirs, tokens = ours_and_pefts(model_folder, family, scale)
    biases = [layer.get_base_layer().bias for layer in layers_of(model).values()]
    assert all(bias is None if family == "llama" else bool(bias.all()) for bias in biases), "a bias of 0 proves nothing"
    with torch.no_grad():
        ours, wanted = losses(model, tokens), losses(theirs, tokens)
        assert float((ours - wanted).abs().max()) < 1e-12
        cast(Any, next(iter(layers_of(theirs).values())).lora_magnitude_vector["default"]).weight.mul_(1.01)
        assert float((ours - losses(theirs, tokens)).abs().max()) > 1e-6


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_layer_that_lengthens_its_bias_too_is_found(
    model_folder: Folder, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, theirs, tokens = ours_and_pefts(model_folder, family, "rank")
    monkeypatch.setattr(AdaptedLinear, "forward", bias_forgotten)
    with torch.no_grad():
        assert float((losses(model, tokens) - losses(theirs, tokens)).abs().max()) > 1e-3


def gradients(factors: dict[str, Tensor], weight: Tensor, x: Tensor, detached: bool) -> dict[str, Tensor]:
    """Return the gradient of a loss of one record, of several positions, with or without one through the norm."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in factors.items()}
    V = weight + dora().scaling * leaves["B"] @ leaves["A"]
    norm = V.norm(dim=1, keepdim=True)
    W = leaves["mu"][:, None] * V / (norm.detach() if detached else norm)
    loss = (x @ W.T).sin().sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_without_the_gradient_through_the_norm_the_others_differ_by_one_row_of_numbers() -> None:
    factors, weight = numbers()
    x = torch.randn(4, INTO, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s, (A, B, mu) = dora().scaling, (factors[name] for name in ("A", "B", "mu"))
    V = weight + s * B @ A
    unit, d = V / V.norm(dim=1, keepdim=True), mu / V.norm(dim=1)
    detached, full = (gradients(factors, weight, x, way) for way in (True, False))
    lost = (d * full["mu"])[:, None] * unit
    assert float((detached["B"] - full["B"] - s * lost @ A.T).abs().max()) < 1e-10
    assert float((detached["A"] - full["A"] - s * B.T @ lost).abs().max()) < 1e-10
    assert float((detached["mu"] - full["mu"]).abs().max()) < 1e-10
    assert float(lost.abs().max()) > 1e-3, "the two are the same here: nothing is proved"
    # Ours is the detached one.
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in factors.items()}
    added = dora().change(leaves, x, x @ weight.T, weight, s)
    ours = torch.autograd.grad((x @ weight.T + added).sin().sum(), list(leaves.values()))
    assert all(float((found - detached[name]).abs().max()) < 1e-10 for name, found in zip(leaves, ours, strict=True))


def test_the_full_gradient_of_the_sum_is_orthogonal_to_its_rows_and_the_detached_one_longer_by_that_part() -> None:
    factors, weight = numbers()
    factors["B"][:, 2] = 2 * factors["B"][:, 0]  # without full rank
    V = weight + dora().scaling * factors["B"] @ factors["A"]

    def of_sum(x: Tensor, detached: bool) -> Tensor:
        leaf = V.clone().requires_grad_()
        norm = leaf.norm(dim=1, keepdim=True)
        W = factors["mu"][:, None] * leaf / (norm.detach() if detached else norm)
        return torch.autograd.grad((x @ W.T).sin().sum(), leaf)[0]

    for seed in range(3):
        x = torch.randn(4, INTO, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        detached, full = (of_sum(x, way) for way in (True, False))
        q = gradients(factors, weight, x, detached=True)["mu"]
        lost = (factors["mu"] * q / V.square().sum(1))[:, None] * V
        assert float((detached - full - lost).abs().max()) < 1e-10
        assert float((full * V).sum(1).abs().max()) < 1e-10
        assert float((detached * V).sum(1).abs().max()) > 1e-2, "a gradient with a part along the rows would pass"
        assert float(detached.norm()) > float(full.norm())


@each_family
def test_every_party_derives_the_same_start(model_folder: Folder, family: str) -> None:
    adapter, state = dora(family), {}
    for dtype in (torch.float32, torch.float64):
        base = stock(model_folder(family), family).to(dtype)
        state[dtype] = read_factors(adapter, attach(adapter, base, 1))
    assert start_fingerprint(state[torch.float32]) == start_fingerprint(state[torch.float64])


def test_a_row_of_zeros_is_refused(model_folder: Folder) -> None:
    base = stock(model_folder("bert"), "bert")
    base.get_submodule("encoder.layer.1.attention.self.value").weight.data[4] = 0
    with pytest.raises(ModelError, match=r"row 4 of encoder\.layer\.1\.attention\.self\.value is zero.*'lora'"):
        attach(dora(), base, 1)


def test_a_layer_that_is_not_linear_is_refused(model_folder: Folder) -> None:
    adapter = DoRA(RANK, ALPHA, ("word_embeddings",), STARTS["kaiming"]())
    with pytest.raises(ModelError, match=r"changes linear layers.* is of type Embedding"):
        attach(adapter, stock(model_folder("bert"), "bert"), 1)


def test_an_average_is_off_by_a_second_order_and_exact_in_the_magnitudes_alone() -> None:
    factors, weight = numbers()
    draw = torch.Generator().manual_seed(3)
    steps = {name: torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for name, tensor in factors.items()}

    def error(size: float, moved: tuple[str, ...]) -> float:
        points = [
            {name: tensor + sign * size * steps[name] * (name in moved) for name, tensor in factors.items()}
            for sign in (1, -1)
        ]
        mean = sum((dora().delta(point, weight) / 2 for point in points), torch.zeros(()))
        return float((mean - dora().delta(factors, weight)).norm())

    assert error(1.0, ("mu",)) < 1e-12
    for moved in (("A", "B", "mu"), ("B",), ("B", "mu")):
        assert error(1e-3, moved) / error(5e-4, moved) == pytest.approx(4, rel=0.02)


def test_noise_on_the_magnitudes_has_the_norm_of_the_noise_in_the_weights() -> None:
    factors, weight = numbers()
    x = torch.randn(OUT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = dora().delta({**factors, "mu": factors["mu"] + x}, weight) - dora().delta(factors, weight)
    assert float(moved.norm()) == pytest.approx(float(x.norm()), rel=1e-12)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_small_noise_on_the_direction_enters_the_weights_without_its_part_along_each_row(factor: str) -> None:
    factors, weight = numbers()
    draw = torch.Generator().manual_seed(5)
    x = 1e-5 * torch.randn(factors[factor].shape, generator=draw, dtype=torch.float64)
    s, (A, B, mu) = dora().scaling, (factors[name] for name in ("A", "B", "mu"))
    V = weight + s * B @ A
    unit, turned = V / V.norm(dim=1, keepdim=True), s * (x @ A if factor == "B" else B @ x)
    wanted = (mu / V.norm(dim=1))[:, None] * (turned - (turned * unit).sum(1, keepdim=True) * unit)
    moved = dora().delta({**factors, factor: factors[factor] + x}, weight) - dora().delta(factors, weight)
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-3
    assert float((moved - (mu / V.norm(dim=1))[:, None] * turned).norm() / wanted.norm()) > 0.05


def pefts_own(model_folder: Folder, mu: bool) -> tuple[Any, list[Any]]:
    """Return a model with PEFT's own layer, and what it trains."""
    config = LoraConfig(r=RANK, target_modules=["query"], use_dora=True, lora_dropout=0.0)
    model: Any = get_peft_model(stock(model_folder("bert"), "bert"), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and (mu or "magnitude" not in name))
    return model.double(), [p for p in model.parameters() if p.requires_grad]


def test_pefts_own_layer_is_refused_under_the_mechanism_before_anything_is_released(model_folder: Folder) -> None:
    model, trained = pefts_own(model_folder, mu=True)
    before = [p.detach().clone() for p in trained]
    tokens = torch.randint(4, 20, (4, 7), generator=stream(1, "tokens"))
    refused = pytest.raises(TypeError, match="keyword-only")
    with PrivateSteps(model, torch.optim.SGD(trained, 1.0), FIGURES) as steps, refused:
        steps.step([tokens], lambda batch: losses(model, batch))
    assert all(torch.equal(p, b) for p, b in zip(trained, before, strict=True))


def test_pefts_own_layer_whose_magnitudes_rest_gives_each_records_own_gradient(model_folder: Folder) -> None:
    """It calls its linear layers a second time, with a matrix that is no batch, for a norm without gradient."""
    model, trained = pefts_own(model_folder, mu=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=stream(2, "factors"), dtype=p.dtype))
    assert furthest_from_alone(model) < 1e-12


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (RandLoraConfig(r=RANK, target_modules=["query"]), ("randlora_lambda", "randlora_gamma")),
        (MissConfig(r=RANK, target_modules=["query"]), ("miss_block",)),
    ],
    ids=["RandLoRA", "MiSS"],
)
def test_pefts_layers_of_bare_parameters_are_refused_under_the_mechanism_before_anything_is_released(
    config: PeftConfig, trained: tuple[str, ...], model_folder: Folder
) -> None:
    """No hook fires on a parameter that is no module's own: without the check it would be trained by noise alone."""
    model: Any = get_peft_model(stock(model_folder("bert"), "bert"), config).double()
    own = [p for name, p in model.named_parameters() if name.rsplit(".", 2)[-2] in trained]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in own))
    with torch.no_grad():
        for p in own:
            p.fill_(0.1)
    before = [p.detach().clone() for p in own]
    tokens = torch.randint(4, 20, (4, 7), generator=stream(1, "tokens"))
    (found,) = torch.autograd.grad(losses(model, tokens).sum(), own[:1])
    assert bool(found.any()), "the layer has no part in the loss: nothing is proved"
    refused = pytest.raises(MechanismError, match="got no gradient of its own")
    with PrivateSteps(model, torch.optim.SGD(own, 1.0), FIGURES) as steps, refused:
        steps.step([tokens], lambda batch: losses(model, batch))
    assert all(p.grad is None for p in own), "a sum is left behind"
    assert all(torch.equal(p, b) for p, b in zip(own, before, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_run_moves_all_three_and_its_export_scores_as_the_run(
    mode: str, precision: str, toy_settings: dict[str, Any]
) -> None:
    own = {"strategy": "fedavg-lora", "adapter.name": "dora", "adapter.scale": "sqrt-rank"}
    folder = run_in_process({**toy_settings, **own, "privacy.mode": mode, "precision": precision}, 2)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    base: nn.Module = AutoModel.from_pretrained(toy_settings["model.name"])
    for name, tensor in tensors.items():
        if name.endswith("lora_magnitude_vector"):
            layer = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector"))
            assert not torch.equal(tensor, cast(Tensor, layer.weight).norm(dim=1)), f"{name} stayed where it was"
        assert "lora_B" not in name or bool(tensor.any()), f"{name} stayed 0"
    assert sum(name.endswith("lora_magnitude_vector") for name in tensors) == len(tensors) / 3 > 0
    scored, last = evaluate_run(folder), read_lines(RoundLine, folder)[-1]
    assert scored.accuracy == last.accuracy
    assert scored.loss == pytest.approx(last.loss, rel=1e-5)


def test_strategies_that_need_a_frozen_factor_refuse_it() -> None:
    for strategy in ("ffa-lora", "fed-sb", "fed-svd"):
        with pytest.raises(ConfigError, match="not on 'dora', which trains A and B and mu"):
            configure({"strategy": strategy, "adapter.name": "dora"})


def test_a_state_with_magnitudes_of_another_length_is_refused(model_folder: Folder) -> None:
    adapter = dora()
    model = attach(adapter, stock(model_folder("bert"), "bert"), 1)
    layer = next(iter(layers_of(model)))
    with pytest.raises(ProtocolError, match=r"mu has shape \(1,\)"):
        write_factors(adapter, model, {layer: {"mu": torch.ones(1)}})


def test_an_exported_adapter_says_dora_and_rslora(model_folder: Folder, tmp_path: Path) -> None:
    adapter = dora(scale="sqrt-rank")
    model = attach(adapter, stock(model_folder("bert"), "bert"), 1)
    adapter.export(model, read_factors(adapter, model), tmp_path, model_folder("bert"))
    loaded = PeftModel.from_pretrained(stock(model_folder("bert"), "bert"), str(tmp_path))
    assert (loaded.peft_config["default"].use_dora, loaded.peft_config["default"].use_rslora) == (True, True)


def test_the_first_stage_of_gazal_r1_runs_on_another_model_and_exports(toy_generation: dict[str, Any]) -> None:
    path = Path(__file__).parents[2] / "experiments" / "configs" / "gazal-r1-stage1.toml"
    shipped = parse_settings([str(path)])
    assert shipped["adapter.name"] == "dora", "the configuration trains something else"
    assert shipped["adapter.scale"] == "sqrt-rank", "the configuration has another scale"
    own = ("model.name", "model.max-length", "data.name", "data.test-size", "adapter.rank", "output", "device")
    small = {key: toy_generation[key] for key in own} | {"privacy.delta": 1e-3, "training.sample-rate": 0.3}
    folder = run_in_process({**shipped, **small}, 2)
    lines = read_lines(RoundLine, folder)
    assert [len(line.participants) for line in lines] == [2, 2, 2]
    assert all(spent(line).epsilon_total > 0 for line in read_lines(PrivacyLine, folder))
    scored = evaluate_run(folder)
    # Magnitudes divide by norms that PEFT rounds otherwise: 1.06e-5 was met in some forty runs, each of other noise.
    assert (scored.accuracy, scored.loss) == (lines[-1].accuracy, pytest.approx(lines[-1].loss, rel=2e-5))
    assert abs(scored.loss - read_file(BaselineFile, folder).loss) > 1e-4, "a base model alone would pass"
    said = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert said.exit_code == 0, said.output
    assert said.stdout == f"accuracy {100 * scored.accuracy:.1f} %  loss {scored.loss:.4f}\n"

"""What every low-rank parameterisation must do, in three families of base models.

Each family adapts a layer that is not square; GPT-2 stores its weights transposed (Conv1D).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_models import (
    ALPHA,
    FAMILIES,
    RANK,
    WITH_FACTORS,
    Folder,
    as_trained,
    attached,
    bias_forgotten,
    build,
    float64_model,
    furthest_from_alone,
    random_values,
    stock,
)
from opacus.grad_sample import GradSampleHooks
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.adapters.attach import attach, initial_factors, read_factors, write_factors
from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.layer import AdaptedLinear, Branch
from fedveil.common.adapters.layers import ADAPTER_NAME, layer_shape, layers_of
from fedveil.common.adapters.lora_metric import LoRAMetric
from fedveil.common.adapters.low_rank import LowRank
from fedveil.common.adapters.mapped import Mapped
from fedveil.common.errors import FedVeilError, ModelError, ProtocolError
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries
from fedveil.common.starts import STARTS
from fedveil.common.starts.directions import orthonormal_rows
from fedveil.common.starts.kaiming import uniform_rows
from fedveil.contrib.adapters.dora import DoRA
from fedveil.privacy.randomness import stream

pytestmark = pytest.mark.peft

each_family = pytest.mark.parametrize("family", FAMILIES)
OF_LAYERS = [name for name in WITH_FACTORS if not ADAPTERS[name].traits.shared]
"""Those of which each layer has all factors: of the others ``contrib`` has tests."""
each_adapter = pytest.mark.parametrize("name", OF_LAYERS)
SEEDED = [name for name in OF_LAYERS if ADAPTERS[name].directions]
"""The adapters that ask a start for directions."""
each_adapter_once, each_seeded_once = (
    pytest.mark.parametrize(("name", "family"), [(name, FAMILIES[i % 3]) for i, name in enumerate(names)])
    for names in (OF_LAYERS, SEEDED)
)
"""Each with one family, for what is said of no layer's shape or order."""


def seeded_rows(name: str, factors: Mapping[str, Tensor]) -> Tensor:
    """Return what of a layer starts from the seed: the rows of A, or the columns of B."""
    letter = ADAPTERS[name].directions[0]
    return factors[letter] if letter == "A" else factors[letter].T


def same(left: AdapterState, right: AdapterState) -> bool:
    return [e[:2] for e in entries(left)] == [e[:2] for e in entries(right)] and all(
        torch.equal(tensor, right[layer][factor]) for layer, factor, tensor in entries(left)
    )


def output(model: nn.Module) -> Tensor:
    tokens = torch.randint(4, 20, (3, 7), generator=stream(1, "tokens"))
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return cast(Tensor, out.logits if "logits" in out else out.last_hidden_state)


def stored_weight(model: nn.Module, layer: str) -> Tensor:
    """Return a stock layer's weight as (out, in), whichever way it is stored."""
    module = model.get_submodule(layer)
    weight = cast(Tensor, module.weight).detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@each_adapter_once
def test_exactly_the_trained_factors_take_a_gradient(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    places = parameters_of(adapter, model)
    assert places, "no layer was adapted"
    trained = {id(p) for factors in places.values() for factor, p in factors.items() if factor in adapter.trained}
    with_gradient = {id(p) for p in model.parameters() if p.requires_grad}
    assert with_gradient == trained, f"{len(with_gradient)} tensors take a gradient, {len(trained)} should"
    assert all(set(factors) == {*adapter.trained, *adapter.frozen} for factors in places.values())
    assert not set(adapter.trained) & set(adapter.frozen)
    output(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).to_tuple()[0].sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen tensor got a gradient"


@each_adapter_once
def test_every_layer_that_a_target_names_is_adapted_and_no_other(model_folder: Folder, name: str, family: str) -> None:
    _, model = attached(model_folder(family), name, family)
    base, targets = stock(model_folder(family), family), TARGETS[family].split(",")
    named = {n for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in targets and hasattr(m, "weight")}
    assert set(layers_of(model)) == named
    shapes = {tuple(stored_weight(base, layer).shape) for layer in named}
    assert any(out != into for out, into in shapes), "the example has only square layers, so it proves little"


@each_seeded_once
def test_the_start_follows_bit_for_bit_from_the_seed_and_differs_by_layer(
    model_folder: Folder, name: str, family: str
) -> None:
    folder = model_folder(family)
    torch.manual_seed(1)
    adapter, model = attached(folder, name, family, seed=1)
    torch.manual_seed(2)
    first = read_factors(adapter, model)
    again, other = (read_factors(adapter, attached(folder, name, family, seed)[1]) for seed in (1, 2))
    assert same(first, again), "server and site with one seed start differently"
    starts, others = ([seeded_rows(name, state[layer]) for layer in first] for state in (first, other))
    assert not any(map(torch.equal, starts, others)), "what is seeded does not see the seed"
    for i, left in enumerate(starts):
        assert all(left.shape != r.shape or not torch.equal(left, r) for r in starts[:i]), "two layers begin alike"


@each_adapter
@each_family
def test_the_start_changes_no_output_bit_for_bit(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    assert torch.equal(output(model), output(stock(model_folder(family), family)))
    write_factors(adapter, model, random_values(read_factors(adapter, model)))
    assert not torch.equal(output(model), output(stock(model_folder(family), family))), "the factors change nothing"


@each_seeded_once
def test_an_orthonormal_start_has_orthonormal_rows(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    for layer, factors in read_factors(adapter, model).items():
        rows = seeded_rows(name, factors)
        gap = float((rows @ rows.T - torch.eye(RANK)).abs().max())
        assert gap < 1e-6, f"{layer}: their products are off the identity by {gap:.1e}"


@pytest.mark.parametrize(("rank", "columns"), [(4, 50), (16, 400), (1, 7)])
def test_a_kaiming_start_is_uniform_below_one_over_the_root_of_the_width(rank: int, columns: int) -> None:
    draws = torch.cat([uniform_rows(rank, columns, stream(seed, "A")) for seed in range(200)]).double()
    bound = 1 / math.sqrt(columns)
    assert 0.99 * bound < float(draws.abs().max()) <= bound
    # Of n uniform draws the variance is bound²/3; its estimate has the relative error sqrt(0.8 / n), here four of them.
    tolerance = 4 * math.sqrt(0.8 / draws.numel())
    assert float(draws.pow(2).mean()) == pytest.approx(bound**2 / 3, rel=tolerance)
    assert float(draws.pow(2).mean()) != pytest.approx(bound**2 / 6, rel=tolerance), "the check has no teeth"
    assert abs(float(draws.mean())) < 4 * bound / math.sqrt(3 * draws.numel())


def test_an_orthonormal_start_prefers_no_direction() -> None:
    draws = torch.stack([orthonormal_rows(2, 5, stream(seed, "A")) for seed in range(2000)]).double()
    assert float(draws.mean(0).abs().max()) < 4 / math.sqrt(5 * 2000), "rows point somewhere on average"
    assert torch.allclose(draws.pow(2).mean(0), torch.full((2, 5), 0.2, dtype=torch.float64), atol=0.03)


@each_adapter_once
def test_what_is_written_is_read_back(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    start = read_factors(adapter, model)
    wanted = random_values(start)
    write_factors(adapter, model, wanted)
    assert same(read_factors(adapter, model), wanted)
    layer, factor = next(iter(start)), adapter.trained[0]
    write_factors(adapter, model, {layer: {factor: start[layer][factor]}})
    read = read_factors(adapter, model)
    assert torch.equal(read[layer][factor], start[layer][factor])
    read[layer][factor].copy_(wanted[layer][factor])
    assert same(read, wanted), "a partial write touched another factor"
    assert torch.equal(read_factors(adapter, model)[layer][factor], start[layer][factor]), "a reading is not a copy"


def _unknown_layer(state: AdapterState) -> AdapterState:
    return {**state, "zzz.no.such.layer": next(iter(state.values()))}


def _unknown_factor(state: AdapterState) -> AdapterState:
    last = sorted(state)[-1]
    return {**state, last: {**state[last], "Q": torch.zeros(2, 2)}}


def _other_size(state: AdapterState) -> AdapterState:
    last = sorted(state)[-1]
    factor, tensor = next(iter(state[last].items()))
    return {**state, last: {**state[last], factor: torch.zeros(len(tensor) + 1, *tensor.shape[1:])}}


def _broadcastable(state: AdapterState) -> AdapterState:
    last = sorted(state)[-1]
    factor, tensor = next(iter(state[last].items()))
    return {**state, last: {**state[last], factor: torch.zeros(1, *tensor.shape[1:])}}


@each_adapter_once
def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_is_written(
    model_folder: Folder, name: str, family: str
) -> None:
    adapter, model = attached(model_folder(family), name, family)
    before = read_factors(adapter, model)
    for spoil in (_unknown_layer, _unknown_factor, _other_size, _broadcastable):
        with pytest.raises(ProtocolError):
            write_factors(adapter, model, spoil(random_values(before)))
        assert same(read_factors(adapter, model), before), f"a refused state was written in part: {spoil.__name__}"


@each_adapter
@each_family
def test_delta_is_what_the_adapter_adds_to_the_layers_weight(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    base = stock(model_folder(family), family)
    state = random_values(read_factors(adapter, model))
    write_factors(adapter, model, state)
    model.double()
    for layer, module in layers_of(model).items():
        weight = stored_weight(base, layer).double()
        delta = adapter.delta({factor: tensor.double() for factor, tensor in state[layer].items()}, weight)
        assert delta.shape == weight.shape, f"{layer}: delta has shape {tuple(delta.shape)}"
        with torch.no_grad():
            effective = (
                cast(Any, module)(torch.eye(weight.shape[1]).double())
                - cast(Any, module)(torch.zeros(1, weight.shape[1]).double())
            ).T
        error = float((effective - weight - delta).abs().max())
        assert error < 1e-12, f"{layer}: delta is off the effective weight by {error:.1e}"
        assert float(delta.abs().max()) > 1e-2 * float(weight.abs().max())


@pytest.mark.parametrize(
    ("name", "family"), [(n, FAMILIES[i % 3]) for i, n in enumerate(OF_LAYERS) if issubclass(ADAPTERS[n], LowRank)]
)
def test_as_lora_is_the_same_change_as_delta(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    assert isinstance(adapter, LowRank)
    for factors in random_values(read_factors(adapter, model)).values():
        exact = {factor: tensor.double() for factor, tensor in factors.items()}
        lora = adapter.as_lora(exact)
        assert set(lora) == {"A", "B"}
        gap = float((adapter.scaling * lora["B"] @ lora["A"] - adapter.delta(exact)).abs().max())
        assert gap < 1e-12, f"the exported product is off by {gap:.1e}"


@each_adapter
@each_family
def test_an_exported_adapter_is_the_same_model_in_stock_peft(
    model_folder: Folder, tmp_path: Path, name: str, family: str
) -> None:
    folder = model_folder(family)
    adapter, model = attached(folder, name, family)
    state = as_trained(read_factors(adapter, model), adapter.trained)
    write_factors(adapter, model, state)
    adapter.export(model, state, tmp_path / "adapter", folder)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] == (family == "gpt2"), "the export misstates how the base stores its weights"
    base = stock(folder, family)
    loaded = PeftModel.from_pretrained(stock(folder, family), str(tmp_path / "adapter")).eval()
    ours, theirs, plain = output(model), output(loaded), output(base)
    scale = float(ours.abs().max())
    assert float((ours - plain).abs().max()) > 1e-3 * scale, "the adapter hardly changes the model: nothing is proved"
    error = float((ours - theirs).abs().max()) / scale
    assert error < 1e-5, f"the stock model answers differently, by {error:.1e} of the largest logit"
    if family != "llama" and isinstance(adapter, Mapped) and adapter.uses_projected:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AdaptedLinear, "forward", bias_forgotten)
            error = float((output(model) - theirs).abs().max()) / scale
        assert error > 1e-3, "a layer that takes its bias for a part of W0 x is not found"
    merged = loaded.merge_and_unload()
    for layer in state:
        weight = stored_weight(base, layer)
        wanted = weight + adapter.delta(state[layer], weight)
        error = float((stored_weight(merged, layer) - wanted).abs().max())
        assert error < 1e-6, f"{layer}: PEFT's merged weight is off base + delta by {error:.1e}"


@each_adapter
def test_targets_that_fit_no_layer_are_refused_by_name(model_folder: Folder, name: str) -> None:
    adapter = ADAPTERS[name](RANK, ALPHA, ("nowhere",), STARTS["orthonormal"]())
    with pytest.raises(ModelError, match=r"adapter\.targets 'nowhere'"):
        attach(adapter, stock(model_folder("bert"), "bert"), 1)


@each_adapter_once
def test_a_rank_that_no_orthonormal_factor_can_have_is_refused(model_folder: Folder, name: str, family: str) -> None:
    adapter = ADAPTERS[name](30, ALPHA, tuple(TARGETS[family].split(",")), STARTS["orthonormal"]())
    with pytest.raises(FedVeilError, match="rank"):
        attach(adapter, stock(model_folder(family), family), 1)


@each_adapter_once
def test_the_stated_shapes_are_the_models_and_the_starts(model_folder: Folder, name: str, family: str) -> None:
    adapter, model = attached(model_folder(family), name, family)
    for layer, module in layers_of(model).items():
        stated = adapter.shapes(*layer_shape(module))
        assert set(stated) == {*adapter.trained, *adapter.frozen}
        held = {factor: tuple(p.shape) for factor, p in parameters_of(adapter, model)[layer].items()}
        started = {factor: tuple(t.shape) for factor, t in initial_factors(adapter, layer, module, 1).items()}
        assert stated == held == started, f"{layer}: the adapter states other shapes than it has"


@each_adapter
def test_an_adapter_is_linear_if_and_only_if_it_says_so(name: str) -> None:
    adapter, shares = build(name, "bert"), (0.25, 0.75)
    draw = torch.Generator().manual_seed(2)

    def factors(names: tuple[str, ...]) -> dict[str, Tensor]:
        return {f: torch.randn(adapter.shapes(9, 5)[f], generator=draw, dtype=torch.float64) for f in names}

    frozen, points = factors(adapter.frozen), [factors(adapter.trained) for _ in shares]
    weight = torch.randn(9, 5, generator=draw, dtype=torch.float64)
    averaged = {f: sum((p * x[f] for p, x in zip(shares, points, strict=True)), torch.zeros(())) for f in points[0]}
    changes = [p * adapter.delta({**frozen, **x}, weight) for p, x in zip(shares, points, strict=True)]
    gap = float((adapter.delta({**frozen, **averaged}, weight) - sum(changes, torch.zeros(()))).abs().max())
    said = adapter.traits.linear
    assert (gap < 1e-12) == said, f"{name} says linear: {said}, but the mean is off by {gap:.1e}"


def test_every_adapter_stands_on_peft_layers(model_folder: Folder) -> None:
    for name in ADAPTERS:
        _, model = attached(model_folder("bert"), name, "bert")
        assert all(isinstance(layer, LoraLayer) for layer in layers_of(model).values())
        assert ADAPTERS[name].name == name


@each_adapter
@each_family
def test_the_gradient_of_each_record_is_that_of_a_batch_of_one(model_folder: Folder, name: str, family: str) -> None:
    gap = furthest_from_alone(float64_model(model_folder(family), name, family)[1])
    assert gap < 1e-12, f"a record's gradient is {gap:.1e} off that of the record alone"


def test_a_sampler_that_is_a_little_off_is_found(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(branch: Branch, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return {p: g + 1e-6 * g.roll(1, 0) for p, g in branch.gradients(activations, backprops).items()}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Branch, planted)
    assert furthest_from_alone(float64_model(model_folder("bert"), "dora", "bert")[1]) > 1e-8


MAPS = [name for name, adapter in ADAPTERS.items() if issubclass(adapter, Mapped)]


@pytest.mark.parametrize("name", MAPS)
def test_a_map_takes_what_the_base_projects_if_and_only_if_it_says_so(name: str) -> None:
    adapter, draw = cast(Mapped, build(name, "bert")), torch.Generator().manual_seed(2)
    factors = {f: torch.randn(shape, generator=draw) for f, shape in adapter.shapes(9, 5).items()}
    weight, inputs = torch.randn(9, 5, generator=draw), torch.randn(4, 5, generator=draw)
    first, second = (
        adapter.change(factors, inputs, torch.randn(4, 9, generator=draw), weight, adapter.scaling) for _ in range(2)
    )
    assert torch.equal(first, second) != adapter.uses_projected


@pytest.mark.parametrize("name", [name for name in MAPS if ADAPTERS[name].gradients is not Mapped.gradients])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)], ids=str)
def test_stated_gradients_are_those_of_the_map(name: str, positions: tuple[int, ...]) -> None:
    """Also where a layer sees one vector a record, or positions in two dimensions."""
    adapter, draw = cast(Mapped, build(name, "bert")), torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    factors = {f: drawn(*shape) for f, shape in adapter.shapes(9, 5).items()}
    given = (drawn(4, *positions, 5), drawn(4, *positions, 9), drawn(4, *positions, 9), drawn(9, 5), 1.7)
    stated, derived = (kind.gradients(adapter, factors, *given) for kind in (type(adapter), Mapped))
    assert set(stated) == set(derived) == set(adapter.trained)
    for factor in stated:
        assert stated[factor].shape == derived[factor].shape == (4, *factors[factor].shape)
        assert float((stated[factor] - derived[factor]).abs().max()) < 1e-12 * float(derived[factor].abs().max())


class OtherMap(LoRAMetric):
    """A row made of another, with the metric and half of the map."""

    def change(self, factors: Any, inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float) -> Tensor:
        return super().change(factors, inputs, projected, base_weight, scale) / 2


def test_a_map_that_replaces_one_has_its_own_gradients() -> None:
    adapter, draw = build("lora-metric", "bert"), torch.Generator().manual_seed(2)
    other = OtherMap(**{field.name: getattr(adapter, field.name) for field in fields(adapter)})
    factors = {f: torch.randn(*shape, generator=draw) for f, shape in adapter.shapes(9, 5).items()}
    given = (*(torch.randn(4, n, generator=draw) for n in (5, 9, 9)), torch.randn(9, 5, generator=draw), 1.7)
    whole, half = (cast(Mapped, one).gradients(factors, *given)["A"] for one in (adapter, other))
    assert torch.allclose(2 * half, whole, rtol=1e-5, atol=1e-6)


class OwnScale(DoRA):
    """The fault: the map takes its scale from the adapter's alpha, which a server chooses."""

    def change(self, factors: Any, inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float) -> Tensor:
        return super().change(factors, inputs, projected, base_weight, self.scaling)


def seen_in_a_rehearsal(folder: str, kind: type[Adapter], family: str, alpha: float) -> Tensor:
    """Return what a model answers with the scale that a rehearsal puts in place of a server's."""
    adapter = kind(RANK, alpha, tuple(TARGETS[family].split(",")), STARTS["orthonormal"]())
    model = attach(adapter, stock(folder, family), 1).eval()
    write_factors(adapter, model, random_values(read_factors(adapter, model)))
    for layer in layers_of(model).values():
        assert layer.scaling == {ADAPTER_NAME: adapter.scaling}
        layer.scaling[ADAPTER_NAME] = 1.0
    return output(model)


@each_adapter_once
def test_nothing_of_a_servers_scale_is_left_in_a_rehearsal(model_folder: Folder, name: str, family: str) -> None:
    answers = [seen_in_a_rehearsal(model_folder(family), ADAPTERS[name], family, alpha) for alpha in (6.0, 1e-6)]
    assert torch.equal(*answers)


def test_a_map_with_a_scale_of_its_own_is_found(model_folder: Folder) -> None:
    hidden = [seen_in_a_rehearsal(model_folder("bert"), OwnScale, "bert", alpha) for alpha in (6.0, 1e-6)]
    assert not torch.equal(*hidden)

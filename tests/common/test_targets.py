"""Words of ``adapter.targets``: the layers that each stands for in every kind of model, by name or by structure."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from audits.tiny_models import VOCABULARY, tiny_deberta, tiny_model, tiny_tokenizer
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.attach import attach, read_factors, target_shapes
from fedveil.common.adapters.layers import layers_of
from fedveil.common.adapters.targets import KINDS, auto_targets, linear_targets, targets_in, value_targets
from fedveil.common.config.fields import TARGET_KINDS
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.starts import STARTS
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": len(VOCABULARY), "max_position_embeddings": 40}
GROUPED = {**TEXT, "num_key_value_heads": 1}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
DISTILLED = {"vocab_size": len(VOCABULARY), "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}


def random_model(kind: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, f"{kind}Model")(config)


FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "bert": (lambda: tiny_model("bert"), ("query", "value")),
    "roberta": (lambda: random_model("Roberta", **TEXT), ("query", "value")),
    "distilbert": (lambda: random_model("DistilBert", **DISTILLED), ("q_lin", "v_lin")),
    "mpnet": (lambda: random_model("MPNet", **TEXT), ("q", "v")),
    "deberta-v2": (tiny_deberta, ("query_proj", "value_proj")),
    "vit": (lambda: random_model("ViT", **IMAGE), ("q_proj", "v_proj")),
    "dinov2": (lambda: random_model("Dinov2", **IMAGE), ("q_proj", "v_proj")),
    "llama": (lambda: tiny_model("llama"), ("q_proj", "v_proj")),
    "qwen2": (lambda: random_model("Qwen2", **GROUPED), ("q_proj", "v_proj")),
    "qwen3": (lambda: random_model("Qwen3", **GROUPED, head_dim=8), ("q_proj", "v_proj")),
    "gpt2": (lambda: tiny_model("gpt2"), ("c_attn",)),
    "gemma": (lambda: random_model("Gemma", **GROUPED, head_dim=8), ("q_proj", "v_proj")),
    "phi": (lambda: random_model("Phi", **TEXT), ("q_proj", "v_proj", "fc1", "fc2")),
    "phi3": (lambda: random_model("Phi3", **GROUPED, pad_token_id=0), ("qkv_proj",)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_auto_adapts_queries_and_values_in_each_layer(family: str, tmp_path: Path) -> None:
    make, wanted = FAMILIES[family]
    base = make()
    assert auto_targets(base) == wanted
    adapter = ADAPTERS["lora"](2, 2.0, ("auto",), STARTS["orthonormal"]())
    model = attach(adapter, base, 1)
    layers = layers_of(model)
    assert {name.rpartition(".")[2] for name in layers} == set(wanted)
    assert len(layers) == 2 * len(wanted), "a layer of the two is not adapted, or one is that is no layer's"
    adapter.export(model, read_factors(adapter, model), tmp_path, "base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == sorted(wanted), "a stock reader would look for layers called auto"
    assert len(layers_of(PeftModel.from_pretrained(make(), str(tmp_path)))) == len(layers)


LISTED = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


class Stub(nn.Module):
    """Two blocks with the layers that PEFT's table names for a type of model, and one that it does not name."""

    def __init__(self, kind: str, names: Collection[str]) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in (*names, "beside")}) for _ in range(2))


@pytest.mark.parametrize("kind", [kind for kind, names in LISTED.items() if not isinstance(names, str)])
def test_auto_is_pefts_own_choice_for_every_type_that_it_lists(kind: str) -> None:
    assert sorted(auto_targets(Stub(kind, LISTED[kind]))) == sorted(LISTED[kind])
    with pytest.raises(ModelError, match="finds no layer of Stub"):
        auto_targets(Stub("unheard-of", ["beside-too"]))


def test_a_type_that_peft_lists_by_a_pattern_is_found_by_structure() -> None:
    patterns = [kind for kind, names in LISTED.items() if isinstance(names, str)]
    for kind in patterns:
        assert auto_targets(Stub(kind, ["q_proj", "k_proj", "v_proj"])) == ("q_proj", "v_proj")


@each_family
def test_values_are_the_layers_of_auto_that_make_values(family: str) -> None:
    make, wanted = FAMILIES[family]
    one = [name for name in wanted if name.startswith("v")] or [n for n in wanted if n in ("c_attn", "qkv_proj")]
    assert [*value_targets(make())] == one
    assert targets_in(make(), ("values",)) == tuple(one)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama", "qwen2", "gemma"])
def test_structure_alone_finds_what_pefts_table_says(family: str) -> None:
    make, wanted = FAMILIES[family]
    base = make()
    base.config.model_type = "none-that-peft-knows"
    assert auto_targets(base) == wanted


def test_auto_starts_bit_for_bit_where_the_names_do() -> None:
    states = []
    for targets in (("auto",), ("query", "value")):
        adapter = ADAPTERS["lora"](2, 2.0, targets, STARTS["orthonormal"]())
        states.append(read_factors(adapter, attach(adapter, tiny_model("bert"), 1)))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][layer][f]) for layer, factors in states[0].items() for f, t in factors.items())


def test_putting_an_adapter_in_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(ADAPTERS["lora"](2, 2.0, ("auto",), STARTS["orthonormal"]()), tiny_model("bert"), 1)


class Mixed(nn.Module):
    """A module with layers that look like queries and values and are not: alone, or of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value_head, self.out = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(6, 4), "v": nn.Linear(4, 4)})


def test_layers_that_only_look_like_attention_are_not_taken() -> None:
    with pytest.raises(ModelError, match=r"'auto' finds no layer of Mixed .*: name some of .*\bout\b"):
        auto_targets(Mixed())


@each_family
def test_names_that_fit_no_layer_are_told_those_that_would(family: str) -> None:
    make, wanted = FAMILIES[family]
    with pytest.raises(ModelError, match="fit no layer of") as refusal:
        targets_in(make(), ("nowhere", "else"))
    text = str(refusal.value)
    assert "adapter.targets 'nowhere,else'" in text
    assert f"set it to 'auto', which is {','.join(wanted)!r} there" in text
    assert all(name in text.rpartition(" some of ")[2] for name in wanted)
    assert "\n" not in text


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def with_outputs() -> Any:
    config = transformers.LlamaConfig(**GROUPED)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(config)


STAGES = {"image_size": 32, "num_attention_heads": [1] * 4, "depths": [1] * 4}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert-pooled": lambda: random_model("Bert", **TEXT),
    "llama-outputs": with_outputs,
    # Linear layers in a Sequential, whose names are numbers as stages' are.
    "swinv2": lambda: random_model("Swinv2", image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4),
    # A convolution outside of all blocks has the last part of a layer's name.
    "pvt-v2": lambda: random_model("PvtV2", **STAGES, hidden_sizes=[8] * 4, mlp_ratios=[1] * 4),
}
OUTSIDE = {"bert-pooled", "llama-outputs", "roberta", "mpnet", "vit", "llama", "gpt2"}
"""Those that have linear layers outside of their blocks, so that one that is adapted shows."""


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_all_linear_adapts_every_linear_layer_of_the_blocks_and_no_other(family: str, tmp_path: Path) -> None:
    make = OTHERS[family] if family in OTHERS else FAMILIES[family][0]
    base = make()
    linear = {name for name, module in base.named_modules() if is_linear(module)}
    outside = {name for name in linear if name.startswith(("pooler", "lm_head", "encoder.pooler"))}
    assert bool(outside) == (family in OUTSIDE)
    adapter = ADAPTERS["lora"](1, 2.0, ("all-linear",), STARTS["orthonormal"]())
    assert len(target_shapes(base, ("all-linear",))) == len(linear - outside)
    model = attach(adapter, base, 1)
    assert set(layers_of(model)) == linear - outside
    adapter.export(model, read_factors(adapter, model), tmp_path, "base")
    assert set(layers_of(PeftModel.from_pretrained(make(), str(tmp_path)))) == linear - outside


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet"])
def test_a_stock_model_with_a_pooler_has_no_adapter_in_it(kind: str, tmp_path: Path) -> None:
    """Ours is loaded without one, so that the last part of its name is no other layer's here."""
    with torch.random.fork_rng():
        base = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(**TEXT), add_pooling_layer=False
        )
    adapter = ADAPTERS["lora"](1, 2.0, ("all-linear",), STARTS["orthonormal"]())
    model = attach(adapter, base, 1)
    adapter.export(model, read_factors(adapter, model), tmp_path, "base")
    stock = random_model(kind, **TEXT)
    assert any(name == "pooler.dense" for name, _ in stock.named_modules())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(stock, str(tmp_path))
    assert set(layers_of(loaded)) == set(layers_of(model))
    assert not [str(warning.message) for warning in told if "missing" in str(warning.message)]


def test_a_model_without_blocks_is_told_its_layers() -> None:
    with pytest.raises(ModelError, match=r"'all-linear' finds no block with linear layers in Mixed: .*\bout\b"):
        linear_targets(Mixed())


def test_a_word_that_is_nearly_one_is_told() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'all-linear'\?"):
        targets_in(tiny_model("bert"), ("all-liner",))


def test_every_word_has_a_finder() -> None:
    assert tuple(KINDS) == TARGET_KINDS


@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_a_kind_of_layers_stands_alone(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"write '{kind}' alone"):
        configure({"adapter.targets": f"{kind},query"})


@pytest.mark.parametrize("strategy", ["ffa-lora", "fed-sb"])
def test_a_model_that_names_its_layers_otherwise_trains_by_default(
    strategy: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "mpnet"
    FAMILIES["mpnet"][0]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = {key: value for key, value in toy_settings.items() if key != "adapter.targets"}
    run = run_in_process({**settings, "strategy": strategy, "model.name": str(folder)}, 2)
    assert 0 <= evaluate_run(run).accuracy <= 1
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(named) == ["q", "v"]

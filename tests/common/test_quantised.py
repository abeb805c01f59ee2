"""Base models in 4 and 8 bits: gradients of each record, one base at all parties, and what becomes of the result.

``make test`` installs bitsandbytes. Where it is not, these tests fail: none is skipped but on a GPU that is not there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import away_from_zero, records_of, samples
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from audits.tiny_models import TARGETS, toy_run
from audits.tiny_site import clinic
from fedveil.client.rehearsal import rehearse
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.low_bits import LOW_BITS, LowBits, bitsandbytes, in_full
from fedveil.common.config.sections import QUANTISE, HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import Refusal
from fedveil.common.model.base import load_base_model, weights_fingerprint
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.recomputed import computed_once
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.starts.gradient import open_weights
from fedveil.common.tasks import TASKS
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import load_finished, merge_run
from fedveil.server.records import package_versions
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

Folder = Callable[[str], str]
BITS = tuple(LOW_BITS)
CASES = [
    *((family, adapter, bits) for family in ("bert", "llama") for adapter in ("lora", "dora") for bits in BITS),
    ("llama", "lora-sb", "4bit"),
    ("bert", "lora-diagonal", "8bit"),
]


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    """Fail where bitsandbytes is missing, rather than skip."""
    bitsandbytes()


def tiny(
    folder: str, family: str, bits: str, adapter: str = "lora", precision: str = "float32", **options: Any
) -> FederatedModel:
    """Return a model whose factors are away from zero."""
    task = "classification" if family == "bert" else "causal-lm"
    start = STARTS["orthonormal" if "B" in ADAPTERS[adapter].directions else "kaiming"]()
    model = FederatedModel(
        load_base_model(folder, task, bits=bits),
        ADAPTERS[adapter](2, 4.0, tuple(TARGETS[family].split(",")), start),
        TASKS[task],
        HeadConfig(start="random"),
        **{"seed": 1, "label_names": ("bad", "good"), "max_length": 24, "device": "cpu", **options},
        precision=precision,
    )
    return away_from_zero(model)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "adapter", "bits"), CASES)
def test_gradients_are_each_records_own_and_those_of_the_weights_that_the_bits_stand_for(
    model_folder: Folder, family: str, adapter: str, bits: str
) -> None:
    model = tiny(model_folder(family), family, bits, adapter, checkpointing=adapter == "dora")
    records = records_of(model)
    found = samples(model, model.fixed_batch(records, 8, 3))
    trained = [p for p in model.module.parameters() if p.requires_grad]
    for row, record in enumerate(records):
        with computed_once(model.peft_model):
            loss = model.losses(model.fixed_batch([record], 8, 3)).sum()
        want = torch.autograd.grad(loss, trained)
        for sample, gradient in zip(found, want, strict=True):
            assert float((sample[row] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1e-4)
        beside = samples(model, model.fixed_batch([records[row - 1], record], 8, 3))
        assert all(torch.equal(mine[1], sample[row]) for mine, sample in zip(beside, found, strict=True))
    in_full(model.module)
    assert not any(isinstance(child, LowBits) for child in model.module.modules())
    assert all(map(torch.equal, samples(model, model.fixed_batch(records, 8, 3)), found))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_a_rehearsal_keeps_every_row(model_folder: Folder, bits: str, precision: str) -> None:
    model = tiny(model_folder("llama"), "llama", bits, precision=precision)
    shapes, before = model.shapes, weights_fingerprint(model.base.module)
    rehearse(model)
    assert model.shapes == shapes
    assert weights_fingerprint(model.base.module) == before, "a step moved the base"


def test_the_outliers_of_llm_int8_move_another_records_bits_and_ours_do_not() -> None:
    draw = torch.Generator().manual_seed(5)
    linear = nn.Linear(24, 16, bias=False)
    linear.weight = nn.Parameter(torch.randn(16, 24, generator=draw), requires_grad=False)
    ours = LOW_BITS["8bit"](linear)
    rows = torch.randn(2, 24, generator=draw)
    other = rows.clone()
    other[1, 3] = 50.0  # an outlier of the other record
    assert torch.equal(ours(rows)[0], ours(other)[0])
    theirs = [bitsandbytes().int8_vectorwise_quant(batch, threshold=6.0)[0][0] for batch in (rows, other)]
    assert not torch.equal(*theirs), "the reason for a product of our own has gone"


# --- what is held -----------------------------------------------------------------------------------------------------


def test_the_bits_are_bitsandbytes_own_and_take_their_room() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    draw = torch.Generator().manual_seed(5)
    linear = nn.Linear(128, 96)
    linear.weight = nn.Parameter(torch.randn(96, 128, generator=draw), requires_grad=False)
    theirs = Linear4bit(128, 96, quant_type="nf4", compress_statistics=False)
    theirs.weight = Params4bit(linear.weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    theirs.bias = linear.bias
    theirs = theirs.to("cpu")
    four, eight = LOW_BITS["4bit"](linear), LOW_BITS["8bit"](linear)
    assert torch.equal(four.packed.flatten(), theirs.weight.data.flatten())
    inputs = torch.randn(3, 128, generator=draw)
    with torch.no_grad():
        assert torch.allclose(four(inputs), theirs(inputs), atol=1e-4)
    sizes = {layer.bits: layer.packed.nbytes + layer.scales.nbytes for layer in (four, eight)}
    full = linear.weight.nbytes
    assert sizes == {"4bit": full * 4.5 / 32, "8bit": full / 4 + 96 * 4}
    assert float((eight.weight - linear.weight).abs().max()) <= float(linear.weight.abs().max()) / 127
    assert [name for name, _ in four.named_parameters()] == ["bias"]


def test_server_and_sites_have_one_base_and_another_setting_is_another_one(model_folder: Folder) -> None:
    prints = {bits: load_base_model(model_folder("llama"), "causal-lm", bits=bits).fingerprint for bits in QUANTISE}
    assert len(set(prints.values())) == len(QUANTISE)
    for bits in BITS:
        assert load_base_model(model_folder("llama"), "causal-lm", bits=bits).fingerprint == prints[bits]


def test_an_output_layer_and_shared_weights_stay_in_full(model_folder: Folder) -> None:
    base = load_base_model(model_folder("llama"), "causal-lm", bits="4bit")
    held = {name for name, child in base.module.named_modules() if isinstance(child, LowBits)}
    assert {name.rpartition(".")[2] for name in held} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert not any(p.requires_grad for p in base.module.parameters())


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of a language model in 4 bits."""
    from audits.tiny_models import write_questions

    folder = tmp_path_factory.mktemp("quantised")
    asked = {
        **toy_run(model_folder("llama"), folder),
        "model.task": "causal-lm",
        "data.name": str(write_questions(folder / "questions.csv", 160)),
        "adapter.targets": TARGETS["llama"],
        "head.policy": "frozen",
        "privacy.mode": "none",
        "training.learning-rate": 0.3,
        "rounds": 1,
        "model.quantise": "4bit",
    }
    return run_in_process(asked, 2)


def logits(model: Any, tokens: Tensor) -> Tensor:
    # In train mode: bitsandbytes' own layers in eval mode take no sizes on a CPU but multiples of 32. No dropout is on.
    with torch.no_grad():
        return model.train()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def test_a_merged_model_is_what_the_bits_stand_for_and_the_adapter(run: Path, tmp_path: Path) -> None:
    tokens = torch.tensor([[2, 5, 9, 4, 11, 6]])
    result = load_result(run / "adapter")
    module = result.module
    assert any(isinstance(child, LowBits) for child in module.modules())
    wanted = logits(module.encoder, tokens)
    base = load_base_model(result.about.base_model, "causal-lm", bits="4bit")
    assert (logits(base.module, tokens) - wanted).abs().max() > 1e-3, "the adapter changes nothing here"
    merge_run(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, tokens) - wanted).abs().max() < 1e-5
    assert (logits(load_finished(run).module.encoder, tokens) - wanted).abs().max() < 1e-5


def test_peft_loads_the_adapter_on_a_quantised_and_on_the_full_base(run: Path) -> None:
    tokens = torch.tensor([[2, 5, 9, 4, 11, 6]])
    result = load_result(run / "adapter")
    wanted, name = logits(result.module.encoder, tokens), result.about.base_model
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for options, close in (({"quantization_config": four, "device_map": "cpu"}, 1e-4), ({}, 0.2)):
        base = AutoModelForCausalLM.from_pretrained(name, **options)
        stock = PeftModel.from_pretrained(base, str(run / "adapter"))
        assert (logits(stock, tokens) - wanted).abs().max() < close


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_that_names_the_extra(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"^model\.quantise needs bitsandbytes.*pip install 'fedveil\[quantised\]'.*$"):
        load_base_model(model_folder("llama"), "causal-lm", bits="4bit")


def test_a_model_without_linear_layers_and_a_start_that_opens_weights_are_refused(model_folder: Folder) -> None:
    with pytest.raises(ModelError, match=r"^model\.quantise is '4bit', but .* has no linear layers.*to 'none'$"):
        load_base_model(model_folder("gpt2"), "causal-lm", bits="4bit")
    refused = pytest.raises(ModelError, match=r"^the adapted layers' own weights must have a gradient.*'orthonormal'")
    with refused, open_weights(tiny(model_folder("llama"), "llama", "4bit")):
        pass
    with pytest.raises(ConfigError, match=r"model\.quantise is '4bits'.*did you mean"):
        configure({"model.quantise": "4bits"})


def asked_of(model_folder: Folder, folder: Path, **more: Any) -> dict[str, Any]:
    """Return settings of a private run in 4 bits, of one round."""
    return {
        **toy_run(model_folder("bert"), folder),
        "model.quantise": "4bit",
        "privacy.epsilon": 8.0,
        "rounds": 1,
        **more,
    }


def test_a_start_that_would_open_weights_is_refused_before_anything_is_charged(
    model_folder: Folder, tmp_path: Path
) -> None:
    opening = [name for name, start in STARTS.items() if start.opens_weights]
    assert {"public-metric", "probe", "public-gradient", "lora-ga", "nonprivate-gradient", "dp-gradient"} == set(
        opening
    )
    for name in ("public-metric", "probe", "dp-gradient"):
        more = {"adapter.start": name, "adapter.name": "lora-metric", "strategy": "fedavg-lora"}
        if name == "dp-gradient":
            more |= {"adapter.name": "lora-sb", "strategy": "fed-sb"}
        asked = asked_of(model_folder, tmp_path, **more)
        configure({**asked, "model.quantise": "none"})
        with pytest.raises(ConfigError, match=rf"^adapter\.start '{name}' needs gradients .* to 'none'$"):
            run_in_process(asked, 2)
    with pytest.raises(ConfigError, match=r"^adapter\.alpha is 0, .* give it a number, .* to 'none'$"):
        run_in_process(asked_of(model_folder, tmp_path, **{"adapter.alpha": 0.0}), 2)
    assert not list(tmp_path.rglob("*ledger*")), "something was charged"


def test_a_paid_start_of_sketches_opens_no_weights_and_runs(model_folder: Folder, tmp_path: Path) -> None:
    found = run_in_process(asked_of(model_folder, tmp_path, **{"adapter.start": "dp-lora-ga"}), 2)
    assert [line.complete for line in read_lines(RoundLine, found)] == [True, True]


def test_a_base_that_differs_may_be_another_version_of_bitsandbytes(model_folder: Folder, tmp_path: Path) -> None:
    for folder in ("4bit", "none"):
        (tmp_path / folder).mkdir()
    for bits, said in (("4bit", r"model\.quantise '4bit' the same version of bitsandbytes,"), ("none", "same weights")):
        asked = asked_of(model_folder, tmp_path / bits, **{"model.quantise": bits})
        site = clinic(asked, tmp_path / bits)
        base = site.model().base
        site.rule(models=[f"{base.name}={'0' * 64}+{base.files}", f"{base.name}={base.pin}"])
        reply = site.ask(replace(site.task(), base_fingerprint="0" * 64))
        assert isinstance(reply, Refusal)
        assert re.search(rf"{said} on both sides$", reply.reason)
    assert ("bitsandbytes" in package_versions("8bit"), "bitsandbytes" in package_versions()) == (True, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_holds_the_same_bits_and_has_gradients_of_each_record(model_folder: Folder, bits: str) -> None:
    here, there = (tiny(model_folder("llama"), "llama", bits, device=device) for device in ("cpu", "cuda"))
    assert (
        here.base.fingerprint
        == there.base.fingerprint
        == load_base_model(model_folder("llama"), "causal-lm", bits=bits).fingerprint
    )
    found, want = (samples(model, model.fixed_batch(records_of(model), 8, 3)) for model in (there, here))
    for sample, gradient in zip(found, want, strict=True):
        assert torch.allclose(sample.cpu(), gradient, rtol=1e-3, atol=1e-5)
    rehearse(there)

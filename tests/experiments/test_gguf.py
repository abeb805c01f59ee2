"""Adapters as llama.cpp reads them: names, alpha, and the very weights that PEFT merges."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from made_run import adapter_told
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from audits.tiny_models import TARGETS
from fedveil.cli.main import app
from fedveil.common.errors import DataError, ModelError
from fedveil.common.model.files import files_of
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.gguf import export_gguf, turned

pytestmark = pytest.mark.rough_prices

Folder = Callable[[str], str]
NAMES = {
    "llama": {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"},
    "gpt2": {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up", "attn.c_proj": "attn_output"},
}
STEM = {"llama": "model.layers", "gpt2": "transformer.h"}


def saved_adapter(folder: Folder, family: str, path: Path, **options: Any) -> Path:
    """Write a random adapter of PEFT's as a run's folder has it, and return the run's folder."""
    base = AutoModelForCausalLM.from_pretrained(folder(family))
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=list(NAMES[family]), fan_in_fan_out=family == "gpt2", **options
    )
    model = get_peft_model(base, config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    model.save_pretrained(path / "adapter")
    return on_base(path, folder(family))


def on_base(run: Path, base: str, files: str = "") -> Path:
    """Let a run's folder name another base model; it returns the folder."""
    told = adapter_told(base_model=base, base_files=files or files_of(base))
    (run / "adapter" / "fedveil.json").write_text(json.dumps(told))
    return run


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields and the tensors of a file, by name."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}


def largest_difference(folder: Folder, family: str, run: Path, tensors: dict[str, Tensor], alpha: float) -> float:
    """Return the largest difference of a merged weight from W + alpha / r B A of the file, in float64."""
    base = AutoModelForCausalLM.from_pretrained(folder(family)).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(run / "adapter")).double().merge_and_unload().state_dict()
    heads = {"self_attn.q_proj": base.config.num_attention_heads}
    heads["self_attn.k_proj"] = getattr(base.config, "num_key_value_heads", 0)
    worst = 0.0
    for layer in range(2):
        for name, place in NAMES[family].items():
            W, whole = (state[f"{STEM[family]}.{layer}.{name}.weight"] for state in (before, merged))
            if family == "gpt2":
                W, whole = W.T, whole.T
            if name in heads and family == "llama":
                W, whole = turned(W, heads[name]), turned(whole, heads[name])
            A, B = (tensors[f"blk.{layer}.{place}.weight.lora_{factor}"] for factor in "ab")
            assert not torch.equal(W, whole)
            worst = max(worst, float((W + alpha / len(A) * B @ A - whole).abs().max()))
    return worst


OPTIONS = ("plain", "rslora", "ranks", "escaped ranks")


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_file_holds_what_peft_merges(model_folder: Folder, tmp_path: Path, family: str, kind: str) -> None:
    last = list(NAMES[family])[-1]
    whole = [re.escape(f"{STEM[family]}.{layer}.{last}") for layer in range(2)]
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "ranks": {"rank_pattern": {last: 2}, "alpha_pattern": {last: 5}},
        # A run writes whole names, in which its dots are escaped.
        "escaped ranks": {"rank_pattern": dict.fromkeys(whole, 2), "alpha_pattern": dict.fromkeys(whole, 5)},
    }
    run = saved_adapter(model_folder, family, tmp_path, **options[kind])
    assert export_gguf(run, tmp_path / "a.gguf") == 6
    fields, tensors = read(tmp_path / "a.gguf")
    assert len(tensors) == 12
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        *("adapter", "lora"),
        family,
    )
    alpha = fields["adapter.lora.alpha"]
    assert alpha == pytest.approx({"plain": 6.0, "rslora": 6 * 3**0.5}.get(kind, 1.0))
    assert largest_difference(model_folder, family, run, tensors, alpha) < 1e-6
    assert largest_difference(model_folder, family, run, tensors, alpha * 1.01) > 1e-3


def test_the_order_of_rotation_is_found_if_it_is_forgotten(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved_adapter(model_folder, "llama", tmp_path)
    monkeypatch.setattr("fedveil.experiments.serving.gguf.turned", lambda rows, heads: rows)
    export_gguf(run, tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert largest_difference(model_folder, "llama", run, tensors, fields["adapter.lora.alpha"]) > 1e-2


def test_turned_projections_have_the_same_scores_under_neighbouring_rotation() -> None:
    """Transformers rotates halves of a head, llama.cpp neighbours: products of queries and keys are the same."""
    draw = torch.Generator().manual_seed(1)
    heads, width, places = 2, 8, 5
    angles = torch.outer(torch.arange(places).double(), 10000.0 ** (-torch.arange(width // 2).double() / (width // 2)))
    x = torch.randn(places, 6, generator=draw, dtype=torch.float64)
    q, k = (torch.randn(heads * width, 6, generator=draw, dtype=torch.float64) for _ in range(2))

    def halves(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, dim=-1)
        c, s = angles.cos(), angles.sin()
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    def neighbours(rows: Tensor) -> Tensor:
        first, second = rows[..., 0::2], rows[..., 1::2]
        c, s = angles.cos(), angles.sin()
        return torch.stack([first * c - second * s, second * c + first * s], dim=-1).flatten(-2)

    def scores(rotated: Callable[[Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
        split = [rotated((x @ w.T).unflatten(-1, (heads, width)).transpose(0, 1)) for w in (q, k)]
        return split[0] @ split[1].transpose(1, 2)

    assert torch.allclose(scores(halves, q, k), scores(neighbours, turned(q, heads), turned(k, heads)))
    assert not torch.allclose(scores(halves, q, k), scores(neighbours, q, k))


def test_the_command_writes_a_runs_adapter_once(toy_generation: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process({**toy_generation, "rounds": 1, "privacy.mode": "none", "training.learning-rate": 0.3}, 2)
    words = ["export", str(run), "--gguf", str(tmp_path / "a.gguf")]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "4 layers" in done.output) == (0, True)
    _, tensors = read(tmp_path / "a.gguf")
    assert {name.split(".")[2] for name in tensors} == {"attn_q", "attn_v"}
    assert TARGETS["llama"] == "q_proj,v_proj"
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "nothing is written over" in again.output


def test_what_cannot_be_written_is_refused_in_one_line(model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no adapter"):
        export_gguf(tmp_path, tmp_path / "a.gguf")
    run = saved_adapter(model_folder, "llama", tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match=r"no plain LoRA.*fedveil merge"):
        export_gguf(run, tmp_path / "a.gguf")
    run = saved_adapter(model_folder, "llama", tmp_path / "bert")
    shutil.copytree(model_folder("bert"), tmp_path / "base")
    on_base(run, str(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"of kind 'bert'.*llama, mistral"):
        export_gguf(run, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_head_that_would_be_lost_is_refused(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process({**toy_settings, "rounds": 1, "privacy.mode": "none"}, 2)
    with pytest.raises(ModelError, match=r"^the run has a classification head, [^\n]*$"):
        export_gguf(run, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_damaged_adapter_and_a_base_that_is_gone_are_one_line(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved_adapter(model_folder, "llama", tmp_path / "run")
    for missing in (str(tmp_path / "gone"), "~/gone"):
        on_base(run, missing, "ab" * 32)
        with pytest.raises(ModelError, match=r"^cannot load the base model '.*gone': [^\n]*$"):
            export_gguf(run, tmp_path / "a.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_folder("llama"), tmp_path / "base")
    on_base(run, "~/base")
    assert export_gguf(run, tmp_path / "a.gguf") == 6
    (tmp_path / "base" / "config.json").write_text("not even JSON")
    with pytest.raises(ModelError, match=r"^the model '~/base' here has other files [^\n]*$"):
        export_gguf(run, tmp_path / "b.gguf")
    on_base(run, "~/base")
    with pytest.raises(ModelError, match=r"^the run's base model '~/base' cannot be read [^\n]*$"):
        export_gguf(run, tmp_path / "b.gguf")
    on_base(run, model_folder("llama"))
    tensors = run / "adapter" / "adapter_model.safetensors"
    for damage in (lambda: tensors.write_bytes(tensors.read_bytes()[:100]), tensors.unlink):
        damage()
        with pytest.raises(DataError, match=r"^[^\n]*adapter_model\.safetensors (cannot be read|is not there)[^\n]*$"):
            export_gguf(run, tmp_path / "b.gguf")


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_nobody_searches_with_the_expressions_of_somebodys_adapter(
    toy_generation: dict[str, Any], tmp_path: Path, field: str
) -> None:
    """One of these takes years on the names of a model's layers; so does PEFT, which ``ask`` and ``evaluate`` call."""
    run = run_in_process({**toy_generation, "rounds": 1, "privacy.mode": "none"}, 2)
    path = run / "adapter" / "adapter_config.json"
    slow = r"([a-z0-9_]+\.?)+!"
    value = {slow: 2} if field.endswith("_pattern") else slow
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    def late(*_: object) -> None:
        pytest.fail("the command searches on")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        for words in (["export", str(run), "--gguf", str(tmp_path / "a.gguf")], ["evaluate", str(run)]):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 1
            assert f"{field} has '([a-z0-9_]+" in " ".join(done.output.split())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

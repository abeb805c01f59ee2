"""Settings from files of TRL, axolotl, LLaMA-Factory and PEFT: each key mapped, refused with its reason, or listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_forms import fedveil

from fedveil.common.config.text import read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.experiments import imported
from fedveil.experiments.imported import FORMATS, Imported, import_file
from fedveil.strategies.job import configure
from fedveil.strategies.options import known_settings

AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-135M
load_in_8bit: true
load_in_4bit: false
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 512
sample_packing: false
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
"""
LLAMA_FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: false

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
plot_loss: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: notes.jsonl
dataset_text_field: note
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
use_rslora: true
load_in_4bit: true
learning_rate: 1.0e-4
per_device_train_batch_size: 8
num_train_epochs: 1
max_length: 256
packing: false
optim: adamw_torch
lr_scheduler_type: linear
seed: 7
report_to: none
"""
PEFT = {
    "base_model_name_or_path": "distilbert-base-uncased",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "modules_to_save": ["classifier", "score"],
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_lin", "v_lin"],
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
}


def read(folder: Path, content: str | dict[str, Any], name: str = "train.yaml", *leave_out: str) -> Imported:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return import_file(folder / name, leave_out)


def test_an_axolotl_file(tmp_path: Path) -> None:
    got = read(tmp_path, AXOLOTL)
    assert (got.source, got.refused) == ("axolotl", [])
    assert got.settings == {
        "strategy": "fedavg-lora",
        "adapter.start": "kaiming",
        "server.optimizer": "none",
        "model.name": "hub:HuggingFaceTB/SmolLM2-135M",
        "model.quantise": "8bit",
        "model.task": "instruction",
        "model.max-length": 512,
        "model.checkpointing": True,
        "data.name": "hub:mhenrichsen/alpaca_2k_test",
        "data.prompt": "instruction",
        "data.text-pair": "input",
        "data.completion": "output",
        "output": "./outputs/lora-out",
        "adapter.rank": 32,
        "adapter.alpha": 16,
        "adapter.targets": "all-linear",
        "training.optimizer": "adamw",
        "training.learning-rate": 2e-4,
        "training.weight-decay": 0.0,
        "schedule": "cosine",
        "precision": "auto",
    }
    assert {"num_epochs", "lora_dropout", "micro_batch_size", "wandb_project"} <= {key for key, _ in got.unused}


def test_a_file_of_llama_factory(tmp_path: Path) -> None:
    got = read(tmp_path, LLAMA_FACTORY)
    assert (got.source, got.refused) == ("LLaMA-Factory", [])
    assert got.settings == {
        "strategy": "fedavg-lora",
        "adapter.start": "kaiming",
        "server.optimizer": "none",
        "model.name": "hub:meta-llama/Meta-Llama-3-8B-Instruct",
        "model.task": "instruction",
        "data.prompt": "instruction",
        "data.completion": "output",
        "model.max-length": 1024,
        "output": "saves/llama3-8b/lora/sft",
        "adapter.rank": 8,
        "adapter.targets": "all-linear",
        "training.learning-rate": 1e-4,
        "schedule": "cosine",
        "precision": "bfloat16",
    }
    assert "dataset_info.json" in dict(got.unused)["dataset"]


def test_a_file_of_trl(tmp_path: Path) -> None:
    got = read(tmp_path, TRL)
    assert (got.source, got.refused) == ("TRL", [])
    assert got.settings == {
        "strategy": "fedavg-lora",
        "adapter.start": "kaiming",
        "server.optimizer": "none",
        "model.name": "hub:Qwen/Qwen2.5-0.5B",
        "model.task": "causal-lm",
        "model.quantise": "4bit",
        "model.max-length": 256,
        "data.name": "notes.jsonl",
        "data.prompt": "",
        "data.completion": "note",
        "adapter.rank": 16,
        "adapter.alpha": 32,
        "adapter.scale": "sqrt-rank",
        "adapter.targets": "q_proj,v_proj",
        "training.optimizer": "adamw",
        "training.learning-rate": 1e-4,
        "schedule": "linear",
        "seed": 7,
    }


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    got = read(tmp_path, PEFT, "adapter_config.json")
    assert (got.source, got.refused) == ("PEFT's adapter_config.json", [])
    assert got.settings == {
        "strategy": "fedavg-lora",
        "model.name": "hub:distilbert-base-uncased",
        "model.task": "classification",
        "adapter.name": "lora",
        "adapter.start": "kaiming",
        "adapter.rank": 8,
        "adapter.alpha": 16,
        "adapter.scale": "rank",
        "adapter.targets": "q_lin,v_lin",
    }
    dora = read(tmp_path, {**PEFT, "use_dora": True, "use_rslora": True}, "adapter_config.json").settings
    assert (dora["adapter.name"], dora["adapter.scale"]) == ("dora", "sqrt-rank")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (AXOLOTL + "rl: dpo\n", "rl"),
        (AXOLOTL.replace("adapter: lora", "adapter: llama-adapter"), "adapter"),
        (AXOLOTL.replace("sample_packing: false", "sample_packing: true"), "sample_packing"),
        (AXOLOTL.replace("    type: alpaca", "    type: alpaca\n  - path: another"), "datasets.1.path"),
        (AXOLOTL + "lora_target_modules: [q_proj]\n", "lora_target_modules"),
        (LLAMA_FACTORY.replace("stage: sft", "stage: dpo"), "stage"),
        (LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full"), "finetuning_type"),
        (LLAMA_FACTORY.replace("trust_remote_code: false", "trust_remote_code: true"), "trust_remote_code"),
        (TRL.replace("use_peft: true", "use_peft: false"), "use_peft"),
        (TRL.replace("optim: adamw_torch", "optim: lion_8bit"), "optim"),
        (TRL.replace("packing: false", "packing: true"), "packing"),
        ({**PEFT, "target_modules": ".*layer.[0-3].*q_lin"}, "target_modules"),
        ({**PEFT, "peft_type": "LOHA"}, "peft_type"),
        ({**PEFT, "rank_pattern": {"q_lin": 4}}, "rank_pattern.q_lin"),
        ({**PEFT, "modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({**PEFT, "init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_would_be_another_training_is_refused_with_its_reason(
    content: str | dict[str, Any], key: str, tmp_path: Path
) -> None:
    name = "adapter_config.json" if isinstance(content, dict) else "train.yaml"
    ((refused, reason),) = read(tmp_path, content, name).refused
    assert refused.split(" = ")[0] == key
    assert reason
    if key in ("sample_packing", "packing"):
        left = read(tmp_path, content, name, key)
        assert (left.refused, dict(left.unused)[key]) == ([], "left out, as --leave-out says")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "is of no program that is known here"),
        ("[1, 2]", "holds no keys with values"),
        ("a: [", "is neither YAML nor JSON"),
        (f"{TRL}nested:\n" + "".join(f"  k{i}: 1\n" for i in range(2100)), "more than 2000 keys"),
        ("lora_r: 8\nbase_model: x\nlora_alpha: -1\n", "adapter.alpha"),
    ],
)
def test_a_file_that_is_none_is_an_error_of_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        read(tmp_path, text)
    assert "\n" not in str(refusal.value)


def test_a_list_that_is_named_a_million_times_ends_at_the_bound(tmp_path: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="more than 2000 keys"):
        read(tmp_path, f"base_model: x\nl0: &l0 [[1]]\n{levels}")


def test_tables_name_settings_that_there_are_and_no_key_twice() -> None:
    files = sorted(FORMATS.glob("*.toml"))
    assert {file.stem for file in files} == set(imported.ORDER)
    for file in files:
        table = imported._format(file.stem)
        rules = [rule if isinstance(rule, dict) else {"to": rule} for rule in table["keys"].values()]
        ours = {rule["to"] for rule in rules if "to" in rule} | set(table["fixed"])
        ours |= {
            name for rule in rules for own in rule.get("values", {}).values() if isinstance(own, dict) for name in own
        }
        assert not ours - {*known_settings()}, file.name
        listed = [*table["keys"], *(key for keys in table["unused"].values() for key in keys)]
        assert sorted({key for key in listed if listed.count(key) > 1}) == [], file.name
        assert all({"to", "values", "refused", "unused"} & {*rule} for rule in rules)


def test_the_command_writes_a_file_that_a_run_takes_and_nothing_where_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(TRL, encoding="utf-8")
    code, said = fedveil("import", "train.yaml")
    assert code == 0, said
    for line in ("lora_r = 16  →  adapter.rank = 16", "set privacy.epsilon", "next: fedveil plan -c job.toml"):
        assert line in said
    assert "per_device_train_batch_size" in Path("job.toml").read_text(encoding="utf-8").splitlines()[1]
    configure(read_settings_file(Path("job.toml")))
    code, said = fedveil("import", "train.yaml")
    assert (code, "job.toml is there already" in said) == (1, True)
    Path("train.yaml").write_text(TRL + "neftune_noise_alpha: 5\n", encoding="utf-8")
    code, said = fedveil("import", "train.yaml", "--output", "other.toml")
    assert (code, Path("other.toml").exists()) == (1, False)
    assert "--leave-out neftune_noise_alpha" in said
    assert fedveil("import", "train.yaml", "--output", "other.toml", "--leave-out", "neftune_noise_alpha")[0] == 0

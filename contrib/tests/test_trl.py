"""TRL's loss of one pair is ours: ``make test-trl``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_preference import PAIRS, model_of

from fedveil.common.model.base import load_base_model
from fedveil.contrib.tasks.pairs import rows_of_pair

pytestmark = pytest.mark.trl


def test_dpo_is_trls_on_one_pair(model_folder: Callable[[str], str], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, base = model_of(model_folder, "dpo", beta=0.5), load_base_model(model_folder("llama"), "causal-lm")
    (record,) = model.prepare(PAIRS[3:4])
    ours = float(model.score([record]).loss)
    rows = rows_of_pair(record)
    prompt = sum(label == -100 for label in rows[0]["labels"])
    ids = {"prompt_ids": rows[0]["input_ids"][:prompt]}
    ids |= {name: row["input_ids"][prompt:] for name, row in zip(("chosen_ids", "rejected_ids"), rows, strict=True)}
    words = {"prompt": "the film", "chosen": " warm", "rejected": " cold"}  # replaced by the tokens above
    arguments = DPOConfig(str(tmp_path), beta=0.5, use_cpu=True, bf16=False, report_to="none")
    trainer = DPOTrainer(
        model.peft_model,
        ref_model=base.module,
        args=arguments,
        train_dataset=Dataset.from_list([words]),
        processing_class=base.processor,
    )
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model.eval(), trainer.data_collator([ids])))
    assert abs(ours - 0.6931) > 0.01, "the pair's loss tells nothing"
    assert ours == pytest.approx(theirs, abs=1e-6)

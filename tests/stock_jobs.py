"""Jobs whose head is one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from audits.tiny_models import VOCABULARY, tiny_tokenizer


def stock_job(toy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings of a run with the head that transformers has, on a tiny BERT whose files hold a pooler."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = AutoConfig.for_model("bert", vocab_size=len(VOCABULARY), max_position_embeddings=40, **sizes)
        AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    own = {"head.pool": "stock", "model.feature-scale": 0.0, "adapter.targets": "query,value", "rounds": 1}
    return {**toy, **own, "model.name": str(folder), "training.learning-rate": 0.1}

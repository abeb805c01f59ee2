"""The files by which sentence-transformers computes a classifier: encoder, mean pooling, normalisation, dense layer.

A run's head is ``W (s x / |x|) + b`` on the mean ``x`` of the last hidden states, with s the feature scale, or
``W x + b`` for s = 0; a public metric is folded into W and b before. That is what these modules compute in a row, with
s in the dense layer's weight. What they return as an embedding are the logits. The layout is that of version 2, which
every later version reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.tasks.finished import LABELS

if TYPE_CHECKING:
    from torch import nn

ENCODER = "0_Transformer"
"""Folder of the encoder and its tokenizer: at the top, stock classes would put a head of their own on it."""
LOGITS_CODE = """\
import json
from sentence_transformers import SentenceTransformer

folder = {folder!r}
with open(folder + "/labels.json", encoding="utf-8") as file:
    labels = json.load(file)
logits = SentenceTransformer(folder).encode([{words}], convert_to_tensor=True)
print(dict(zip(labels, logits.softmax(-1)[0].tolist())))
"""
"""Code that uses what ``write_modules`` wrote."""
_DENSE = {"bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def write_modules(folder: Path, head: nn.Linear, labels: Sequence[str], feature_scale: float, limit: int) -> None:
    """Write the modules and the labels beside an encoder and its tokenizer, which lie in ``ENCODER`` already.

    Args:
        folder: in which that lies.
        head: takes features as they are, of length ``feature_scale``.
        labels: in the order of the head's rows.
        feature_scale: length that features are brought to; 0 leaves them as they are.
        limit: tokens that a text is cut to.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    classes, width = head.weight.shape
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    others = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling |= {f"pooling_mode_{name}": False for name in others}
    parts: list[tuple[str, dict[str, Any] | None]] = [("Transformer", None), ("Pooling", pooling)]
    parts += [("Normalize", {})] if feature_scale else []
    parts += [("Dense", {"in_features": width, "out_features": classes, **_DENSE})]
    modules = []
    for number, (kind, config) in enumerate(parts):
        path = f"{number}_{kind}"
        named = f"sentence_transformers.models.{kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": named})
        if config:
            _write(folder / path / "config.json", config)
        elif path != ENCODER:
            (folder / path).mkdir()
    weight = (head.weight.detach().double() * (feature_scale or 1.0)).float().cpu().contiguous()
    dense = {"linear.weight": weight, "linear.bias": head.bias.detach().float().cpu().contiguous()}
    save_file(dense, str(folder / str(modules[-1]["path"]) / "model.safetensors"), metadata={"format": "pt"})
    _write(folder / "modules.json", modules)
    _write(folder / LABELS, list(labels))
    _write(folder / ENCODER / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    # Logits are compared as they are; no prompt stands before a text.
    about: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "dot"}
    _write(folder / "config_sentence_transformers.json", about)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

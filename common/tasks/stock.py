"""Stock classifiers of transformers, filled with the encoder and the head of a finished model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import ModelError
from fedveil.common.tasks.finished import LABELS, Finished

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "classifier"
"""What every stock class that is used here calls its linear layer."""
APART = "encoder"
"""Folder of an encoder whose head lies apart."""
CLOSE = 1e-5
"""Largest difference of a logit between a run's head and the stock class, before it is written."""


def stock_of(model: Finished, loader: str) -> Any:
    """Return the stock classifier with the encoder's weights and the head's, float32, in eval mode.

    Args:
        model: the finished model.
        loader: class of transformers that makes it from a configuration, such as AutoModelForSequenceClassification.

    Raises:
        ModelError: it computes other logits than the run's model of records that are made up.
    """
    import torch
    import transformers

    encoder: Any = model.module.encoder
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    names = dict(enumerate(model.labels))
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    config.problem_type = model.task.export.problem_type
    with torch.random.fork_rng():
        stock: Any = getattr(transformers, loader).from_config(config)
    getattr(stock, stock.base_model_prefix).load_state_dict(encoder.state_dict())
    getattr(stock, HEAD).load_state_dict(head_of(model))
    stock = stock.float().eval()
    check_stock(model, stock)
    return stock


def head_of(model: Finished) -> dict[str, Tensor]:
    """Return weight and bias of the head, float32, on the CPU."""
    if model.module.head is None:
        raise ModelError("the model has no head")
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.module.head.state_dict().items()}


def write_apart(write: Callable[[Finished, Path], None], model: Finished, folder: Path) -> None:
    """Write encoder and head apart: at the top, stock classes would put a head of their own on the encoder.

    Args:
        write: writes the encoder and its processor into a folder.
        model: the finished model.
        folder: an empty one.
    """
    from safetensors.torch import save_file

    write(model, folder / APART)
    save_file(head_of(model), str(folder / "head.safetensors"), metadata={"format": "pt"})
    (folder / LABELS).write_text(json.dumps(model.labels, ensure_ascii=False) + "\n", encoding="utf-8")


def check_stock(model: Finished, stock: Any) -> None:
    """Raise ModelError if a stock class computes other logits than the run's model of records that are made up."""
    import torch

    invent = model.task.inventor(model.base, model.limit)
    for size in (model.limit, max(1, model.limit // 2)):
        batch = model.task.collate(model.base, [invent(size, number, 0) for number in range(4)])
        with torch.no_grad():
            logits = model.module(batch)
            stock_logits = stock(**{key: value for key, value in batch.items() if key != "labels"}).logits
        if not float((logits - stock_logits).abs().max()) <= CLOSE * max(1.0, float(logits.abs().max())):
            raise ModelError(
                f"{type(stock).__name__} has other logits than this run's head for records of {size} tokens: merge it "
                "with the versions that trained it"
            )

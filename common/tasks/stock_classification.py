"""Text classification by the head of transformers' own classifiers: linear, on the encoder's pooler.

``...ForSequenceClassification`` of a few kinds of models is an encoder, its pooler (a layer and tanh on the first
token's last hidden state, trained with the base model) and one linear layer. With this reading
(``head.pool = "stock"``) a run trains just that head, so its result is that class's, and PEFT's adapter of it
(``SEQ_CLS``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.errors import ConfigError
from fedveil.common.tasks.base import Batch
from fedveil.common.tasks.classification import PAIR, Classification, SentenceExport
from fedveil.common.tasks.finished import Export, Finished
from fedveil.common.tasks.stock import HEAD, head_of, stock_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule

STOCK = ("albert", "bert", "megatron-bert", "rembert")
"""Kinds of models whose stock classifier is a linear layer on the pooler's output, called ``classifier``."""
LOADER = "AutoModelForSequenceClassification"


class StockExport(SentenceExport):
    """A stock classifier of transformers."""

    library = "transformers"

    def write(self, model: Finished, folder: Path) -> None:
        """Write the model as ``AutoModelForSequenceClassification`` loads it.

        Raises:
            ModelError: what the stock class computes is not what the run's model does.
        """
        stock_of(model, LOADER).save_pretrained(folder)
        self.write_processor(model, folder)

    def write_head_adapter(self, model: Finished, adapter: Path, folder: Path) -> None:
        """Write adapter and head for ``AutoPeftModelForSequenceClassification``, the head in ``modules_to_save``.

        Raises:
            ConfigError: the run trained the head alone, so there is no adapter.
            ModelError: see ``write``.
        """
        from safetensors.torch import save_file

        from fedveil.common.tensor_file import read_tensors

        if not (adapter / "adapter_config.json").is_file():
            raise ConfigError("this run trained the head alone, and has no adapter: merge it without --form")
        stock = stock_of(model, LOADER)
        prefix, inside = "base_model.model.", f"base_model.model.{stock.base_model_prefix}."
        loaded = read_tensors(adapter / "adapter_model.safetensors")
        tensors = {inside + key.removeprefix(prefix): tensor for key, tensor in loaded.items()}
        tensors |= {f"{prefix}{HEAD}.{name}": tensor for name, tensor in head_of(model).items()}
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
        if config["base_model_name_or_path"].startswith("./"):  # a run's adapter names no folder of its machine
            base: Any = model.base.module
            config["base_model_name_or_path"] = base.config.name_or_path
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        self.write_processor(model, folder)

    def pipeline(self, model: Finished) -> str:
        """Return the task's own."""
        return Export.pipeline(self, model)

    def code(self, model: Finished, folder: str) -> str:
        """Return code that classifies a text, or a pair, with transformers alone."""
        words = '{"text": "a text", "text_pair": "its pair"}' if PAIR in model.inputs else '"a text"'
        return (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("text-classification", model={folder!r}, top_k=None, max_length={model.limit}, '
            "truncation=True)\n"
            f"print(classify({words}))\n"
        )


class StockClassification(Classification):
    """One label a record; the head reads the pooler."""

    export: ClassVar[Export] = StockExport()

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the encoder with its pooler; without one, if the files do not hold its weights."""
        from transformers import AutoModel, AutoTokenizer

        from fedveil.common.tasks.loading import OWN_CODE

        module, info = AutoModel.from_pretrained(name, **OWN_CODE, output_loading_info=True)
        if any(key.startswith("pooler.") for key in info["missing_keys"]):
            # What transformers makes up in their place is another pooler at every party.
            module.pooler = None
        return module, AutoTokenizer.from_pretrained(name, **OWN_CODE)

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on its pooler's output.

        Raises:
            ConfigError: the stock classifier of this kind of model is another, or the base model has no pooler.
        """
        from fedveil.common.tasks.module import TaskModule

        kind = getattr(base.module.config, "model_type", "")
        if kind not in STOCK:
            raise ConfigError(
                f"head.pool is 'stock', but no stock class computes a linear head on {base.name!r} (a model of kind "
                f"{kind!r}, not {', '.join(STOCK)}): set head.pool to 'mean', or choose another model"
            )
        if getattr(base.module, "pooler", None) is None:
            raise ConfigError(
                f"head.pool is 'stock', but the files of {base.name!r} hold no pooler: set head.pool to 'mean', or "
                "choose another model"
            )
        return TaskModule(encoder, _pooler_output, base.hidden_size, classes, feature_scale)


def _pooler_output(encoder: nn.Module, batch: Batch) -> Tensor:
    """Return the pooler's output, shape (records, hidden), float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    pooled: Tensor = encoder(**inputs).pooler_output.float()
    return pooled


Classification.readings["stock"] = StockClassification

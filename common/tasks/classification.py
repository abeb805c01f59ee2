"""Text classification: encoder, mean over the mask, one linear head.

A mean-pool head keeps its accuracy under DP-SGD where BERT's pooler loses ten points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.base import Batch, Record, Sums, Task, classified
from fedveil.common.tasks.finished import Export, Finished
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import LABEL, Role
from fedveil.common.tasks.sentence_modules import ENCODER, LOGITS_CODE, write_modules
from fedveil.common.tasks.text import TOKENS, TextExample, TextTask, pad_id, padded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.flat import Scalar
    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule


PAIR = "text-pair"
_HEAD_CODE = """\
tokenizer, head = AutoTokenizer.from_pretrained({base!r}), load_file("adapter/head.safetensors")
with open("adapter/fedveil.json", encoding="utf-8") as file:
    labels = json.load(file)["label_names"]
tokens = tokenizer({words}, truncation=True, max_length={limit}, return_tensors="pt")
with torch.no_grad():
    features = {features}
logits = features @ head["weight"].T + head["bias"]
print(dict(zip(labels, logits[0].softmax(-1).tolist())))
"""


class SentenceExport(Export):
    """An encoder and a head on the mean of its tokens, as modules of sentence-transformers."""

    hub_task = "text-classification"
    library = "sentence-transformers"

    def write_head_adapter(self, model: Finished, adapter: Path, folder: Path) -> None:
        """Raise ConfigError: PEFT's stock classifier reads the pooler."""
        raise ConfigError(
            "no stock class computes what this run's head reads: merge it without --form or run it again with "
            "head.pool 'stock'"
        )

    def write(self, model: Finished, folder: Path) -> None:
        """Write the encoder, and the head with its pooling as modules of sentence-transformers."""
        super().write(model, folder / ENCODER)
        if model.module.head is not None:
            write_modules(folder, model.module.head, model.labels, model.module.feature_scale, model.limit)

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write the tokenizer, which knows what the run cut records to."""
        model.base.processor.model_max_length = model.limit
        super().write_processor(model, folder)

    def pipeline(self, model: Finished) -> str:
        """Return that none computes a linear head on the mean of tokens."""
        del model
        return ""

    def adapter_code(self, base: str, settings: Mapping[str, Scalar], *, tuned: bool) -> str:
        """Return code that computes a text's probabilities, or a pair's, from the features and the head beside."""
        pooled = "pooler_output" if settings["head.pool"] == "stock" else "last_hidden_state.mean(1)"
        features, scale = f"model(**tokens).{pooled}", settings["model.feature-scale"]
        if scale:
            features = f"{scale} * torch.nn.functional.normalize({features}, dim=-1)"
        libraries = "from safetensors.torch import load_file\n"
        code = self._loads(base, "AutoTokenizer", tuned=tuned, imports=libraries)
        return f"import json\nimport torch\n{code}" + _HEAD_CODE.format(
            base=base,
            words='"a text", "its pair"' if settings["data.text-pair"] else '"a text"',
            limit=settings["model.max-length"],
            features=features,
        )

    def code(self, model: Finished, folder: str) -> str:
        """Return code that computes a text's probabilities, or a pair's, with sentence-transformers."""
        return LOGITS_CODE.format(folder=folder, words='["a text", "its pair"]' if PAIR in model.inputs else '"a text"')


class Classification(TextTask):
    """One label a record; loss is cross-entropy."""

    name: ClassVar[str] = "classification"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("text", "text", "the text"),
        Role(PAIR, "text_pair", "a second text, or of what an instruction is about", optional=True),
        LABEL,
    )
    counted: ClassVar[bool] = True
    export: ClassVar[Export] = SentenceExport()
    readings: ClassVar[dict[str, type[Classification]]] = {}
    """What reads features otherwise than this class, by ``head.pool``; filled in by the files that have one."""

    def check(self, config: RunConfig) -> None:
        """As every task's; and a stock head takes features as they are."""
        super().check(config)
        if config.head.pool == "stock" and config.model.feature_scale:
            raise ConfigError(
                "head.pool is 'stock', and the stock head takes features as they are: set model.feature-scale to 0"
            )

    def with_pool(self, pool: str) -> Task:
        """Return the reading of the pooler for ``stock``."""
        reading = self.readings.get(pool)
        return reading() if reading else super().with_pool(pool)

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the encoder; a pooler is never used, and an unused layer is only weight to carry."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        pooled = AutoConfig.from_pretrained(name, **OWN_CODE).model_type in ("bert", "roberta")
        options = {"add_pooling_layer": False} if pooled else {}
        return AutoModel.from_pretrained(name, **OWN_CODE, **options), AutoTokenizer.from_pretrained(name, **OWN_CODE)

    def tokenise(self, tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> list[Record]:
        """Return ``input_ids``, ``attention_mask``, ``token_type_ids`` where the model has them, ``labels``."""
        if not examples:
            return []
        texts = [example.text for example in examples]
        pairs = [example.text_pair or "" for example in examples] if examples[0].text_pair is not None else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        records: list[Record] = []
        for i, example in enumerate(examples):
            records.append({**{k: encoded[k][i] for k in encoded}, "labels": self.labels_of(example, i + 1)})
        return records

    def labels_of(self, example: TextExample, number: int) -> list[int]:
        """Return what a record has as ``labels``: the label's number; DataError, with the record's, if it has none."""
        if example.label is None:
            raise DataError(f"record {number} has no label; classification needs one for each record")
        return [example.label]

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right, and ``labels`` of shape (records,)."""
        import torch

        batch = {
            key: padded([record[key] for record in records], pad_id(base) if key == TOKENS else 0, size)
            for key in records[0]
            if key != "labels"
        }
        return {**batch, "labels": torch.tensor([record["labels"][0] for record in records])}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record of one text, of this label."""
        fill = {TOKENS: list(tokens), "attention_mask": [1] * len(tokens), "labels": [label]}
        return {key: fill.get(key, [0] * len(tokens)) for key in like}

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on its pooled features."""
        from fedveil.common.tasks.module import TaskModule

        return TaskModule(encoder, _pooled, base.hidden_size, classes, feature_scale)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, one unit a record."""
        return classified(module, batch)


def _pooled(encoder: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of the last hidden states over a record's tokens, shape (records, hidden), float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden: Tensor = encoder(**inputs).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    # A record without a token pools to zero instead of dividing by it.
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

"""Export of a model that prefers answers to stock libraries: a language model, or an encoder with one number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.tasks.classification import SentenceExport
from fedveil.common.tasks.finished import Export, Finished
from fedveil.common.tasks.sentence_modules import ENCODER, write_modules

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar

NUMBER = "how good the answer is"
"""The one row of a judge's head."""
_CODE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({folder!r})
print(model.encode([("a question", "an answer"), ("a question", "another answer")]))
"""
_HEAD_CODE = """\
tokenizer, head = AutoTokenizer.from_pretrained({base!r}), load_file("adapter/head.safetensors")
tokens = tokenizer("a question", "an answer", truncation=True, max_length={limit}, return_tensors="pt")
with torch.no_grad():
    features = {features}
print(features @ head["weight"].T + head["bias"])
"""


class JudgeExport(SentenceExport):
    """An encoder and a head of one number on the mean of its tokens, as modules of sentence-transformers."""

    hub_task: ClassVar[str] = "text-ranking"

    def write(self, model: Finished, folder: Path) -> None:
        """Write encoder, pooling and head."""
        Export.write(self, model, folder / ENCODER)
        if model.module.head is not None:
            write_modules(folder, model.module.head, (NUMBER,), model.module.feature_scale, model.limit)

    def adapter_code(self, base: str, settings: Mapping[str, Scalar], *, tuned: bool) -> str:
        """Return code that computes the number of one answer."""
        features, scale = "model(**tokens).last_hidden_state.mean(1)", settings["model.feature-scale"]
        if scale:
            features = f"{scale} * torch.nn.functional.normalize({features}, dim=-1)"
        libraries = "import torch\nfrom safetensors.torch import load_file\n"
        code = self._loads(base, "AutoTokenizer", tuned=tuned, imports=libraries)
        return code + _HEAD_CODE.format(base=base, limit=settings["model.max-length"], features=features)

    def code(self, model: Finished, folder: str) -> str:
        """Return code that computes two answers' numbers with sentence-transformers."""
        return _CODE.format(folder=folder)

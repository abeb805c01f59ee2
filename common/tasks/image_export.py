"""The finished image classifier: a stock class of transformers, or encoder and head apart."""

from __future__ import annotations

import json
from pathlib import Path

from fedveil.common.tasks.finished import Export, Finished
from fedveil.common.tasks.patches import image_side, position_options, special_tokens
from fedveil.common.tasks.stock import stock_of, write_apart

STOCK = ("dinov2", "dinov2_with_registers")
"""Kinds of models whose stock classifier is a linear layer on class token and mean of patches, as they are."""
_PIPELINE_CODE = """\
from transformers import pipeline

classify = pipeline("image-classification", model={folder!r}, top_k={labels})
print(classify("image.png"))
"""
_LOGITS_CODE = """\
import json
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

folder = {folder!r}
with open(folder + "/labels.json", encoding="utf-8") as file:
    labels = json.load(file)
model, head = AutoModel.from_pretrained(folder + "/encoder"), load_file(folder + "/head.safetensors")
processor = AutoImageProcessor.from_pretrained(folder + "/encoder")
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    hidden = model(**pixels{options}).last_hidden_state
features = {features}
probabilities = (features @ head["weight"].T + head["bias"]).softmax(-1)
print(dict(zip(labels, probabilities[0].tolist())))
"""


class ImageExport(Export):
    """The stock classifier where one computes the run's head, else encoder and head apart."""

    hub_task = "image-classification"

    def write(self, model: Finished, folder: Path) -> None:
        """Write the stock classifier, or encoder and head apart where none computes the head (``head.safetensors``).

        Raises:
            ModelError: what the stock class computes is not what the run's model does.
        """
        if self.pipeline(model):
            stock_of(model, "AutoModelForImageClassification").save_pretrained(folder)
            self.write_processor(model, folder)
            return
        write_apart(super().write, model, folder)

    def pipeline(self, model: Finished) -> str:
        """Return the task's own where the stock class of the encoder's kind computes the run's head."""
        kind = getattr(model.base.module.config, "model_type", "")
        return self.hub_task if kind in STOCK and not model.module.feature_scale else ""

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write the processor's settings for images of the run's size."""
        settings = model.base.processor.settings(image_side(model.base, model.limit))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def code(self, model: Finished, folder: str) -> str:
        """Return code that classifies an image with transformers, and the head's two tensors where they lie apart."""
        if self.pipeline(model):
            return _PIPELINE_CODE.format(folder=folder, labels=len(model.labels))
        special = special_tokens(model.base)
        pooled = f"hidden[:, {special}:].mean(1)"
        options = "".join(f", {key}={value}" for key, value in position_options(model.base).items())
        features = f"torch.cat([hidden[:, 0], {pooled}], -1)" if special else pooled
        scale = model.module.feature_scale
        return _LOGITS_CODE.format(
            folder=folder,
            options=options,
            features=f"{scale} * torch.nn.functional.normalize({features}, dim=-1)" if scale else features,
        )

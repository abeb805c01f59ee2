"""Image classification: a vision transformer, its class token beside the mean of its patches, one linear head.

All images have one size, so all records have one shape, and no mask. The size follows from ``model.max-length``: the
largest square of whole patches that has at most so many tokens, and no larger than the model's authors use.

The head sees the class token and the mean of the patches side by side, as DINOv2's own classifier does (Oquab et al.
2023, section 7.1): what is wrong in one corner of an image shows in its patches.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakKeyDictionary

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.base import LABELS, Batch, Finished, Inventor, Record, Sums, Task, classified
from fedveil.common.tasks.cells import Misfit
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.images import Picture, image_file, is_image_folder, read_image, read_image_folder
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import LABEL, Role
from fedveil.common.tasks.stock import head_of, stock_of
from fedveil.common.tasks.tables import Table
from fedveil.common.tasks.textures import made_up_image

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.sections import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.module import TaskModule

PIXELS, TOKENS = "pixel_values", "tokens"
CHANCE = ("drop_path_rate", "layerdrop", "mask_ratio")
"""Settings of a model by which it leaves out layers or patches by chance: all off. Dropout is off in every task."""
STOCK = ("dinov2", "dinov2_with_registers")
"""Kinds of models whose stock classifier is a linear layer on class token and mean of patches, as they are."""
ENCODER = "encoder"
"""Folder of an encoder whose head lies apart: at the top, stock classes would put a head of their own on it."""
UNUSED_POOLERS = ("vit", "deit", "beit", "data2vec-vision")
"""Kinds of model that come with a pooler, which no feature is read from."""
MOST_SPECIAL = 16
"""Tokens of a record that are no patch: a class token, registers."""


@dataclass(frozen=True, slots=True)
class ImageExample(Example):
    """One image."""

    image: Picture

    def canonical(self, label: str | None) -> str:
        """Return the hash of the pixels and the label; how the image was encoded does not count."""
        return f"image:{self.image.pixels}:{'' if label is None else label}"

    def likeness(self) -> str:
        """Return the hash of the pixels."""
        return self.image.pixels


class ImageClassification(Task):
    """One label an image; loss is cross-entropy."""

    name: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("image", "image", "the image: its file's bytes or path", read=read_image, file=image_file),
        LABEL,
    )
    example: ClassVar[type[Example]] = ImageExample
    counted: ClassVar[bool] = True
    hub_task: ClassVar[str] = "image-classification"

    def check(self, config: RunConfig) -> None:
        """As every task's; and images can be decoded here. Without that every record of a site would be none."""
        super().check(config)
        if find_spec("PIL") is None:
            raise ConfigError(f"model.task {self.name!r} needs the library Pillow: pip install 'fedveil[vision]'")

    def reads(self, source: Path) -> bool:
        """Return whether a source is a folder with one sub-folder a label."""
        return is_image_folder(source)

    def read_source(self, source: Path) -> Table:
        """Return the images of such a folder."""
        return read_image_folder(source)

    # --- the base model ---

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the vision encoder, of a pair with text its vision half, and its processor's settings."""
        from transformers import AutoConfig, AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        from fedveil.common.tasks.image_processor import ImageProcessor

        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        config = AutoConfig.from_pretrained(name, **OWN_CODE)
        config = getattr(config, "vision_config", config)
        for key in CHANCE:
            if hasattr(config, key):
                setattr(config, key, 0.0)
        options = {"add_pooling_layer": False} if config.model_type in UNUSED_POOLERS else {}
        module = AutoModel.from_pretrained(name, config=config, **OWN_CODE, **options)
        return module, ImageProcessor.from_settings(settings)

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return the processor's settings."""
        return {"image-processor": processor.parts()}

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the tokens of every record: those of the largest square that ``max_length`` has room for."""
        most = base.processor.side // _patch(base)
        special = _special(base, most)
        patches = min(most, math.isqrt(max(0, max_length - special)))
        if patches < 1:
            raise ConfigError(
                f"model.max-length is {max_length}: set it to {1 + special} or more, an image's least tokens"
            )
        if patches < most:
            try:
                _hidden(base.module, base, patches * _patch(base))
            except Exception as error:  # of a model that has places for one number of patches
                raise ConfigError(
                    f"model.max-length is {max_length}, but {base.name!r} takes images of {base.processor.side} pixels "
                    f"alone: set it to {most**2 + special}"
                ) from error
        return patches**2 + special

    # --- records and batches ---

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return ``pixel_values`` of shape (3, side, side), uint8, ``labels`` and the number of ``tokens``."""
        side = _side(base, limit)
        records: list[Record] = []
        for i, example in enumerate(cast(Sequence[ImageExample], examples)):
            if example.label is None:
                raise DataError(f"record {i + 1} has no label; classification needs one for each record")
            pixels = base.processor.pixels(example.image, side)
            records.append({PIXELS: pixels, "labels": example.label, TOKENS: limit})
        return records

    def size(self, record: Record) -> int:
        """Return the number of patches and special tokens: the same of every record."""
        return int(record[TOKENS])

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the image is of the run's size."""
        side = _side(base, limit)
        return tuple(record[PIXELS].shape) == (3, side, side) and self.size(record) == limit

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        """Return one shape for all, without padding."""
        from fedveil.common.model.shapes import Shapes

        return Shapes(limit, tokens, most, uniform=True)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return ``pixel_values`` of shape (records, 3, side, side), float32, and ``labels`` of shape (records,)."""
        import torch

        pixels = torch.stack([record[PIXELS] for record in records])
        labels = torch.tensor([record["labels"] for record in records])
        return {PIXELS: base.processor.normalised(pixels), "labels": labels}

    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return a black image."""
        return {**like, PIXELS: like[PIXELS].new_zeros(like[PIXELS].shape), "labels": 0}

    def inventor(self, base: BaseModel, limit: int) -> Inventor:
        """Return what draws every pixel by the record's number; all sizes are one."""
        import torch

        side = _side(base, limit)

        def invent(size: int, number: int, label: int) -> Record:
            draw = torch.Generator().manual_seed(number)
            pixels = torch.randint(256, (3, side, side), generator=draw, dtype=torch.uint8)
            return {PIXELS: pixels, "labels": label, TOKENS: limit}

        return invent

    def measuring_inventor(self, base: BaseModel, limit: int) -> Inventor:
        """Return what draws textures by the record's number (``common.tasks.textures``); all sizes are one."""
        side = _side(base, limit)

        def invent(size: int, number: int, label: int) -> Record:
            return {PIXELS: made_up_image(number, side), "labels": label, TOKENS: limit}

        return invent

    # --- the model and its loss ---

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on its class token and the mean of its patches."""
        from fedveil.common.tasks.module import TaskModule

        special = _special(base, base.processor.side // _patch(base))
        width = base.hidden_size * (2 if special else 1)
        return TaskModule(encoder, _features(base, special), width, classes, feature_scale)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, one unit a record."""
        return classified(module, batch)

    # --- the finished model ---

    def write_stock(self, model: Finished, folder: Path) -> None:
        """Write the stock classifier, or encoder and head apart where none computes the head (``head.safetensors``).

        Raises:
            ModelError: what the stock class computes is not what the run's model does.
        """
        from safetensors.torch import save_file

        if self.pipeline(model):
            stock_of(model, "AutoModelForImageClassification").save_pretrained(folder)
            self.write_processor(model, folder)
            return
        super().write_stock(model, folder / ENCODER)
        save_file(head_of(model), str(folder / "head.safetensors"), metadata={"format": "pt"})
        (folder / LABELS).write_text(json.dumps(model.labels, ensure_ascii=False) + "\n", encoding="utf-8")

    def pipeline(self, model: Finished) -> str:
        """Return the task's own where the stock class of the encoder's kind computes the run's head."""
        kind = getattr(model.base.module.config, "model_type", "")
        return self.hub_task if kind in STOCK and not model.module.feature_scale else ""

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write the processor's settings for images of the run's size."""
        settings = model.base.processor.settings(_side(model.base, model.limit))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def stock_code(self, model: Finished, folder: str) -> str:
        """Return code that classifies an image with transformers, and the head's two tensors where they lie apart."""
        if self.pipeline(model):
            return _PIPELINE_CODE.format(folder=folder, labels=len(model.labels))
        special = _special(model.base, model.base.processor.side // _patch(model.base))
        pooled = f"hidden[:, {special}:].mean(1)"
        options = "".join(f", {key}={value}" for key, value in _options(model.base).items())
        features = f"torch.cat([hidden[:, 0], {pooled}], -1)" if special else pooled
        scale = model.module.feature_scale
        return _LOGITS_CODE.format(
            folder=folder,
            options=options,
            features=f"{scale} * torch.nn.functional.normalize({features}, dim=-1)" if scale else features,
        )

    def asked(self, words: Sequence[str]) -> Example:
        """Return the image in the file of this path."""
        try:
            return ImageExample(image=read_image(Path(words[0]).read_bytes()), label=0)
        except OSError as error:
            raise DataError(f"{words[0]} cannot be read ({error.strerror}): check the path") from error
        except Misfit as misfit:
            raise DataError(f"{words[0]} {misfit.what}: {misfit.advice}") from misfit


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


def _features(base: BaseModel, special: int) -> Callable[[nn.Module, Batch], Tensor]:
    """Return what reads features of shape (records, hidden or twice that), float32.

    The first token is the class token; a model without one has its patches alone.
    """
    import torch

    options = _options(base)

    def read(encoder: nn.Module, batch: Batch) -> Tensor:
        hidden: Tensor = encoder(pixel_values=batch[PIXELS], **options).last_hidden_state.float()
        mean = hidden[:, special:].mean(1)
        return torch.cat([hidden[:, 0], mean], dim=-1) if special else mean

    return read


def _patch(base: BaseModel) -> int:
    """Return the side of a patch in pixels."""
    patch = getattr(base.module.config, "patch_size", None)
    sides = {patch} if isinstance(patch, int) else set(patch or ())
    if len(sides) != 1:
        raise ConfigError(f"{base.name!r} is no vision transformer with square patches: name one as model.name")
    return int(sides.pop())


def _options(base: BaseModel) -> dict[str, bool]:
    """Return what makes a model take images of another size than its table of places is for, where it must be asked."""
    key = "interpolate_pos_encoding"
    return {key: True} if key in inspect.signature(base.module.forward).parameters else {}


def _hidden(module: nn.Module, base: BaseModel, side: int) -> Tensor:
    """Return the last hidden states of a black image."""
    import torch

    with torch.no_grad():
        hidden: Tensor = module(pixel_values=torch.zeros(1, 3, side, side), **_options(base)).last_hidden_state
    return hidden


_SPECIAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _special(base: BaseModel, patches: int) -> int:
    """Return how many tokens stand before the patches, as an image of ``patches`` times ``patches`` shows.

    Raises:
        ConfigError: the model's output is not one token a patch and a few before them.
    """
    if base.module not in _SPECIAL:
        try:
            shape = tuple(_hidden(base.module, base, patches * _patch(base)).shape)
        except Exception as error:  # whatever a model of another kind raises
            raise ConfigError(
                f"{base.name!r} takes no images of {base.processor.side} pixels, as its processor says"
            ) from error
        special = shape[1] - patches**2 if len(shape) == 3 else -1
        if not 0 <= special <= MOST_SPECIAL:
            raise ConfigError(f"{base.name!r} is no vision transformer: its output is not one token for each patch")
        _SPECIAL[base.module] = special
    return _SPECIAL[base.module]


def _side(base: BaseModel, limit: int) -> int:
    """Return the side in pixels of images of ``limit`` tokens."""
    patch = _patch(base)
    return math.isqrt(limit - _special(base, base.processor.side // patch)) * patch

"""Image classification: a vision transformer, its class token beside the mean of its patches, one linear head.

All images have one size, so all records have one shape, and no mask. The size follows from ``model.max-length``: the
largest square of whole patches that has at most that many tokens, and no larger than the model's authors use.

The head sees the class token and the mean of the patches side by side, as DINOv2's own classifier does (Oquab et al.
2023, section 7.1): what is wrong in one corner of an image shows in its patches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.base import Batch, Inventor, Record, Sums, Task, classified
from fedveil.common.tasks.cell_files import cell_file, is_labelled_folder, read_labelled_folder
from fedveil.common.tasks.cells import Misfit
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Export, Questions
from fedveil.common.tasks.image_export import ImageExport
from fedveil.common.tasks.images import IMAGE, SUFFIXES, Picture, read_image
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.patches import hidden_states, image_side, patch_side, position_options, special_tokens
from fedveil.common.tasks.roles import LABEL, Role
from fedveil.common.tasks.tables import Table
from fedveil.common.tasks.textures import made_up_image, made_up_pixels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.module import TaskModule

PIXELS, TOKENS = "pixel_values", "tokens"
CHANCE = ("drop_path_rate", "layerdrop", "mask_ratio")
"""Settings of a model by which it leaves out layers or patches by chance: all off. Dropout is off in every task."""
UNUSED_POOLERS = ("vit", "deit", "beit", "data2vec-vision")
"""Kinds of model that come with a pooler, which no feature is read from."""


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


def image_at(words: Sequence[str]) -> Example:
    """Return the image in the file of a path, the one word given; DataError if it cannot be read."""
    (path,) = words
    try:
        return ImageExample(image=read_image(Path(path).read_bytes()), label=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except Misfit as misfit:
        raise DataError(f"{path} {misfit.what}: {misfit.advice}") from misfit


class ImageClassification(Task):
    """One label an image; loss is cross-entropy."""

    name: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("image", "image", "the image: its file's bytes or path", read=read_image, file=cell_file),
        LABEL,
    )
    example: ClassVar[type[Example]] = ImageExample
    counted: ClassVar[bool] = True
    questions: ClassVar[Questions | None] = Questions(image_at)
    export: ClassVar[Export] = ImageExport()

    def check(self, config: RunConfig) -> None:
        """As every task's; and images can be decoded here. Without that every record of a site would be none."""
        super().check(config)
        if find_spec("PIL") is None:
            raise ConfigError(f"model.task {self.name!r} needs the library Pillow: pip install 'fedveil[vision]'")

    def read_source(self, source: Path) -> Table | None:
        """Return the images of a folder with one sub-folder a label."""
        return read_labelled_folder(source, IMAGE, SUFFIXES) if is_labelled_folder(source) else None

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
        most = base.processor.side // patch_side(base)
        special = special_tokens(base)
        patches = min(most, math.isqrt(max(0, max_length - special)))
        if patches < 1:
            raise ConfigError(
                f"model.max-length is {max_length}: set it to {1 + special} or more, an image's least tokens"
            )
        if patches < most:
            try:
                hidden_states(base, patches * patch_side(base))
            except Exception as error:  # of a model that has places for one number of patches
                raise ConfigError(
                    f"model.max-length is {max_length}, but {base.name!r} takes images of {base.processor.side} pixels "
                    f"alone: set it to {most**2 + special}"
                ) from error
        return patches**2 + special

    # --- records and batches ---

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return ``pixel_values`` of shape (3, side, side), uint8, ``labels`` and the number of ``tokens``."""
        side = image_side(base, limit)
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
        side = image_side(base, limit)
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

    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        """Return what draws every pixel by the record's number, or textures if ``lifelike``; all sizes are one."""
        side = image_side(base, limit)
        draw = made_up_image if lifelike else made_up_pixels

        def invent(size: int, number: int, label: int) -> Record:
            return {PIXELS: draw(number, side), "labels": label, TOKENS: limit}

        return invent

    # --- the model and its loss ---

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on its class token and the mean of its patches."""
        from fedveil.common.tasks.module import TaskModule

        special = special_tokens(base)
        width = base.hidden_size * (2 if special else 1)
        return TaskModule(encoder, _features(base, special), width, classes, feature_scale)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, one unit a record."""
        return classified(module, batch)


def _features(base: BaseModel, special: int) -> Callable[[nn.Module, Batch], Tensor]:
    """Return what reads features of shape (records, hidden or twice that), float32.

    The first token is the class token; a model without one has its patches alone.
    """
    import torch

    options = position_options(base)

    def read(encoder: nn.Module, batch: Batch) -> Tensor:
        hidden: Tensor = encoder(pixel_values=batch[PIXELS], **options).last_hidden_state.float()
        mean = hidden[:, special:].mean(1)
        return torch.cat([hidden[:, 0], mean], dim=-1) if special else mean

    return read

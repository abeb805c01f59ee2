"""A vision model's own settings for images: size, scaling and normalisation.

The settings are those of ``preprocessor_config.json``. Nothing is taken from other images: neither size nor
normalisation may follow from the batch, in which one record would move the others, or from a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import ConfigError
from fedveil.common.tasks.images import Picture, decoded

if TYPE_CHECKING:
    from torch import Tensor

SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
"""Steps that are taken here, in this order."""


@dataclass(frozen=True)
class ImageProcessor:
    """How an image becomes the model's input: a square of RGB, scaled by Pillow."""

    side: int
    """Of the square that the model's authors use, in pixels."""
    edge: int
    """Length that the shorter edge is brought to before the square is cut out of the middle; 0: the whole image is
    brought to the square, whatever its proportions."""
    resample: int
    """Pillow's number of the filter."""
    scale: float
    """What a channel from 0 to 255 is multiplied by."""
    mean: tuple[float, ...]
    """Subtracted from each channel after that."""
    std: tuple[float, ...]
    """What each channel is divided by last."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageProcessor:
        """Return the processor of a model's settings.

        Raises:
            ConfigError: they ask for a step that is not known here, or images of no fixed square.
        """
        foreign = [key for key, on in settings.items() if key.startswith("do_") and on and key not in SWITCHES]
        if foreign:
            raise ConfigError(f"the model's image processor asks for {foreign[0]}, which is not known here")
        if not settings.get("do_resize", True):
            raise ConfigError("the model's image processor does not resize, and images of one size are needed")
        size, edge = settings.get("size") or {}, 0
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if "shortest_edge" in size:
            edge = int(size["shortest_edge"])
            size = {"height": edge, "width": edge}
        if settings.get("do_center_crop"):
            crop = settings.get("crop_size") or {}
            size, uncut = ({"height": crop, "width": crop} if isinstance(crop, int) else crop), size
            # Of an image that was brought to a square, the middle is cut out as of one with a shorter edge.
            edge = edge or int(uncut.get("height", 0))
        side = int(size.get("height", 0))
        if side < 1 or side != int(size.get("width", 0)) or (edge and edge < side):
            raise ConfigError("the model's image processor does not name a square that it brings all images to")
        normal = settings.get("do_normalize", True)
        return cls(
            side=side,
            edge=edge,
            resample=int(settings.get("resample", 2)),
            scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
            mean=tuple(map(float, settings["image_mean"])) if normal else (0.0,) * 3,
            std=tuple(map(float, settings["image_std"])) if normal else (1.0,) * 3,
        )

    def settings(self, side: int) -> dict[str, Any]:
        """Return settings as ``preprocessor_config.json`` has them, for images of ``side`` pixels.

        A stock processor that is made from them scales to whole pixels before it cuts, so its images differ by as much
        as that does; ``from_settings`` makes the same processor for ``side`` as the model's own, and equal images.
        """
        square = {"height": side, "width": side}
        edge = round(self.edge * side / self.side)
        cut = {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": square}
        return {
            "image_processor_type": "BitImageProcessor" if edge else "ViTImageProcessor",
            "do_resize": True,
            **(cut if edge else {"size": square}),
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def pixels(self, picture: Picture, side: int) -> Tensor:
        """Return an image as a square of ``side`` pixels, shape (3, side, side), uint8.

        What is cut away, and how it is scaled, is as at the processor's own size.

        Raises:
            Misfit: the image cannot be decoded.
        """
        import numpy as np
        import torch

        image = decoded(picture.content)
        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.edge:
            # Only what is square is scaled: an image of one row of pixels would grow without bound.
            square = min(image.size) * self.side / self.edge
            left, top = (image.width - square) / 2, (image.height - square) / 2
            box = (left, top, left + square, top + square)
        scaled = image.resize((side, side), self.resample, box=box)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return images of shape (images, 3, side, side), uint8, as the model takes them, float32."""
        import torch

        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std

    def parts(self) -> dict[str, Any]:
        """Return all that decides what becomes of an image."""
        return asdict(self)

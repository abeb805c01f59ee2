"""Made-up images: smooth fields of many scales, with waves or plain shapes on every second and third of them.

They are no one's, and a number always makes the same one. Where a vision model's features of any image
point, and along which directions those of images differ most, they tell well enough to centre and whiten by; pixels
drawn one by one do not (``experiments/log``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

SCALES = (2, 4, 8, 16, 32, 64)
"""Points a side of the fields that are added up."""
WAVES, MOST_SHAPES = 3, 6


def made_up_pixels(number: int, side: int) -> Tensor:
    """Return the image of this number whose pixels are drawn one by one, shape (3, side, side), uint8."""
    import torch

    return torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def made_up_image(number: int, side: int) -> Tensor:
    """Return the image of this number, shape (3, side, side), uint8."""
    import torch

    draw = torch.Generator().manual_seed(number)
    image = _fields(side, draw)
    if number % 3 == 1:
        image = image + _waves(side, draw)
    elif number % 3 == 2:
        image = _with_shapes(image, draw)
    return image.clamp(0, 255).to(torch.uint8)


def _fields(side: int, draw: Generator) -> Tensor:
    """Return random fields, whose strength falls with their scale by a drawn power; mostly grey."""
    import torch
    import torch.nn.functional as F

    slope, contrast, mean = torch.rand(3, generator=draw).tolist()
    image = torch.zeros(3, side, side)
    for points in SCALES:
        field = 0.8 * torch.randn(1, points, points, generator=draw) + 0.2 * torch.randn(
            3, points, points, generator=draw
        )
        image += points**-slope * F.interpolate(field[None], size=(side, side), mode="bicubic")[0]
    image = (image - image.mean()) / image.std().clamp(min=1e-6)
    return (60 + 135 * mean) + (20 + 60 * contrast) * image


def _waves(side: int, draw: Generator) -> Tensor:
    """Return the sum of a few plane waves, shape (side, side)."""
    import torch

    y, x = torch.meshgrid(*[torch.arange(side) / side] * 2, indexing="ij")
    total = torch.zeros(side, side)
    for _ in range(WAVES):
        angle, octave, phase = torch.rand(3, generator=draw).tolist()
        along = x * math.cos(math.pi * angle) + y * math.sin(math.pi * angle)
        strength = torch.randn(1, generator=draw)
        total += strength * torch.cos(2 * math.pi * (2 ** (1 + 4 * octave) * along + phase))
    return 40 * torch.rand(1, generator=draw) * total / total.std().clamp(min=1e-6)


def _with_shapes(image: Tensor, draw: Generator) -> Tensor:
    """Return an image with ellipses and rectangles of one colour each over it."""
    import torch

    side = image.shape[-1]
    y, x = torch.meshgrid(*[torch.arange(side) / side] * 2, indexing="ij")
    for _ in range(int(torch.randint(1, MOST_SHAPES + 1, (1,), generator=draw))):
        left, top, wide, high, kind = torch.rand(5, generator=draw).tolist()
        u, v = (x - left) / (0.04 + wide / 3), (y - top) / (0.04 + high / 3)
        inside = u.square() + v.square() < 1 if kind < 0.5 else (u.abs() < 1) & (v.abs() < 1)
        colour = 255 * torch.rand(3, 1, 1, generator=draw)
        image = torch.where(inside, 0.8 * colour + 0.2 * image, image)
    return image

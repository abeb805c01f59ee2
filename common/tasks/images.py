"""Images as cells of a table hold them.

A cell holds a file's bytes, or its path below the table's folder. Only PNG and JPEG are decoded, by Pillow, after
size and bytes were held against limits: a file of a few bytes may state any size. What cannot be decoded is no
image, and its row no record.

An image's identity is its pixels: encoded otherwise without loss, it is the same.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.tasks.cell_files import MOST_BYTES, content_of
from fedveil.common.tasks.cells import Misfit

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
MOST_PIXELS = 1 << 25
"""Of one image as its file states them: 33 million, 100 MB once decoded."""
IMAGE = "image"
"""Column of a folder of images."""
_DEPTH = 8
"""Bits of a pixel's channel."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that can be decoded."""

    pixels: str
    """SHA-256 of width, height and RGB pixels, in hexadecimal."""
    content: bytes = field(compare=False, repr=False)
    """The file as it was read."""


def read_image(value: object, folder: Path | None = None) -> Picture:
    """Return the image of a cell: a file's bytes, a path below ``folder``, or as the hub has it, ``{"bytes": ...}``.

    Raises:
        Misfit: there is no image, or none within the limits.
    """
    content = content_of(value, folder)
    image = decoded(content)
    shape = f"{image.width}x{image.height}:".encode()
    return Picture(hashlib.sha256(shape + image.tobytes()).hexdigest(), content)


def decoded(content: bytes) -> Image:
    """Return the first picture of a PNG or JPEG file as RGB, 8 bits a channel, turned as its own mark says.

    Sixteen bits become eight by leaving the lower ones out. What lies under transparency is taken as it is.

    Raises:
        Misfit: it is no such file, is cut short, or states more than ``MOST_PIXELS``.
    """
    from PIL import Image, ImageOps

    if len(content) > MOST_BYTES:
        raise Misfit(f"has an image of more than {MOST_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings(action="ignore"):  # of sizes that are refused below
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        if opened.width * opened.height > MOST_PIXELS:
            raise Misfit(f"has an image of more than {MOST_PIXELS} pixels", "make it smaller")
        opened.load()
        image: Image.Image = _in_eight_bits(ImageOps.exif_transpose(opened)).convert("RGB")
        return image
    except Misfit:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, where a file states far more than ours
        raise Misfit(f"has an image of more than {MOST_PIXELS} pixels", "make it smaller") from None
    except Exception:  # Pillow raises whatever a broken file leads it to; its words might quote the file
        raise Misfit("has an image that cannot be decoded", "save it again as PNG or JPEG") from None


def _in_eight_bits(image: Any) -> Any:
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image

    # Pillow's own way cuts at 255, and all of a radiograph is white.
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> _DEPTH).clip(max=255).astype(np.uint8))

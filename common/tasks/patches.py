"""The patches of a vision transformer: their side, and the tokens that precede them."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from fedveil.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.model.base import BaseModel

MOST_SPECIAL = 16
"""Tokens of a record that are no patch: a class token, registers."""


def patch_side(base: BaseModel) -> int:
    """Return the side of a patch in pixels."""
    patch = getattr(base.module.config, "patch_size", None)
    sides = {patch} if isinstance(patch, int) else set(patch or ())
    if len(sides) != 1:
        raise ConfigError(f"{base.name!r} is no vision transformer with square patches: name one as model.name")
    return int(sides.pop())


def position_options(base: BaseModel) -> dict[str, bool]:
    """Return the option by which a model takes images of another size than its position table, if it has one."""
    key = "interpolate_pos_encoding"
    return {key: True} if key in inspect.signature(base.module.forward).parameters else {}


def hidden_states(base: BaseModel, side: int) -> Tensor:
    """Return the last hidden states of a black image."""
    import torch

    with torch.no_grad():
        hidden: Tensor = base.module(
            pixel_values=torch.zeros(1, 3, side, side), **position_options(base)
        ).last_hidden_state
    return hidden


_SPECIAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def special_tokens(base: BaseModel) -> int:
    """Return how many tokens precede the patches, as an image of the processor's size shows.

    Raises:
        ConfigError: the model's output is not one token a patch and a few before them.
    """
    if base.module not in _SPECIAL:
        patches = base.processor.side // patch_side(base)
        try:
            shape = tuple(hidden_states(base, patches * patch_side(base)).shape)
        except Exception as error:  # whatever a model of another kind raises
            raise ConfigError(
                f"{base.name!r} takes no images of {base.processor.side} pixels, as its processor says"
            ) from error
        special = shape[1] - patches**2 if len(shape) == 3 else -1
        if not 0 <= special <= MOST_SPECIAL:
            raise ConfigError(f"{base.name!r} is no vision transformer: its output is not one token for each patch")
        _SPECIAL[base.module] = special
    return _SPECIAL[base.module]


def image_side(base: BaseModel, limit: int) -> int:
    """Return the side in pixels of images of ``limit`` tokens."""
    patch = patch_side(base)
    return math.isqrt(limit - special_tokens(base)) * patch

"""The section of a run's configuration about messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedveil.common.check import OneOf
from fedveil.common.config.fields import Section

WIRE_PRECISIONS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class WireConfig(Section):
    """How tensors travel."""

    prefix: ClassVar[str] = "wire."

    precision: Annotated[str, OneOf(WIRE_PRECISIONS)] = "float32"
    """Of the numbers in a message, both ways: ``float32``, ``bfloat16`` (two bytes each) or ``int8`` (65 bytes for 64).
    A site rounds its change after clip and noise, so no price changes; a new model is then the mean but for rounding.
    A secure sum is never rounded, and what goes down to its sites is."""

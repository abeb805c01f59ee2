"""Formats of a message's numbers: how each rounds what it is given, and its bytes.

A format sees the tensor that it sends and nothing else: rounding is to the nearest, without coins, and a scale follows
from the numbers themselves. What a site sends was noised before, and rounded to the noise's grid, so that a format is
post-processing: it has no access to the sum before the noise. Rounding twice is rounding once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.errors import ProtocolError
from fedveil.common.later import F, np, torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64
"""Numbers that share a scale in ``int8``."""
_LARGEST, _LEAST_EXPONENT = 127, -126


class Format(ABC):
    """One format; numbers go in and come out as float32 of one dimension."""

    stype: ClassVar[str]
    """How Flower's records name it."""
    dtype: ClassVar[str] = "uint8"
    room: ClassVar[float] = 0.0
    """How much longer, at most, a rounded vector is than it was, over its length: a bound on lengths leaves it."""

    @abstractmethod
    def size(self, count: int) -> int:
        """Return the bytes of a tensor with ``count`` numbers."""

    @abstractmethod
    def encode(self, numbers: Tensor) -> bytes:
        """Return the numbers' bytes, each number rounded to the nearest that has any."""

    @abstractmethod
    def decode(self, data: bytes) -> Tensor:
        """Return the numbers of ``size`` bytes; ProtocolError if one of them is not finite."""


class Float32(Format):
    """Little-endian float32, as tensors are held: nothing is rounded."""

    stype = "f32le"
    dtype = "float32"

    def size(self, count: int) -> int:
        """Return four bytes a number."""
        return 4 * count

    def encode(self, numbers: Tensor) -> bytes:
        """Return the numbers as they are."""
        return numbers.numpy().astype("<f4").tobytes()

    def decode(self, data: bytes) -> Tensor:
        """Return the numbers."""
        return _finite(torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32)))


class BFloat16(Format):
    """The upper half of float32: 8 bits of mantissa, ties to even."""

    stype = "bf16le"
    dtype = "uint16"
    room = 2.0**-8

    def size(self, count: int) -> int:
        """Return two bytes a number."""
        return 2 * count

    def encode(self, numbers: Tensor) -> bytes:
        """Return the upper halves."""
        return numbers.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()

    def decode(self, data: bytes) -> Tensor:
        """Return the numbers."""
        halves = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16))
        return _finite(halves.view(torch.bfloat16).float())


class Int8(Format):
    """Whole multiples, up to 127, of a power of two that 64 numbers share: the least at which the largest fits.

    The exponents (i8) follow the multiples (i8). A number below the least power of two that float32 holds in full is 0.
    """

    stype = "i8x64"
    room = math.sqrt(GROUP) / _LARGEST

    def size(self, count: int) -> int:
        """Return a byte a number, and one for each 64."""
        return count + -(-count // GROUP)

    def encode(self, numbers: Tensor) -> bytes:
        """Return multiples and exponents; ProtocolError where no power of two fits, as beside an infinite number."""
        groups = F.pad(numbers.double(), (0, -len(numbers) % GROUP)).view(-1, GROUP)
        _finite(groups)
        most = groups.abs().amax(1)
        exponents = torch.where(most > 0, (most / _LARGEST).log2().ceil(), most.new_tensor(float(_LEAST_EXPONENT)))
        exponents = exponents.clamp(min=_LEAST_EXPONENT)
        multiples = (groups / exponents.exp2()[:, None]).round().clamp(-_LARGEST, _LARGEST)
        return (
            multiples.flatten()[: len(numbers)].to(torch.int8).numpy().tobytes()
            + exponents.to(torch.int8).numpy().tobytes()
        )

    def decode(self, data: bytes) -> Tensor:
        """Return the numbers."""
        values = np.frombuffer(data, dtype=np.int8).astype(np.float64)
        count = len(values) * GROUP // (GROUP + 1)
        scales = np.repeat(np.exp2(values[count:]), GROUP)[:count]
        return _finite(torch.from_numpy((values[:count] * scales).astype(np.float32)))


FORMATS: dict[str, Format] = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8()}
"""By the value of ``wire.precision``."""
FLOAT32 = "float32"


def _finite(numbers: Tensor) -> Tensor:
    if not bool(torch.isfinite(numbers).all()):
        raise ProtocolError("the adapter payload holds a value that is not finite")
    return numbers

"""Named values as bytes, injective: what is signed, and what masks are derived from.

A text of the purpose opens them, so that bytes of one purpose are never those of another. Then come the names in order,
each with its value; whatever has a length says it first::

    text      "s", bytes of it: u32, UTF-8
    bytes     "b", how many: u32, as they are
    integer   "i", i64
    number    "f", f64; finite, and 0 without a sign
    sequence  "l", how many: u32, each of its values

Big-endian.

>>> canonical("example", {"b": 1, "a": "x"}).hex()
'73000000076578616d706c65730000000161730000000178730000000162690000000000000001'
>>> canonical("example", {"ab": "c"}) == canonical("example", {"a": "bc"})
False
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from fedveil.common.errors import ConfigError

Value = str | bytes | int | float | Sequence["Value"]


def canonical(purpose: str, values: Mapping[str, Value]) -> bytes:
    """Return the bytes of named values; equal ones have equal bytes, and no others have.

    Raises:
        ConfigError: a number is not finite, or a whole one beyond 64 bits.
    """
    return _bytes(purpose) + b"".join(_bytes(name) + _bytes(values[name]) for name in sorted(values))


def _bytes(value: Value) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        return b"s" + struct.pack(">I", len(text)) + text
    if isinstance(value, bytes):
        return b"b" + struct.pack(">I", len(value)) + value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ConfigError(f"{value} is beyond 64 bits: sites cannot agree on it")
        return b"i" + struct.pack(">q", value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{value} is not finite: sites cannot agree on it")
        return b"f" + struct.pack(">d", value + 0.0)
    return b"l" + struct.pack(">I", len(value)) + b"".join(map(_bytes, value))

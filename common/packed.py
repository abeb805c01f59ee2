"""Fields of a dataclass as packed bytes: each by its name, in the order of a table.

The table alone decides the bytes. A dataclass whose fields change places encodes as before, and one that gains or loses
a field is an error when the table is made, which is when the program starts.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from fedveil.common.errors import ProtocolError

Format = str | tuple[Any, ...]
"""Of one field: a format of ``struct``, or all its values, of which the place travels (u8)."""


class Form:
    """How the fields of one dataclass travel: little-endian, without gaps.

    Args:
        of: the dataclass.
        table: the format of each field, in the order of the bytes.
        besides: names of the fields that travel in another way.

    Raises:
        TypeError: table and ``besides`` do not hold every field once, or name one that is none.
    """

    def __init__(self, of: type, table: Mapping[str, Format], besides: Collection[str] = ()) -> None:
        wanted = sorted(field.name for field in fields(of))
        if sorted([*table, *besides]) != wanted:
            raise TypeError(f"the table of {of.__name__} must hold {', '.join(wanted)}, each once")
        self._table = dict(table)
        self._struct = struct.Struct("<" + "".join(f if isinstance(f, str) else "B" for f in table.values()))
        self.size = self._struct.size
        """Bytes."""

    def pack(self, value: Any) -> bytes:
        """Return the fields of ``value`` as ``size`` bytes; ProtocolError if one of them has no such form."""
        held = {name: getattr(value, name) for name in self._table}
        try:
            places = [f.index(held[name]) if isinstance(f, tuple) else held[name] for name, f in self._table.items()]
            return self._struct.pack(*places)
        except (ValueError, struct.error) as error:
            raise ProtocolError(f"{', '.join(held)} cannot be sent as {held}: {error}") from error

    def unpack(self, data: bytes) -> dict[str, Any]:
        """Return the fields that ``size`` bytes hold, by name; ProtocolError if one has an unknown value."""
        held = {}
        for (name, form), value in zip(self._table.items(), self._struct.unpack(data), strict=True):
            if isinstance(form, tuple) and value >= len(form):
                raise ProtocolError(f"{name} has the unknown value {value}")
            held[name] = form[value] if isinstance(form, tuple) else value
        return held

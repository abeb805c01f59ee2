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
        TypeError: table and ``besides`` do not hold every field once, or name an unknown one.
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
        values = {name: getattr(value, name) for name in self._table}
        try:
            forms = zip(self._table.values(), values.values(), strict=True)
            return self._struct.pack(*(form.index(x) if isinstance(form, tuple) else x for form, x in forms))
        except (ValueError, struct.error) as error:
            raise ProtocolError(f"{', '.join(values)} cannot be sent as {values}: {error}") from error

    def unpack(self, data: bytes) -> dict[str, Any]:
        """Return the fields that ``size`` bytes hold, by name; ProtocolError if one has an unknown value."""
        values = {}
        for (name, form), value in zip(self._table.items(), self._struct.unpack(data), strict=True):
            if isinstance(form, tuple) and value >= len(form):
                raise ProtocolError(f"{name} has the unknown value {value}")
            values[name] = form[value] if isinstance(form, tuple) else value
        return values

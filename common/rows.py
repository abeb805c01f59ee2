"""Tables of rows that a setting names: the core's, and those of ``contrib``, each loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

from common.errors import ConfigError

T = TypeVar("T")
CONTRIB = "contrib"
"""The package of rows beside the core. No file of the core imports it."""


class Table(MutableMapping[str, T]):
    """The rows of one axis by name, the core's first.

    Names are listed without loading a row of ``contrib``. Asking for a row, or for all of them, loads what is named.

    Args:
        axis: what ``contrib.ROWS`` calls the axis.
        core: the core's rows, each with a ``name``.

    Raises:
        ConfigError: two rows have one name, or a row of ``contrib`` has another name than its table says.
    """

    def __init__(self, axis: str, core: Iterable[T]) -> None:
        self._rows: dict[str, T | None] = {}  # None: not loaded yet
        for row in core:
            self[_name(row)] = row
        self._places: Mapping[str, str] = import_module(CONTRIB).ROWS.get(axis, {})
        for name in self._places:
            self._check_free(name)
            self._rows[name] = None

    def __getitem__(self, name: str) -> T:
        row = self._rows[name]
        if row is None:
            row = self._rows[name] = _load(name, self._places[name])
        return row

    def __setitem__(self, name: str, row: T) -> None:
        self._check_free(name)
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def core(self) -> dict[str, T]:
        """The rows that are none of ``contrib``."""
        return {name: self[name] for name in self if name not in self._places}

    def _check_free(self, name: str) -> None:
        if name in self:
            raise ConfigError(f"there is a row {name!r} already: give the new one another name")


def _name(row: Any) -> str:
    return str(row.name)


def _load(name: str, place: str) -> Any:
    module, _, attribute = place.partition(":")
    row = getattr(import_module(f"{CONTRIB}.{module}"), attribute)
    if _name(row) != name:
        raise ConfigError(f"{CONTRIB} has {place} as {name!r}, and its own name is {_name(row)!r}: write that in both")
    return row

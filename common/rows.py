"""Tables of rows that a setting names: the core's, and those of another package, each loaded on its first use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

from fedveil.common.errors import ConfigError

T = TypeVar("T")
CONTRIB = "fedveil.contrib"
"""The package of rows beside the core. No file of the core imports it."""


class Table(MutableMapping[str, T]):
    """The rows of one axis by name, the core's first.

    Names are listed without loading a row of the other package. Asking for a row, or for all, loads what is named.

    Args:
        axis: what ``contrib.ROWS`` calls the axis.
        core: the core's rows, each with a ``name``.
        places: module and attribute of each other row, in ``home``; None: those of ``contrib.ROWS``.
        home: the other package.

    Raises:
        ConfigError: two rows have one name, or a row of the other package has another name than its table says.
    """

    def __init__(
        self, axis: str, core: Iterable[T], places: Mapping[str, str] | None = None, home: str = CONTRIB
    ) -> None:
        self._rows: dict[str, T | None] = {}  # None: not loaded yet
        for row in core:
            self[_name(row)] = row
        self._home = home
        self._places: Mapping[str, str] = import_module(CONTRIB).ROWS.get(axis, {}) if places is None else places
        for name in self._places:
            self._check_free(name)
            self._rows[name] = None

    def __getitem__(self, name: str) -> T:
        row = self._rows[name]
        if row is None:
            row = self._rows[name] = _load(name, self._places[name], self._home)
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
        """The rows that are none of the other package."""
        return {name: self[name] for name in self if name not in self._places}

    def _check_free(self, name: str) -> None:
        if name in self:
            raise ConfigError(f"there is a row {name!r} already: give the new one another name")


def _name(row: Any) -> str:
    return str(row.name)


def commands_beside() -> Iterator[tuple[str, Any]]:
    """Yield every command of the other package, or group of commands, with its name."""
    yield from ((name, _at(place, CONTRIB)) for name, place in import_module(CONTRIB).ROWS["commands"].items())


def _at(place: str, home: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(f"{home}.{module}"), attribute)


def _load(name: str, place: str, home: str) -> Any:
    row = _at(place, home)
    if _name(row) != name:
        raise ConfigError(f"{home} has {place} as {name!r}, and its own name is {_name(row)!r}: write that in both")
    return row

"""A table whose rows stand in modules of their own: each is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Generic, TypeVar

T = TypeVar("T")


class LazyTable(MutableMapping[str, T], Generic[T]):
    """Rows by name. Whether a name is in the table, and which names are, is known without an import.

    Args:
        places: of each row ``MODULE:NAME``, as constants of the code; no setting reaches them.
        named: the name that a row gives itself, which must be that of its place.

    Raises:
        ValueError: as soon as it is asked for, a row has another name than its place.
    """

    def __init__(self, places: Mapping[str, str], named: Callable[[T], str]) -> None:
        self._places, self._named = dict(places), named
        self._rows: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._rows:
            module, _, attribute = self._places[name].partition(":")
            row: T = getattr(import_module(module), attribute)
            if self._named(row) != name:
                raise ValueError(f"{self._places[name]} is the row of {self._named(row)!r} and not of {name!r}")
            self._rows[name] = row
        return self._rows[name]

    def __setitem__(self, name: str, row: T) -> None:
        self._places[name], self._rows[name] = "", row

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._rows.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

"""Tables that a simulation of this process has in memory, under names that settings can hold.

Nothing of their records is written down. A name is a source only where records are public or divided among simulated
sites (``common.data.sources``): a site that protects records of its own reads files alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.tables import Table

MARK = "memory:"
"""What the name of a source in memory begins with."""
_TABLES: dict[str, list[Table]] = {}


@contextmanager
def in_memory(tables: Mapping[str, list[Table]]) -> Iterator[None]:
    """Let each name, which begins with ``MARK``, be a source of these tables until the block ends.

    Raises:
        ConfigError: a name is one already: a run with other records is under way in this process.
    """
    with ExitStack() as added:
        for name, rows in tables.items():
            if name in _TABLES:
                raise ConfigError(f"a run with records {name!r} is under way in this process: wait for its end")
            _TABLES[name] = rows
            added.callback(_TABLES.pop, name)
        yield


def tables_in_memory(name: str) -> list[Table]:
    """Return the tables under a name; DataError if they are no longer there."""
    if name not in _TABLES:
        raise DataError(f"the records {name!r} were in the memory of a run that has ended: give them to fedveil.run")
    return _TABLES[name]

"""The records of a run as people hand them over: names, files, pandas frames, ``datasets.Dataset`` objects.

A name or one file is the setting ``data.name``, as on the command line. Everything else is read into tables in this
process's memory, and nothing of it is written to a disk.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.data.in_memory import MARK, in_memory
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import load_dataset, tables_of
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.table_files import dataset_table
from fedveil.common.tasks.tables import Table

if TYPE_CHECKING:
    import datasets
    import pandas as pd

Source: TypeAlias = "str | Path | pd.DataFrame | datasets.Dataset"
"""A named data set, ``hub:NAME``, a file or folder, a frame or a data set."""
Data: TypeAlias = "Source | Sequence[Source] | Mapping[str, Source]"
"""One source that sites divide, or one for each site."""
Test: TypeAlias = "Source | int | float | None"
"""Records to hold out: a number, a share, or a source of their own."""
_NUMBERS = count(1)


@dataclass(frozen=True)
class Records:
    """What sites train on and what is held out, as settings and as tables in memory."""

    settings: Mapping[str, Scalar]
    tables: Mapping[str, list[Table]] = field(default_factory=dict)
    """What the settings name by ``MARK``."""
    share: float | None = None
    """The part of the records to hold out; None: none is asked for."""
    sites: int | None = None
    """One for each source; None: one source is divided."""

    def opened(self) -> AbstractContextManager[None]:
        """Return a context in which the tables can be read."""
        return in_memory(self.tables)

    def held_out(self, config: RunConfig) -> dict[str, Scalar]:
        """Return the setting of how many records are held out, where a share is asked for.

        Raises:
            ConfigError: the share leaves no record on one of the sides.
            DataError: the records cannot be read.
        """
        if self.share is None:
            return {}
        records = len(load_dataset(config.data, config.model.task).examples)
        size = round(self.share * records)
        if not 0 < size < records:
            raise ConfigError(f"test = {self.share} holds {size} of {records} records out: take another share")
        return {"data.test-size": size}


def records_of(data: Data | None, test: Test = None, site: str | None = None, task: str = "classification") -> Records:
    """Return what a run is to train on and to hold out; arguments as for ``fedveil.run``, None: as the settings say.

    Raises:
        ConfigError: ``data`` or ``test`` is of another kind, or ``site`` is given beside one source for each site.
        DataError: a table has no rows, or two columns of one name.
    """
    tables: dict[str, list[Table]] = {}
    settings: dict[str, Scalar] = {}
    sites = None
    if isinstance(data, Mapping | list | tuple) and not _is_splits(data):
        if site:
            raise ConfigError("site names a column of one table, and each site has a table of its own: leave it out")
        settings, made = _of_sites(data, task)
        tables[str(settings["data.name"])], sites = made, len(made)
    else:
        if data is not None:
            settings["data.name"] = _source(data, "data", tables)
        if site:
            settings |= {"data.partition": "natural", "data.key": site}
    share = None
    if isinstance(test, bool):
        raise ConfigError("test must be a number of records, a share, or records of their own, not a truth value")
    if isinstance(test, int):
        settings["data.test-size"] = test
    elif isinstance(test, float):
        share = test
    elif test is not None:
        settings["data.test"] = _source(test, "test", tables)
    return Records(settings, tables, share, sites)


def as_before(records: Records, began: Mapping[str, Scalar]) -> Records:
    """Return the same records, those in memory under the names that a run which goes on began with.

    Raises:
        ConfigError: the run did not begin with records in memory.
    """
    held = [key for key in ("data.name", "data.test") if records.settings.get(key) in records.tables]
    names = {key: str(began[key]) for key in held}
    if not all(name.startswith(MARK) for name in names.values()):
        raise ConfigError("resume: the run did not begin with records in memory: give the file that it began with")
    tables = {names[key]: records.tables[str(records.settings[key])] for key in held}
    return replace(records, settings={**records.settings, **names}, tables=tables)


def _of_sites(data: Mapping[str, Source] | Sequence[Source], task: str) -> tuple[dict[str, Scalar], list[Table]]:
    """Return the settings that divide one table for each site by a column that names the site, and these tables."""
    named = dict(data) if isinstance(data, Mapping) else {f"site-{i}": one for i, one in enumerate(data)}
    if not named:
        raise ConfigError("data is empty: give a table for each site")
    if wrong := next((name for name in named if not PLAIN_NAME.fullmatch(str(name))), None):
        raise ConfigError(f"{wrong!r} is no name of a site: take letters, digits, '.', '_' and '-'")
    read = {str(name): _tables(one, str(name), task) for name, one in named.items()}
    taken = {column for tables in read.values() for table in tables for column in table.columns}
    key = next(name for name in chain(["site"], map("site-{}".format, count(2))) if name not in taken)
    marked = [
        replace(table, columns={**table.columns, key: [name] * table.size})
        for name, tables in read.items()
        for table in tables
    ]
    return {"data.name": f"{MARK}{next(_NUMBERS)}", "data.partition": "natural", "data.key": key}, marked


def _source(one: Any, what: str, tables: dict[str, list[Table]]) -> str:
    """Return the setting that names a source, whose table in memory, if any, comes to ``tables``."""
    if isinstance(one, str | Path):
        return str(one)
    name = f"{MARK}{next(_NUMBERS)}"
    tables[name] = [_table(one, what)]
    return name


def _tables(one: Any, name: str, task: str) -> list[Table]:
    if not isinstance(one, str | Path):
        return [_table(one, f"the table of {name}")]
    if str(one) in DATASETS:
        raise ConfigError(f"{one!r} is a data set that sites divide: give it alone, with sites = their number")
    return tables_of(str(one), task, protected=False, line_breaks=True)[0]


def _table(one: Any, origin: str) -> Table:
    """Return a frame's or a data set's table."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # loaded by whoever made one of theirs
    if pandas and isinstance(one, pandas.DataFrame):
        return _of_frame(one, origin)
    if datasets and isinstance(one, datasets.Dataset):
        return dataset_table(one, origin)
    if _is_splits(one):
        raise ConfigError(
            f"{origin} has the splits {', '.join(one)}: give one of them, such as data[{next(iter(one))!r}]"
        )
    raise ConfigError(
        f"{origin} is a {type(one).__name__}: give a path, a named data set, a pandas.DataFrame or a datasets.Dataset, "
        "or one of these for each site in a list or dict"
    )


def _is_splits(one: object) -> bool:
    """Return whether it is a dict of ``datasets``, whose parts are splits and no sites."""
    datasets = sys.modules.get("datasets")
    return bool(datasets and isinstance(one, datasets.DatasetDict))


def _of_frame(frame: Any, origin: str) -> Table:
    names = [str(name) for name in frame.columns]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise DataError(f"{origin} has two columns {twice!r}: rename one")
    if not len(frame):
        raise DataError(f"{origin} is empty: it has no records")
    columns = {}
    for i, name in enumerate(names):
        cells = frame.iloc[:, i]
        columns[name] = [_plain(cell) for cell in cells.astype(object).where(cells.notna(), None)]
    return Table(origin, columns, unit="index", places=list(frame.index))


def _plain(cell: Any) -> object:
    """Return a cell as Python has it: a number of numpy's as its own."""
    numpy = sys.modules.get("numpy")
    return cell.item() if numpy and isinstance(cell, numpy.generic) else cell

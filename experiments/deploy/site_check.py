"""Which rows of a site's own data are no records, by number and reason, for its steward alone; none is quoted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from common.config import Scalar, defaults, from_mapping, to_mapping
from common.errors import DataError, UnreadableFile
from common.tables import Unfit
from experiments.deploy.site_folder import SiteFolder, node_settings, policy_of_node
from experiments.people import counted

if TYPE_CHECKING:
    from client.policy import Policy

ROWS_SHOWN = 20
"""Numbers of rows that a line names."""


def check_site(
    folder: SiteFolder,
    say: Callable[[str], None],
    more: str = "",
    job: Mapping[str, Scalar] | None = None,
    *,
    rows: bool = True,
) -> None:
    """Read the records as every round will, and say how many rows are records and which are none.

    Args:
        folder: the site's folder.
        say: prints one line.
        more: node settings that win over the folder's.
        job: settings of a run, which say what the policy does not: task, columns, labels.
        rows: whether to list the rows that are none.

    Raises:
        ConfigError: a setting is wrong, or with this policy every round would be refused.
        DataError: the records are not there, or lack a column; the rows of a file cannot be told apart; or no row
            is a record. Every round would then send noise alone, and pay for it.
    """
    from common.data import load_protected, tables_of

    settings = node_settings(folder, more)
    policy = policy_of_node(settings)
    if "data" not in settings:
        say("records: a part of a job's data, which this site does not choose")
        return
    source, known = str(settings["data"]), {**_pinned(policy), **(job or {})}
    if not known:
        total = sum(table.size for table in tables_of(source))
        say(f"records: {counted(total, 'row')} can be told apart; what a job reads of them is checked with -c SETTINGS")
        return
    config = from_mapping(known)
    reading = load_protected(config.data, config.model.task, source)
    if reading.unreadable:
        raise UnreadableFile(reading.unreadable[0])
    if not reading.dataset.examples:
        why = f"row {reading.unfit[0].row} {reading.unfit[0].reason}" if reading.unfit else "there is none"
        raise DataError(f"{source}: no row is a record ({why}): mend the rows, or name other columns or labels")
    fit, others = len(reading.dataset.examples), len(reading.unfit)
    say(f"records: {fit} of {fit + others} rows fit" + ("; the others count as none" if others else ""))
    for line in _by_reason(reading.unfit) if rows else ():
        say(line)


def _pinned(policy: Policy) -> dict[str, Scalar]:
    """Return what the policy says that every job must have for ``data.*`` and the task; empty if it says nothing."""
    keys = defaults()
    rules = {key: value for key, value in to_mapping(policy).items() if value != ""}
    pinned = {f"data.{key}": value for key, value in rules.items() if f"data.{key}" in keys}
    return pinned | ({"model.task": rules["task"]} if "task" in rules else {})


def _by_reason(unfit: Sequence[Unfit]) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for row in unfit:
        groups.setdefault((row.origin, row.reason), []).append(row.row)
    return [f"  {origin}: {_numbers(numbers)} {reason}" for (origin, reason), numbers in groups.items()]


def _numbers(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"row {shown}{more}"

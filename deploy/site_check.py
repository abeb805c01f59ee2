"""The list of invalid rows for a site's steward, by number and reason; no row is quoted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedveil.common.config.flat import Scalar
from fedveil.common.data.notes import notes_on_texts
from fedveil.common.errors import ConfigError, DataError, UnreadableFile
from fedveil.common.labels import labels_text
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.tables import Unfit
from fedveil.common.words import counted
from fedveil.deploy.check_results import in_silence
from fedveil.deploy.own_rows import OwnRows, read_own_rows
from fedveil.deploy.site_folder import SiteFolder, check_pinned, node_settings
from fedveil.privacy import UNITS

if TYPE_CHECKING:
    from fedveil.client.policy import Policy
    from fedveil.common.data.sources import Reading

ROWS_SHOWN = 20
"""Numbers of rows that a line names."""
MUCH = 2
"""How many times more may be declared than are there, before a word is said."""


def check_site(
    folder: SiteFolder,
    say: Callable[[str], None],
    more: str = "",
    *,
    rows: bool = True,
    step: Callable[[str], None] = in_silence,
) -> None:
    """Read the records as every round will, and say how many rows are records and which are invalid.

    Args:
        folder, say: the site's folder, and what prints one line.
        more: node settings that win over the folder's.
        rows, step: whether to list the invalid rows, and what hears of what is done next.

    Raises:
        ConfigError: every round would be refused with this policy and these settings, or ``reply-after`` is too short
            for the declared number of records or for reading them.
        DataError: the records are missing, cannot be read, or none is valid: a round would pay for noise alone.
        LedgerError: the ledger cannot be read.
    """
    settings = node_settings(folder, more)
    policy = check_pinned(folder, settings)
    if "data" not in settings:
        say("records: a part of a job's data, which this site does not choose")
        return
    step("reading the records as a round does")
    own, reading, seconds = _read(settings, policy)
    fit, others, unit = len(reading.dataset.examples), len(reading.unfit), UNITS[policy.unit]
    declared, there = int(settings.get("public-size", policy.public_size)), unit.count(reading.dataset)
    if policy.reply_after:
        _check_time(policy.reply_after, declared, there, seconds, unit.name)
    say(f"records: {fit} of {fit + others} rows fit" + ("; the others count as none" if others else ""))
    for line in (*_held_out(own), *_withdrawn(settings, policy)):
        say(line)
    if unit.grouped:
        say(_persons(reading.dataset))
    listed = (*_texts(reading.dataset), *_size(declared, there, unit.name), *_by_reason(reading.unfit))
    for line in listed if rows else ():
        say(line)


def _read(settings: Mapping[str, Scalar], policy: Policy) -> tuple[OwnRows, Reading, float]:
    """Return the site's rows, those of training, and the seconds that it took; DataError if none can be used."""
    began = time.monotonic()
    own = read_own_rows(settings, policy)
    seconds = time.monotonic() - began
    check_readable(own.training, str(settings["data"]))
    return own, own.training, seconds


def _withdrawn(settings: Mapping[str, Scalar], policy: Policy) -> Iterator[str]:
    """Say that the records were withdrawn, if they were."""
    from fedveil.client.ledger.file import withdrawn_in
    from fedveil.client.node import ledger_of

    if (dataset := policy.dataset_of(settings, str(settings["site"]))) in withdrawn_in(ledger_of(settings)):
        yield f"withdrawn: {dataset} is, so every round is refused but one that was charged before"


def _held_out(rows: OwnRows) -> Iterator[str]:
    """Say how many rows are held out if any is to be; DataError if none is, or they cannot be read."""
    if not str(rows.rule):
        return
    if rows.rule.file:
        check_readable(rows.held_out, str(rows.rule.file))
    number = len(rows.held_out.dataset.examples)
    if not number:
        raise DataError(f"no row is held out by the rule of this site ({rows.rule}): compare it with the rows")
    yield f"held out: {counted(number, 'record')} ({rows.rule}), never drawn and never charged"


def check_readable(reading: Reading, source: str) -> None:
    """Raise DataError if a file cannot be read, or no row of it is a record."""
    if reading.unreadable:
        raise UnreadableFile(reading.unreadable[0])
    if odd := next((row for row in reading.unfit if row.of_file), None):
        raise UnreadableFile(odd.words)
    if not reading.dataset.examples:
        why = next((f"{row.unit} {row.row} {row.reason}" for row in reading.unfit), "there is none")
        raise DataError(f"{source}: no row is a record ({why}): mend the rows, or pin what they are")


def _texts(data: Dataset) -> Iterator[str]:
    """Say what labels and texts there are."""
    yield from _labels(data)
    yield from notes_on_texts(data)


def _labels(data: Dataset) -> Iterator[str]:
    """Say how many records each label has, and which has none, as a slip of the pen would leave it."""
    counts = Counter(label for example in data.examples for label in example.all_labels)
    if data.label_names:
        named = (
            f"{labels_text([name])} {counts[index]}" for index, name in enumerate(data.label_names) if counts[index]
        )
        yield f"labels: {', '.join(named)}"
        for index, name in enumerate(data.label_names):
            if not counts[index]:
                yield f"  no row has the label {name!r}: compare how it is written in the rows and in the policy"


def _size(declared: int, there: int, what: str) -> Iterator[str]:
    """Say where far more are declared than are there."""
    if declared > MUCH * there:
        yield (
            f"public-size: {declared:,} declared, {counted(there, what)} found: a step is divided by what is declared, "
            "so that these weigh less than they could"
        )


def _persons(data: Dataset) -> str:
    """Return how many persons there are and how many records they have, for the steward alone."""
    counts = sorted(Counter(example.person for example in data.examples).values())
    return f"persons: {len(counts)}, with {counts[len(counts) // 2]} records in the middle and {counts[-1]} at most"


def _check_time(reply_after: float, declared: int, units: int, seconds: float, unit: str) -> None:
    """Raise ConfigError if ``reply-after`` is too short for the declared or the actual number of units.

    Only here does the actual number count: a round that depended on it would reveal it.
    """
    from fedveil.client.deadline import PREPARED

    if units > declared:
        raise ConfigError(
            f"there are {units} {unit}s and public-size is {declared}, for which alone reply-after = {reply_after:g} "
            "leaves time: declare at least as many as there are, or leave reply-after out"
        )
    if seconds > PREPARED * reply_after:
        raise ConfigError(
            f"the records took {seconds:.1f} seconds to read, and reply-after = {reply_after:g} leaves "
            f"{PREPARED * reply_after:.1f}, preparing them included: set it to {2 * seconds / PREPARED:.0f} or more"
        )


def _by_reason(unfit: Sequence[Unfit]) -> list[str]:
    groups: dict[tuple[str, str, str], list[object]] = {}
    for row in unfit:
        groups.setdefault((row.origin, row.unit, row.reason), []).append(row.row)
    return [f"  {origin}: {unit} {_numbers(places)} {reason}" for (origin, unit, reason), places in groups.items()]


def _numbers(rows: Sequence[object]) -> str:
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return shown + more

"""Figures in the prose of the documents: ``docs/figures.toml`` says where each of them comes from.

::

    [[figures]]
    page = "README.md"
    says = "over three divisions it is {}, {} and {} points above the head alone"
    rows = "rotten-tomatoes"
    are = ["metric 8 - head-only 8", "metric 3 - head-only 3", "metric 1 - head-only 1"]

Each ``{}`` stands for a figure of the committed rows, which ``make docs`` writes and a test compares. A figure that is
typed stands in ``says`` itself. Then ``log`` is the heading of the log's entry that has it, or ``other`` says what it
is, if it is no result. A test looks it up there, and finds figures that the table lacks.

A figure is of a variant at an ε, over seeds: ``metric 8``; of another arm: ``head-only none fitted-head``; of another
sweep: ``sst2/metric 3``. ``metric 8 - head-only 8`` is a difference, seed by seed where both have the same ones. After
a colon stands what of it: ``loss`` or ``before`` in place of the accuracy at the end; in place of the mean ``each``, a
figure for each seed, ``seed 1``, ``low`` and ``high``, the ends of the 95 % interval, ``sites``, a figure for each
site, or ``least`` and ``most``, of single runs.
"""

from __future__ import annotations

import re
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from common.errors import ConfigError, DataError
from common.strict_json import from_json
from experiments.sweep.arms import ARMS
from experiments.sweep.file import epsilon_name
from experiments.sweep.rows import Row, read_rows, results_file
from experiments.sweep.summary import interval
from reports.picture import read_picture

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
TABLE = ROOT / "docs" / "figures.toml"
DEMO = "demo"
"""In place of a sweep: the run of docs/demo.json, which has ``before`` and ``after``."""
FIGURE = re.compile(r"(?<![\d.,])−?\d{1,3}\.\d{1,3}(?!\d|\.\d)")
"""A number as documents write figures; its sign is a minus and no hyphen."""
TABLES = re.compile(r"<!-- (?:results|compute)\b.*?<!-- end of \w+ -->", flags=re.DOTALL)
"""What ``cli.cited`` writes, which is no prose."""
GAP = "{}"
RowsOf = Callable[[str], list[Row]]
"""Gives the rows of a sweep."""


@dataclass(frozen=True)
class Saying:
    """A few words of a page with the figures in them."""

    page: str
    """Path from the project's root."""
    says: str
    """The words as they stand once on the page, whatever lines they are broken into."""
    rows: str = ""
    """Sweep that the gaps are of, or ``demo``."""
    are: list[str] = field(default_factory=list)
    """What stands in the gaps, in their order."""
    log: str = ""
    """Heading of the entry of the log that has the typed figures."""
    other: str = ""
    """What the typed figures are, if they are no results."""

    @property
    def typed(self) -> list[str]:
        """Return the figures that are not of rows."""
        return FIGURE.findall(self.says)

    def found(self, text: str) -> re.Match[str]:
        """Return where a page says it; each group is a gap.

        Raises:
            ConfigError: it says it nowhere, or more than once.
        """
        words = re.sub(r"(?:\\ )+", r"\\s+", re.escape(self.says))
        prose = TABLES.sub(lambda match: " " * len(match[0]), text)
        places = list(re.finditer(words.replace(re.escape(GAP), f"({FIGURE.pattern})"), prose))
        if len(places) != 1:
            raise ConfigError(
                f"docs/figures.toml: {self.page} says {len(places)} times, not once, {self.says!r}: mend one of them"
            )
        return places[0]


def read_sayings(path: Path = TABLE) -> list[Saying]:
    """Return the table of figures.

    Raises:
        DataError: an entry lacks a field, has an unknown one, or does not say where its figures come from.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["figures"]
    sayings = [from_json(Saying, table, f"entry {number} of {path.name}") for number, table in enumerate(tables, 1)]
    for said in sayings:
        if bool(said.rows) != (GAP in said.says) or bool(said.log or said.other) != bool(said.typed):
            raise DataError(f"{path.name}: a gap needs rows, and a typed figure log or other: {said.says!r}")
    return sayings


def rows_in(folder: Path = RESULTS) -> RowsOf:
    """Return what reads the rows of a sweep from a folder, once."""
    return cache(lambda sweep: read_rows(results_file(folder, sweep)))


def with_figures(text: str, sayings: Sequence[Saying], rows_of: RowsOf) -> str:
    """Return a page with the figures in its gaps as the rows have them.

    Raises:
        ConfigError: the page does not say what an entry has, or an entry names what no row is of.
        DataError: rows cannot be read.
    """
    for said in sayings:
        place = said.found(text)
        figures = [figure for name in said.are for figure in figures_of(name, said.rows, rows_of)]
        if len(figures) != place.re.groups:
            raise ConfigError(f"docs/figures.toml: {len(figures)} figures for {place.re.groups} gaps in {said.says!r}")
        for number, figure in reversed(list(enumerate(figures, 1))):
            text = text[: place.start(number)] + figure + text[place.end(number) :]
    return text


def figures_of(name: str, sweep: str, rows_of: RowsOf) -> list[str]:
    """Return what an entry calls ``name``, written as prose has it: per cent and points to one decimal, losses to two.

    Raises:
        ConfigError: it is not written as above, or no row is of it.
        DataError: rows cannot be read.
    """
    if sweep == DEMO:
        picture = read_picture(ROOT / "docs" / "demo.json")
        shares = {"before": picture.before, "after": picture.rounds[-1].accuracy}
        return [_written(shares[name] or 0.0, loss=False)]
    terms, _, what = name.partition(":")
    words = what.split()
    of = [word for word in ("loss", "before") if word in words]
    pick, *rest = [word for word in words if word not in of] or ["mean"]
    column = f"{'loss' if 'loss' in of else 'accuracy'}{'_before' if 'before' in of else ''}"
    members = [_members(term.strip(), sweep, rows_of) for term in terms.split(" - ")]
    values = [_by(column, own, "site" if pick == "sites" else "seed") for own in members]
    first, second = values[0], values[-1] if len(values) == 2 else None
    if second is not None and first.keys() == second.keys():
        first, second = {key: value - second[key] for key, value in first.items()}, None
    mean = interval(list(first.values()))
    picks: Mapping[str, list[float]] = {
        "mean": [mean.mean - (0.0 if second is None else statistics.mean(second.values()))],
        "each": list(first.values()),
        "sites": list(first.values()),
        "low": [mean.low],
        "high": [mean.high],
        "least": [min(getattr(row, column) for row in members[0])],
        "most": [max(getattr(row, column) for row in members[0])],
        "seed": [value for seed, value in first.items() if [str(seed)] == rest],
    }
    if not picks.get(pick) or (second is not None and pick != "mean"):
        raise ConfigError(f"docs/figures.toml: {name!r} is no figure of {sweep}: see cli/prose.py")
    return [_written(value, loss="loss" in of) for value in picks[pick]]


def _members(term: str, sweep: str, rows_of: RowsOf) -> list[Row]:
    named, epsilon, *arm = term.split()
    *other, variant = named.split("/")
    rows = rows_of(*(other or [sweep]))
    wanted = (variant, epsilon, arm or ["federated"])
    held = [row for row in rows if (row.variant, epsilon_name(row.epsilon_asked), [row.arm]) == wanted]
    if not held:
        raise ConfigError(f"docs/figures.toml: no row is of {term!r}; an arm is one of {', '.join(ARMS)}")
    return held


def _by(column: str, rows: Sequence[Row], key: str) -> dict[int, float]:
    """Return the mean of each seed, or of each site."""
    keys = sorted({getattr(row, key) for row in rows})
    return {own: statistics.mean(getattr(row, column) for row in rows if getattr(row, key) == own) for own in keys}


def _written(value: float, *, loss: bool) -> str:
    return (f"{value:z.2f}" if loss else f"{100 * value:z.1f}").replace("-", "−")

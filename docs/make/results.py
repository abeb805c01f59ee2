"""Results that a document cites: between two comments of its Markdown stands the table of a sweep's committed rows.

::

    <!-- results: rotten-tomatoes; variants: head-only, metric; arms: federated; epsilons: 8; columns: variant | ε -->
    ...
    <!-- end of results -->

All but the sweep's name may be left out. Between ``<!-- compute -->`` and ``<!-- end of compute -->`` stands what all
rows together took. ``make docs`` writes what stands between; a test compares the two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.check import nearest
from common.errors import ConfigError, DataError
from common.words import counted
from experiments.sweep.file import epsilon_name
from experiments.sweep.rows import Row, line_of, read_rows, results_file
from experiments.sweep.summary import COLUMNS, markdown_of

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", ROOT / "experiments" / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Documents that may cite."""
CITED = re.compile(r"<!-- results:([^>]*?)-->\n(.*?)<!-- end of results -->", flags=re.DOTALL)
COMPUTE = re.compile(r"(<!-- compute -->\n).*?(<!-- end of compute -->)", flags=re.DOTALL)
CHOICES: Mapping[str, Callable[[Row], str]] = {
    "variants": lambda row: row.variant,
    "arms": lambda row: row.arm,
    "epsilons": lambda row: epsilon_name(row.epsilon_asked),
}
"""What a citation may choose rows by."""
SHOWN = "columns"


def with_results(text: str, folder: Path = RESULTS) -> str:
    """Return a document with every table that it cites, and what all rows took, as the rows in ``folder`` have it.

    Raises:
        ConfigError: a citation is not written as above, or chooses what no row has.
        DataError: the sweep has no rows there, or they cannot be read.
    """
    if text.count("<!-- results:") != len(CITED.findall(text)):
        raise ConfigError("a citation of results has no '<!-- end of results -->' after it")
    text = CITED.sub(
        lambda match: f"<!-- results:{match[1]}-->\n{_table(match[1], folder)}<!-- end of results -->", text
    )
    return COMPUTE.sub(lambda match: f"{match[1]}{compute(folder)}\n{match[2]}", text)


def compute(folder: Path = RESULTS) -> str:
    """Return in a sentence or two what the runs of all rows in ``folder`` took, and on which machines.

    A run whose row stands in the tables of two sweeps, by whatever name of the variant, counts once.

    Raises:
        DataError: rows cannot be read.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    runs = list({line_of(replace(row, sweep="", variant="")): row for row in rows}.values())
    took = sum(row.seconds_in_all or 0.0 for row in runs) / 3600
    worked = [row.processor_seconds for row in runs if row.processor_seconds is not None]
    machines = Counter(row.machine for row in runs)
    return (
        f"The rows in `experiments/results` are of {counted(len(runs), 'run')}, one in two tables counted once. "
        f"They took {took:.1f} hours by the wall clock. {len(worked)} of them tell their processor's time, "
        f"{sum(worked) / 3600:.1f} hours. They ran on "
        + "; ".join(f"{machine} ({counted(count, 'run')})" for machine, count in machines.most_common())
        + "."
    )


def _table(said: str, folder: Path) -> str:
    sweep, *parts = (part.strip() for part in said.split(";"))
    rows = read_rows(results_file(folder, sweep))
    if not rows:
        raise DataError(
            f"{results_file(folder, sweep)} holds no rows: run the sweep with --results experiments/results"
        )
    columns: list[str] = []
    for part in parts:
        name, _, words = part.partition(":")
        if name.strip() == SHOWN:
            columns = [word.strip() for word in words.split("|")]  # one of the names has a comma
        else:
            rows = _chosen(rows, name.strip(), [word.strip() for word in words.split(",")])
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise ConfigError(
            f"a citation of results shows {unknown[0]!r}{nearest(unknown[0], COLUMNS)}: {' | '.join(COLUMNS)}"
        )
    return f"\n{markdown_of(rows, columns)}\n"


def _chosen(rows: Sequence[Row], name: str, wanted: Sequence[str]) -> list[Row]:
    told = [*CHOICES, SHOWN]
    if name not in CHOICES:
        raise ConfigError(f"a citation of results chooses by {name!r}{nearest(name, told)}: {', '.join(told)}")
    of = CHOICES[name]
    if absent := [word for word in wanted if word not in map(of, rows)]:
        raise ConfigError(f"a citation of results chooses {name} {absent[0]!r}, which no row has")
    return [row for row in rows if of(row) in wanted]


def up_to_date(page: Path) -> str:
    """Return a document with its tables as the committed rows have them.

    Raises:
        ConfigError: a citation is not as it must be.
        DataError: rows cannot be read.
    """
    return with_results(page.read_text(encoding="utf-8"))

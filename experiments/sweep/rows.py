"""The table of a sweep's results: a row a run, as JSON lines and as CSV.

A row has everything that its figures depend on: the configuration, versions of packages, the version of the code. Only
a row in which all of that is what a run would have now is taken for the run's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import DataError
from fedveil.common.files import finite, replace_file
from fedveil.common.strict_json import SPARSE, Delta, Epsilon, Measured, from_json, json_of, to_json

Key = tuple[str, str, int | None, float | None, int]


@dataclass(frozen=True)
class Costs:
    """What a run took to learn, and what it needed meanwhile."""

    rounds_to_gain: float | None
    """Rounds until the score on public data first had 95 % of its gain: that of the last scored round over the one
    before any record was used, of accuracy, or of the loss where records have no labels. Between two scored rounds the
    score is taken to change evenly, as bytes do. None: there was no gain."""
    bytes_to_gain: float | None
    """Adapter payload of all sites until then, with rounds that did not count. None of a baseline as well."""
    round_seconds: float | None
    """The median of the rounds; None as ``seconds``."""
    memory: int | None
    """The most bytes that the run's process had resident; None through Flower, with a trusted server, and where the
    system does not say."""
    gpu_memory: int | None
    """The most bytes that torch had on the GPU; None as ``memory``, and without a GPU."""
    ranks: dict[str, int] | None
    """The rank of each layer of the final adapter, where they differ from ``adapter.rank``; one that is missing has no
    adapter. None: all have that rank."""


@dataclass(frozen=True)
class Row:
    """One finished run of a sweep."""

    sweep: str
    """Name of the sweep's file."""
    variant: str
    arm: str
    """``federated``, or a baseline: ``local-only``, ``pooled``, ``fitted-head``."""
    site: int | None
    """The one site of a run of ``local-only``, from 0."""
    epsilon_asked: float | None
    """The budget; None: no privacy."""
    seed: int
    status: Literal["completed", "stopped"]
    """``stopped``: before its last round, and well."""
    accuracy_before: float
    """On the public test part, before round 1."""
    accuracy: float
    loss_before: Measured
    """Mean cross-entropy on the public test part, in nats."""
    loss: Measured
    test_records: int
    epsilon: Epsilon | None
    """Spent by the site that has spent most; None without a claim."""
    delta: Delta | None
    rounds: int
    """Complete ones."""
    sites: int
    """That the records are divided among."""
    bytes_down: int | None
    """Adapter payload of all rounds and sites; None of a baseline, of which nothing needs to travel."""
    bytes_up: int | None
    seconds: float | None
    """Of all rounds; None where a round has none, as with a trusted server."""
    seconds_in_all: float | None
    """Of the run's process, with loading and reports; None with ``seconds``, which it would tell."""
    through: Literal["one process", "flower"]
    """How server and sites met."""
    device: str
    precision: str
    """Of the forward pass."""
    threads: int
    machine: str
    """Model of the processor, or its kind where no model is named, as in rows of older code, and number of cores."""
    started: str
    """UTC, ISO 8601."""
    code: str
    """SHA-256 of the code that servers and sites run, as ``fedveil bundle`` prints it."""
    commit: str
    """Of a work tree under git, with ``+`` if it had changes; empty elsewhere."""
    versions: dict[str, str]
    settings: dict[str, Scalar]
    """Every setting with the value that the run had, without ``output``."""
    intruders: int | None = None
    """Intruder dimensions of all adapted layers (``contrib.experiments``); None where they were not counted."""
    intruders_of_noise: int | None = None
    """The same of the run's noise alone; None where that noise is not known."""
    sent: int | None = None
    """The most numbers that one site sends in a round after round 0: what it trains in that round. None with a trusted
    server, and in rows of older code."""
    processor_seconds: float | None = None
    """Of all cores, in the run's process, with loading and reports; None where ``seconds`` is, through Flower, whose
    sites are other processes, and in rows of older code."""
    penalty: float | None = None
    """λ of a fitted head, by cross-validation on the training records; None of a run."""
    costs: Costs | None = field(default=None, metadata=SPARSE)
    """None of a fitted head, and in rows of older code."""

    @property
    def honest(self) -> int:
        """How many honest sites of each sum its ε counts on; 0: on none."""
        return int(self.settings.get("privacy.honest-sites", 0)) if self.epsilon is not None else 0

    @property
    def key(self) -> Key:
        """Return its place in the sweep."""
        return self.variant, self.arm, self.site, self.epsilon_asked, self.seed


@dataclass(frozen=True)
class Basis:
    """Everything that a row's figures depend on."""

    settings: dict[str, Scalar]
    sites: int
    through: str
    versions: dict[str, str]
    code: str

    def differs(self, row: Row, *, code_too: bool = True) -> str:
        """Return in words how the basis of a row differs; empty if it does not.

        Args:
            row: the row.
            code_too: whether another version of the code counts.
        """
        # What a recipe has filled in is compared itself.
        keys = sorted({*self.settings, *row.settings} - {"recipe", "data.records"})
        pairs = [(key, row.settings.get(key), self.settings.get(key)) for key in keys]
        pairs += [("sites", row.sites, self.sites), ("through", row.through, self.through)]
        pairs += [
            (f"version of {name}", row.versions.get(name), self.versions.get(name))
            for name in sorted({*self.versions, *row.versions})
        ]
        pairs += [("code version", row.code[:12], self.code[:12])] if code_too and row.code != self.code else []
        return "; ".join(f"{what} {had!r}, not {now!r}" for what, had, now in pairs if had != now)


def results_file(folder: Path, sweep: str) -> Path:
    """Return the file of a sweep's rows; the CSV lies beside it."""
    return folder / f"{sweep}.jsonl"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, none of an absent one.

    Raises:
        DataError: a line is not as it is written.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        rows.append(row_of(line, f"line {number} of {path}"))
    return rows


def row_of(text: str, what: str) -> Row:
    """Return a row from its JSON; DataError, which names ``what``, if it is invalid."""
    try:
        value = json_of(text)
    except ValueError as error:
        raise DataError(f"{what} is not JSON: {error}") from error
    return from_json(Row, value, what)


def line_of(row: Row) -> str:
    """Return a row as one line of JSON; one of older code as that wrote it."""
    return json.dumps(finite(to_json(row)), ensure_ascii=False, allow_nan=False) + "\n"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines and, beside them, as CSV, each file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(map(line_of, rows)).encode())
    replace_file(path.with_suffix(".csv"), to_csv(rows).encode())


def columns(rows: Iterable[Row]) -> list[str]:
    """Return the columns of the CSV: the fields, then ``costs.``, ``versions.`` and ``settings.NAME`` of all rows."""
    rows = list(rows)
    plain = [item.name for item in fields(Row) if item.name not in ("versions", "settings", "costs")]
    return [
        *plain,
        *(f"costs.{item.name}" for item in fields(Costs) if any(row.costs for row in rows)),
        *(f"versions.{name}" for name in sorted({name for row in rows for name in row.versions})),
        *(f"settings.{key}" for key in sorted({key for row in rows for key in row.settings})),
    ]


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV with one header; what a row does not have is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {
            **{name: value for name, value in to_json(row).items() if name not in ("versions", "settings", "costs")},
            **{f"costs.{name}": value for name, value in (to_json(row.costs) if row.costs else {}).items()},
            **{f"versions.{name}": value for name, value in row.versions.items()},
            **{f"settings.{key}": value for key, value in row.settings.items()},
        }
        writer.writerow({name: _cell(value) for name, value in flat.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | dict) else value

"""Questions of a hostile server by records: rows that are none, other names, other columns and other divisions.

Everything goes through the real client, with a policy that lets the server ask.
"""

from __future__ import annotations

import csv
import math
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_site import OneSite, tiny_site
from fedveil.client import site as client_site
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.data.partition import division_of
from fedveil.common.data.sources import Reading, load_dataset
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.privacy.accounting import Release
from fedveil.privacy.privacy_filter import promised
from fedveil.strategies.job import configure

ODD = (
    '" ",good,a1',
    "the film,,a1",
    "the film,fair,a1",
    "the film,good",
    "the film,good,a1,more",
    f"{'film ' * 30_000},good,a1",
    '"the film,good,a1',
    "the film\rthe scene,good,a1",
)
"""Each makes one row of a CSV file with the columns text, label and author none, or more than one."""


def heard(site: OneSite, task: TrainTask, ledger: str) -> tuple[object, ...]:
    """Return what a server hears beside the noised contribution, and what was charged, of a site asked for once."""
    site.node["ledger"] = str(site.ledger.with_name(f"{ledger}.sqlite"))
    site.memory.clear()
    client_site._own_data.cache_clear()
    reply = site.ask(task)
    said = (reply.public_size, reply.spending) if isinstance(reply, TrainResult) else (reply.kind, reply.reason)
    return (*said, *site.charges())


def rows_that_show(site: OneSite, task: TrainTask) -> list[str]:
    """Return the rows of ``ODD`` whose presence a server hears of."""
    data = Path(str(site.node["data"]))
    text = data.read_text(encoding="utf-8")
    without = heard(site, task, "without")
    shown = []
    for i, row in enumerate(ODD):
        data.write_text(f"{text}{row}\n", encoding="utf-8")
        shown += [row[:20]] if heard(site, task, f"row-{i}") != without else []
    data.write_text(text, encoding="utf-8")
    return shown


def spent_too_little(site: OneSite) -> float:
    """Return by how much ε falls short when one file is used again under another name, through other columns."""
    data = Path(str(site.node["data"]))
    with data.open(newline="", encoding="utf-8") as file:
        rows = [{**row, "note": f"a {row['text']}"} for row in csv.DictReader(file)]
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    client_site._own_data.cache_clear()
    steps, short = 0, 0.0
    for i, column in enumerate(("text", "note", "author")):
        site.node["dataset-id"], site.settings["data.text"] = f"name-{i}", column
        site.rule()
        spending = site.train(run=str(i)).spending
        if spending is None:
            return math.inf
        steps += spending.steps_round
        whole = promised([Release(spending.event, steps)], spending.delta)[0]
        short = max(short, whole - spending.epsilon_total)
    return short


def divided_anew(site: OneSite) -> list[str]:
    """Return the settings by which a server gets a part of a file of a site, which no part of a file may be."""
    task = site.task()
    del site.node["data"]
    site.rule(public_size=50)
    del site.node["public-size"]
    config = configure(site.settings).config
    site.node |= {"partition-id": 0, "num-partitions": 2, "division": division_of(config)}
    same = site.settings["data.partition"]
    others: dict[str, Any] = {"data.partition": same, "data.seed": 46, "data.test-size": 50}
    got, honest = [], dict(site.settings)
    for key, value in others.items():
        site.settings = {**honest, key: value}
        reply = site.ask(replace(task, run=key))
        got += [key] if not (isinstance(reply, Refusal) and reply.kind == "policy") else []
    site.settings = honest
    return got


def rows_refused() -> AbstractContextManager[Any]:
    """A row that is no record is an error, as in public data."""
    return patch.object(client_site, "load_protected", lambda *place, **_: Reading(load_dataset(*place)))


def rows_forgotten() -> AbstractContextManager[Any]:
    """A record is known by what the run's columns make of it alone."""
    return patch("fedveil.common.data.rows._row_digest", lambda *_: b"")


def names_apart() -> AbstractContextManager[Any]:
    """Every name has a budget of its own, whoever holds the records."""
    return patch.object(Ledger, "_recognise", lambda *_: [])


def divisions_open() -> AbstractContextManager[Any]:
    """Files are divided among sites, and the run says how."""
    return patch.multiple(client_site, check_division=lambda *_: None, _check_source=lambda *_, **__: None)


ROWS = Fault("rows that are no records refuse the round", rows_refused)
COLUMNS = Fault("records known by the read columns alone", rows_forgotten)
APART = Fault("names that share records have budgets of their own", names_apart)
DIVISIONS = Fault("a file is divided among sites, as the run says", divisions_open)


def audit_records(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return what a hostile server learns or gets twice by a site's records.

    Args:
        folder: empty; models and records go there.
        fault: SOUND, ROWS, COLUMNS, APART or DIVISIONS.
    """
    parts = [folder / name for name in ("rows", "names", "parts")]
    for part in parts:
        part.mkdir()
    rows, names, divided = (tiny_site(part) for part in parts)
    task = rows.task()
    with fault.plant():
        shown, short, got = rows_that_show(rows, task), spent_too_little(names), divided_anew(divided)
    client_site._own_data.cache_clear()
    figures: dict[str, int | float | str] = {
        "rows that are no records": len(ODD),
        "of them heard of": len(shown),
        "epsilon short under other names and columns": short,
        "parts of a file got by": ", ".join(got) or "nothing",
    }
    return judged("records by name and row", fault.name, bool(shown or short > 1e-9 or got), figures)

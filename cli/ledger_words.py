"""A ledger and its receipts as lines for people, and as JSON or CSV for other programs."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedveil.common.tasks.cells import shown_as_text
from fedveil.common.words import counted
from fedveil.privacy.figures import epsilon_text, honest_text

if TYPE_CHECKING:
    from fedveil.client.ledger.ledger import Ledger
    from fedveil.client.ledger.receipts import RunReceipt
    from fedveil.client.ledger.rows import Entry, Exposure
    from fedveil.privacy.events import Event

EXPOSED = (
    "Records of it were released without privacy: no ε holds for them, and private rounds are refused unless the "
    "policy has after-no-privacy = true."
)
ASKED = (
    "  It shows in which rounds this site took part. If a trusted server drew sites for them, the price counts on that "
    "being secret: give it to that server's people alone."
)
KINDS = ("plans", "charges", "exposures", "failures", "budgets", "reservations", "withdrawals", "held_out")


def _listed(ledger: Ledger) -> dict[str, Sequence[Any]]:
    holds = ledger.holds
    lists = ledger.plans.all(), ledger.entries(), ledger.exposures(), ledger.failures(), ledger.budgets()
    return dict(zip(KINDS, (*lists, holds.reservations(), holds.withdrawals(), ledger.rules.all()), strict=True))


def rows_of(ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of a ledger by their kind, as JSON has them."""
    return {kind: [dataclasses.asdict(row) for row in rows] for kind, rows in _listed(ledger).items()}


def history_of(ledger: Ledger, dataset: str) -> list[str]:
    """Return a line for each row of a data set, in order of time."""
    listed = _listed(ledger)
    rows = [row for kind in sorted(KINDS, key=lambda kind: kind not in {"budgets", "held_out"}) for row in listed[kind]]
    lines = [_timed(row) for row in rows if row.dataset == dataset]
    return [f"{when}  {what}" for when, what in sorted(lines, key=lambda line: line[0])]


def _timed(row: Any) -> tuple[str, str]:
    """Return a row's time and what happened then."""
    from fedveil.client.ledger.rows import Budget, Entry, Exposure, Failure, FirstPlan, HeldOutRule, Reservation

    match row:
        case HeldOutRule():
            return row.set_at, f"held out from here on: {row.rule or 'no row'}"
        case Budget():
            was = "" if row.replaced is None else f", was {row.replaced:g}"
            return row.set_at, f"budget set to ε {row.epsilon:g}{was}, at δ {row.delta:g}"
        case FirstPlan():
            planned = ", ".join(_releases(release.event, release.count) for release in row.commitment.releases)
            return row.committed_at, f"run {row.run}  first plan, by which all is priced: {planned}"
        case Reservation():
            reservation = f"ε {row.epsilon:g} of the budget is kept for run {row.run} until {row.until}"
            return row.set_at, reservation if row.epsilon else f"nothing is kept for run {row.run} any more"
        case Entry() | Exposure() | Failure():
            when, what = _of_round(row)
            return when, f"run {row.run} round {row.round_number}  {what}"
    return row.withdrawn_at, f"withdrawn for good: {row.reason}"


def _of_round(row: Any) -> tuple[str, str]:
    from fedveil.client.ledger.rows import Entry, Exposure

    match row:
        case Entry():
            whose = f", as {row.caused_by} shares records" if row.caused_by else ""
            return row.charged_at, f"{row.purpose}: {_releases(row.event, row.count)}{whose}"
        case Exposure():
            return row.released_at, f"released without privacy: {row.steps} steps"
    return row.failed_at, f"failed after its charge and was answered by noise alone, outside the claim: {row.reason}"


def _releases(event: Event, count: int) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in event.figures.items())
    return f"{count} × {event.kind} ({figures})"


def csv_of(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return charges, then exposures and failures for purposes of their own, which have no event and no delta.

    Each figure of an event is a column, called ``event_`` and its name where the charge itself has one of that name.
    """
    where = ("id", "dataset", "run", "round_number")
    before, after = (*where, "purpose", "unit", "event"), ("count", "delta", "charged_at", "caused_by")
    names = sorted({name for row in rows["charges"] for name in row["event"]["figures"]})
    columns = {name: f"event_{name}" if name in before + after else name for name in names}
    lines = []
    for row in rows["charges"]:
        figures = {columns[name]: value for name, value in row["event"]["figures"].items()}
        lines.append({**row, "event": row["event"]["kind"], **figures})
    for row in rows["exposures"]:
        line = {"purpose": "without privacy", "count": row["steps"], "charged_at": row["released_at"]}
        lines.append({**{name: row[name] for name in where}, **line})
    for row in rows["failures"]:
        line = {"purpose": "noise alone", "charged_at": row["failed_at"]}
        lines.append({**{name: row[name] for name in where}, **line})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*before, *columns.values(), *after])
    writer.writeheader()
    writer.writerows({name: shown_as_text(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def receipt_lines(receipt: RunReceipt, dataset: str, run: str) -> list[str]:
    """Return what one run has cost a data set."""
    lines = [f"{dataset}, run {run}: {_rounds(receipt.rounds)}, from {_times(receipt.charges, receipt.exposures)}"]
    if receipt.epsilon_run is None:
        lines += [EXPOSED, ASKED]
    elif receipt.delta is not None:
        own, before, after = map(figure, (receipt.epsilon_run, receipt.epsilon_before, receipt.epsilon_after))
        alone = conditions(receipt.honest_sites_run, receipt.epsilon_run_alone)
        all_alone = conditions(receipt.honest_sites_after, receipt.epsilon_after_alone)
        largest = f"{figure(receipt.largest)}{honest_text(receipt.honest_sites_largest)}"
        lines += [
            f"  its own charges: ε {own} at δ {receipt.delta:g}, for one {receipt.unit}{alone}",
            f"  all charges to this name: ε {before} before it, {after} with it{all_alone}",
            f"  its records' largest until now, under any name: ε {largest}",
        ]
    if receipt.failures:
        failed = counted(len(receipt.failures), "round")
        lines.append(f"  {failed} failed after the charge and was answered by noise alone")
    if receipt.withdrawn:
        lines.append(f"  the data set was withdrawn at {receipt.withdrawn}")
    return lines


def figure(epsilon: float | None) -> str:
    """Return an ε to four decimals."""
    return epsilon_text(epsilon, decimals=4)


def conditions(honest_sites: int, alone: float | None) -> str:
    """Return the conditions of an ε, from a comma on: honest sites and the price alone; empty without secure sums.

    >>> conditions(0, None), conditions(1, None)
    ('', ', whatever other sites of a sum do (h = 1)')
    >>> conditions(2, 3.5)[:63]
    ', counting on h = 2 honest sites of each sum; if no other site '
    """
    if honest_sites <= 1:
        return ", whatever other sites of a sum do (h = 1)" if honest_sites else ""
    return (
        f", counting on h = {honest_sites} honest sites of each sum; if no other site adds its noise to a sum (alone): "
        f"ε {figure(alone)}"
    )


def _rounds(numbers: Sequence[int]) -> str:
    if not numbers:
        return "no training round of its own was charged"
    return f"{counted(len(numbers), 'round')} charged, the last one round {numbers[-1]}"


def _times(charges: Sequence[Entry], exposures: Sequence[Exposure]) -> str:
    times = sorted([*(c.charged_at for c in charges), *(e.released_at for e in exposures)])
    return f"{times[0]} to {times[-1]}"

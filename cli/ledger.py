"""``fedveil ledger``: what a steward reads from a site's ledger, and what a steward sets there."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.cli.errors import Commands, for_people
from fedveil.common.check import in_range, nearest, one_of, positive
from fedveil.common.errors import ConfigError, LedgerError
from fedveil.common.words import counted
from fedveil.privacy.figures import epsilon_text, honest_text, remaining_text
from fedveil.privacy.meaning import MOST_UNITS
from fedveil.privacy.units import RECORD

if TYPE_CHECKING:
    from fedveil.client.ledger.ledger import Ledger
    from fedveil.client.ledger.rows import Budget, Entry, Exposure, Failure, FirstPlan, Reservation, Withdrawal
    from fedveil.privacy.events import Event

ledger_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look into a site's privacy ledger, and set budgets.")
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)

EXPOSED = (
    "Records of it were released without privacy: no ε holds for them, and private rounds are refused unless the "
    "policy has after-no-privacy = true."
)
ASKED = (
    "  It tells in which rounds this site was asked. If a trusted server drew sites for them, the price counts on "
    "nobody knowing that: hand it to nobody but that server's people."
)
WITHDRAWN = "It was withdrawn: the site refuses every further round on these records, with or without privacy."
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a text begins with that a spreadsheet would compute."""
LedgerFile = Annotated[Path, typer.Argument(help="The ledger's file.")]


@ledger_app.command("show")
@for_people
def show(
    path: LedgerFile,
    records_per_person: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_UNITS, help="Print ε of a person with so many records, too."),
    ] = None,
) -> None:
    """Print what has been charged to every data set of a ledger, and every budget that was set, in order of time."""
    with _opened(path) as ledger:
        entries = ledger.entries()
        for dataset in _datasets(ledger):
            terms = ledger.terms(dataset)
            spent, largest = (figure(dataset, min(terms.delta, 1.0)) for figure in (ledger.epsilon, ledger.largest))
            budget = f" of {terms.epsilon:g}" if terms.epsilon < float("inf") else ""
            at = f" at δ {terms.delta:g}" if terms.delta < 1 else ""
            units = sorted({entry.unit for entry in entries if entry.dataset == dataset})
            per = f", for one {' and for one '.join(units)}" if units else ""
            honest = ledger.honest_sites(dataset)
            rests = _rests(honest, ledger.epsilon_alone(dataset, min(terms.delta, 1.0)))
            shared, whose = "", ""
            if largest is not None:
                of_all = honest_text(ledger.honest_sites(dataset, under_any_name=True))
                shared = f"; its records' largest, under any name: {_figure(largest)}{of_all}"
            if records_per_person and units == [RECORD.name]:
                person = ledger.epsilon_of_person(dataset, records_per_person, min(terms.delta, 1.0))
                whose = f"; of a person with {counted(records_per_person, 'record')}: {_figure(person)}"
                whose += honest_text(honest)
            _say(f"{dataset}: ε {_figure(spent)}{budget}{at}{per}{rests}{shared}{whose}")
            events = [(b.set_at, _spoken_budget(b)) for b in ledger.budgets() if b.dataset == dataset]
            events += [(p.committed_at, _spoken_plan(p)) for p in ledger.plans.all() if p.dataset == dataset]
            events += [(e.charged_at, _spoken_charge(e)) for e in entries if e.dataset == dataset]
            events += [(e.released_at, _spoken_exposure(e)) for e in ledger.exposures() if e.dataset == dataset]
            events += [(f.failed_at, _spoken_failure(f)) for f in ledger.failures() if f.dataset == dataset]
            held = ledger.holds
            events += [(r.set_at, _spoken_reservation(r)) for r in held.reservations() if r.dataset == dataset]
            events += [(w.withdrawn_at, _spoken_withdrawal(w)) for w in held.withdrawals() if w.dataset == dataset]
            for when, what in sorted(events, key=lambda event: event[0]):
                _say(f"  {when}  {what}")
            if ledger.exposed(dataset):
                _say(f"  {EXPOSED}")
            if ledger.holds.withdrawn([dataset]):
                _say(f"  {WITHDRAWN}")


@ledger_app.command("remaining")
@for_people
def remaining(
    path: LedgerFile,
    dataset: Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")],
    epsilon: Annotated[float | None, typer.Option(help="A budget; the ledger's own holds if it is smaller.")] = None,
    delta: Annotated[float | None, typer.Option(help="A δ; the ledger's own holds if it is smaller.")] = None,
) -> None:
    """Print how much of its budget a data set has left."""
    if epsilon is not None:
        positive(epsilon=epsilon)
    if delta is not None:
        in_range(0, 0.5, delta=delta)
    with _opened(path) as ledger:
        _require(ledger, path, dataset)
        unlimited = float("inf")
        budget, at = ledger.terms(dataset).stricter(epsilon or unlimited, delta or unlimited)
        if budget == unlimited:
            raise ConfigError(f"{path} holds no budget for data set {dataset!r}: give one with --epsilon")
        if at == unlimited:
            raise ConfigError(f"{path} holds no δ for data set {dataset!r}: give one with --delta")
        spent, exposed = ledger.epsilon(dataset, at), ledger.exposed(dataset)
        kept, withdrawn = ledger.kept(dataset, "", at), ledger.holds.withdrawn([dataset])
        rests = _rests(ledger.honest_sites(dataset), ledger.epsilon_alone(dataset, at))
    # Rounded against the site: what is left is never shown larger than it is.
    left = max(0.0, budget - spent)
    rest, gone = remaining_text(left, decimals=4), epsilon_text(spent, decimals=4)
    _say(f"{dataset}: ε {rest} of {budget:g} is left at δ {at:g}; {gone} is spent{rests}")
    if kept:
        _say(f"Of that {epsilon_text(kept, decimals=4)} is kept for runs that have a reservation.")
    if withdrawn:
        _say(WITHDRAWN)
    elif exposed:
        _say(EXPOSED)
    elif not left:
        _say("The site refuses every further round on these records.")


@ledger_app.command("budget")
@for_people
def budget(
    path: LedgerFile,
    dataset: Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")],
    epsilon: Annotated[float, typer.Option(help="The new budget, over all runs together.")],
    delta: Annotated[float | None, typer.Option(help="A δ; the ledger's own holds if it is smaller.")] = None,
) -> None:
    """Raise or lower the budget of a data set; the old one stays in the ledger's history, with the time."""
    with _opened(path) as ledger:
        _require(ledger, path, dataset)
        at = ledger.terms(dataset).delta if delta is None else delta
        if at == float("inf"):
            raise ConfigError(f"{path} holds no δ for data set {dataset!r}: give one with --delta")
        before, after = ledger.set_budget(dataset, epsilon, at), ledger.terms(dataset)
        spent, exposed = ledger.epsilon(dataset, after.delta), ledger.exposed(dataset)
        rests = _rests(ledger.honest_sites(dataset), ledger.epsilon_alone(dataset, after.delta))
    was = f"was {before.epsilon:g}" if before.epsilon < float("inf") else "had none"
    gone = epsilon_text(spent, decimals=4)
    _say(f"{dataset}: budget ε {epsilon:g} at δ {after.delta:g} ({was}); {gone} is spent{rests}")
    if delta is not None and after.delta < delta:
        _say(f"δ {after.delta:g} holds instead of {delta:g}: releases were charged at it, and a δ never grows.")
    if exposed:
        _say(EXPOSED)
    elif spent >= epsilon:
        _say("That is no more than what is spent: the site refuses every further round on these records.")
    elif epsilon > before.epsilon:
        _say("A policy with a smaller epsilon lowers it again at the next round: change the policy as well.")


@ledger_app.command("reserve")
@for_people
def reserve(
    path: LedgerFile,
    dataset: Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")],
    run: Annotated[str, typer.Option(help="The run's name, as charges have it. It need not have begun.")],
    epsilon: Annotated[float, typer.Option(help="For what the run adds from now on; 0 ends an earlier reservation.")],
    until: Annotated[str, typer.Option(help="The last day, as 2026-12-31 (UTC), or a time with its zone.")],
) -> None:
    """Keep a part of a data set's budget for one run until a day: other runs are refused what would go into it."""
    from fedveil.client.ledger.holds import moment

    end = moment(until)
    with _opened(path) as ledger:
        _require(ledger, path, dataset)
        terms = ledger.terms(dataset)
        if epsilon and terms.epsilon == float("inf"):
            raise ConfigError(f"{path} holds no budget for data set {dataset!r}: set one with 'fedveil ledger budget'")
        spent = ledger.epsilon(dataset, min(terms.delta, 1.0))
        free = max(0.0, terms.epsilon - spent - ledger.kept(dataset, run, terms.delta)) if epsilon else epsilon
        rests = honest_text(ledger.honest_sites(dataset))
        if epsilon > free:
            raise ConfigError(
                f"{dataset}: ε {remaining_text(free, decimals=4)} is neither spent nor kept for another run{rests}: "
                "reserve at most that"
            )
        ledger.holds.reserve(dataset, run, epsilon, end)
    if epsilon:
        of = f"the last ε {epsilon:g} of {terms.epsilon:g}"
        _say(f"{dataset}: {of} is kept for run {run} until {end}, for what it adds from now on")
    else:
        _say(f"{dataset}: nothing is kept for run {run} any more")


@ledger_app.command("withdraw")
@for_people
def withdraw(
    path: LedgerFile,
    dataset: Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")],
    reason: Annotated[str, typer.Option(help="Why; it stays in the ledger, and does not leave the site.")],
) -> None:
    """Stop a data set for good. No command takes it back, and what was sent before stays sent."""
    with _opened(path) as ledger:
        _require(ledger, path, dataset)
        ledger.holds.withdraw(dataset, reason)
    _say(f"{dataset}: withdrawn. From now on every round on these records is refused, under any name.")
    _say("Records that were never charged are known by this name alone; 'fedveil site withdraw' reads them as well.")


@ledger_app.command("receipt")
@for_people
def receipt(
    path: LedgerFile,
    dataset: Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")],
    run: Annotated[str, typer.Option(help="The run's name, as 'fedveil ledger show' has it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file for all of it, as JSON.")] = None,
    sign: Annotated[Path | None, typer.Option(help="A private key; the signature goes beside the file.")] = None,
) -> None:
    """Print what one run has cost a data set; as a file, with every charge, it can be signed and handed over."""
    from fedveil.client.ledger.receipts import receipt_of
    from fedveil.common.files import write_output

    if sign is not None and output is None:
        raise ConfigError("--sign needs a file to sign: name one with --output")
    with _opened(path) as ledger:
        made = receipt_of(ledger, dataset, run)
    _say(f"{dataset}, run {run}: {_rounds(made.rounds)}, from {_times(made.charges, made.exposures)}")
    if made.epsilon_run is None:
        _say(EXPOSED)
        _say(ASKED)
    elif made.delta is not None:
        own, before, after = (_figure(e) for e in (made.epsilon_run, made.epsilon_before, made.epsilon_after))
        rests = [
            _rests(made.honest_sites_run, made.epsilon_run_alone),
            _rests(made.honest_sites_after, made.epsilon_after_alone),
        ]
        _say(f"  its own charges: ε {own} at δ {made.delta:g}, for one {made.unit}{rests[0]}")
        _say(f"  all charges to this name: ε {before} before it, {after} with it{rests[1]}")
        of_all = honest_text(made.honest_sites_largest)
        _say(f"  its records' largest until now, under any name: ε {_figure(made.largest)}{of_all}")
    if made.failures:
        _say(f"  {counted(len(made.failures), 'round')} failed after the charge and was answered by noise alone")
    if made.withdrawn:
        _say(f"  the data set was withdrawn at {made.withdrawn}")
    if output is None:
        return
    content = (json.dumps(made.as_json(), indent=2, ensure_ascii=False) + "\n").encode()
    files = {output: content}
    if sign is not None:
        from fedveil.reports.signature import sign as signed_with

        files[output.with_name(f"{output.name}.sig")] = signed_with(content, sign)
    write_output(files, [path, *([] if sign is None else [sign])])
    for place in files:
        _say(f"written: {place}")


@ledger_app.command("export")
@for_people
def export(
    path: LedgerFile,
    form: Annotated[str, typer.Option("--format", help="json or csv.")] = "json",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file; without it, to the terminal.")] = None,
) -> None:
    """Write all rows of a ledger as JSON, or all but plans, budgets, reservations and withdrawals as CSV."""
    one_of(("json", "csv"), format=form)
    with _opened(path) as ledger:
        plans = [dataclasses.asdict(plan) for plan in ledger.plans.all()]
        charges = [dataclasses.asdict(entry) for entry in ledger.entries()]
        exposures = [dataclasses.asdict(exposure) for exposure in ledger.exposures()]
        failures = [dataclasses.asdict(failure) for failure in ledger.failures()]
        budgets = [dataclasses.asdict(budget) for budget in ledger.budgets()]
        reservations = [dataclasses.asdict(reservation) for reservation in ledger.holds.reservations()]
        withdrawals = [dataclasses.asdict(withdrawal) for withdrawal in ledger.holds.withdrawals()]
    held = {
        "plans": plans,
        "charges": charges,
        "exposures": exposures,
        "failures": failures,
        "budgets": budgets,
        "reservations": reservations,
        "withdrawals": withdrawals,
    }
    text = _csv(charges, exposures, failures) if form == "csv" else json.dumps(held, indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    from fedveil.common.files import write_output

    write_output({output: text.encode()}, [path])
    _say(f"{len(charges)} charges, {len(exposures)} exposures and {len(failures)} failures are in {output}")


@contextmanager
def _opened(path: Path) -> Iterator[Ledger]:
    from fedveil.client.ledger.ledger import Ledger

    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    with Ledger(path) as ledger:
        yield ledger


def _datasets(ledger: Ledger) -> list[str]:
    names = {entry.dataset for entry in ledger.entries()} | {budget.dataset for budget in ledger.budgets()}
    names |= {withdrawal.dataset for withdrawal in ledger.holds.withdrawals()}
    return sorted(names | {exposure.dataset for exposure in ledger.exposures()})


def _require(ledger: Ledger, path: Path, dataset: str) -> None:
    known = _datasets(ledger)
    if dataset not in known:
        raise LedgerError(f"{path} holds nothing about data set {dataset!r}{nearest(dataset, known)}")


def _figure(epsilon: float | None) -> str:
    return epsilon_text(epsilon, decimals=4)


def _rests(honest_sites: int, alone: float | None) -> str:
    """Return what stands behind an ε, from its comma on: its honest sites and its price alone; empty without a sum.

    >>> _rests(0, None), _rests(1, None)
    ('', ', whatever other sites of a sum do (h = 1)')
    >>> _rests(2, 3.5)[:63]
    ', counting on h = 2 honest sites of each sum; if no other site '
    """
    if honest_sites <= 1:
        return ", whatever other sites of a sum do (h = 1)" if honest_sites else ""
    return (
        f", counting on h = {honest_sites} honest sites of each sum; if no other site adds its noise to a sum (alone): "
        f"ε {_figure(alone)}"
    )


def _spoken_charge(entry: Entry) -> str:
    whose = f", as {entry.caused_by} shares records" if entry.caused_by else ""
    what = _spoken_releases(entry.event, entry.count)
    return f"run {entry.run} round {entry.round_number}  {entry.purpose}: {what}{whose}"


def _spoken_releases(event: Event, count: int) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in event.figures.items())
    return f"{count} × {event.kind} ({figures})"


def _spoken_plan(row: FirstPlan) -> str:
    planned = ", ".join(_spoken_releases(release.event, release.count) for release in row.commitment.releases)
    return f"run {row.run}  first plan, by which all is priced: {planned}"


def _spoken_exposure(row: Exposure) -> str:
    return f"run {row.run} round {row.round_number}  released without privacy: {row.steps} steps"


def _spoken_failure(row: Failure) -> str:
    return (
        f"run {row.run} round {row.round_number}  failed after its charge and was answered by noise alone, "
        f"outside the claim: {row.reason}"
    )


def _spoken_budget(row: Budget) -> str:
    was = "" if row.replaced is None else f", was {row.replaced:g}"
    return f"budget set to ε {row.epsilon:g}{was}, at δ {row.delta:g}"


def _spoken_reservation(row: Reservation) -> str:
    if not row.epsilon:
        return f"nothing is kept for run {row.run} any more"
    return f"ε {row.epsilon:g} of the budget is kept for run {row.run} until {row.until}"


def _spoken_withdrawal(row: Withdrawal) -> str:
    return f"withdrawn for good: {row.reason}"


def _rounds(numbers: Sequence[int]) -> str:
    if not numbers:
        return "no training round of its own was charged"
    return f"{counted(len(numbers), 'round')} charged, the last one round {numbers[-1]}"


def _times(charges: Sequence[Entry], exposures: Sequence[Exposure]) -> str:
    times = sorted([*(c.charged_at for c in charges), *(e.released_at for e in exposures)])
    return f"{times[0]} to {times[-1]}"


def _csv(charges: list[dict[str, Any]], exposures: list[dict[str, Any]], failures: list[dict[str, Any]]) -> str:
    """Return charges, then exposures and failures for purposes of their own, which have no event and no delta.

    Each figure that some event has is a column, called ``event_`` and its name where the charge itself has one of it.
    """
    where = ("id", "dataset", "run", "round_number")
    before, after = (*where, "purpose", "unit", "event"), ("count", "delta", "charged_at", "caused_by")
    names = sorted({name for row in charges for name in row["event"]["figures"]})
    columns = {name: f"event_{name}" if name in before + after else name for name in names}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*before, *columns.values(), *after])
    writer.writeheader()
    rows = []
    for row in charges:
        held = {columns[name]: value for name, value in row["event"]["figures"].items()}
        rows.append({**row, "event": row["event"]["kind"], **held})
    for row in exposures:
        rows.append({name: row[name] for name in where})
        rows[-1] |= {"purpose": "without privacy", "count": row["steps"], "charged_at": row["released_at"]}
    for row in failures:
        rows.append({name: row[name] for name in where})
        rows[-1] |= {"purpose": "noise alone", "charged_at": row["failed_at"]}
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell that a spreadsheet takes for text where it is text: names come from servers and stewards."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _say(line: str) -> None:
    from fedveil.common.words import visible

    console.print(visible(line))

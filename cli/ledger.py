"""``fedveil ledger``: what a steward reads from a site's ledger, and what a steward sets there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import Commands, for_people
from fedveil.common.check import in_range, nearest, one_of, positive
from fedveil.common.errors import ConfigError, LedgerError
from fedveil.common.words import counted, natural

if TYPE_CHECKING:
    from fedveil.client.ledger.ledger import Ledger

ledger_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look into a site's privacy ledger, and set budgets.")
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)

WITHDRAWN = "It was withdrawn: the site refuses every further round on these records, with or without privacy."
LedgerFile = Annotated[Path, typer.Argument(help="The ledger's file.")]
Dataset = Annotated[str, typer.Option(help="The data set's id, as the ledger calls it.")]


@ledger_app.command("show")
@for_people
def show(
    path: Annotated[Path, typer.Argument(help="The ledger's file; or a run, also as 'latest', for all in its folder.")],
    records_per_person: Annotated[
        int | None,
        typer.Option(min=1, help="Print ε of a person with this number of records, too."),
    ] = None,
) -> None:
    """Print what has been charged to every data set of a ledger, and every budget that was set, in order of time."""
    from fedveil.cli.ledger_words import EXPOSED, history_of
    from fedveil.privacy.meaning import MOST_UNITS

    if records_per_person is not None:
        in_range(0, MOST_UNITS, records_per_person=records_per_person)
    for file in _ledgers(path):
        with _opened(file) as ledger:
            for dataset in _datasets(ledger):
                _say(_spent(ledger, dataset, records_per_person))
                for line in history_of(ledger, dataset):
                    _say(f"  {line}")
                if ledger.exposed(dataset):
                    _say(f"  {EXPOSED}")
                if ledger.holds.withdrawn([dataset]):
                    _say(f"  {WITHDRAWN}")


def _ledgers(path: Path) -> list[Path]:
    """Return a ledger's file, or those in the folder of the run that is named."""
    from fedveil.common.paths import given_run

    if path.suffix and not path.is_dir():
        return [path]
    folder = given_run(path)
    ledgers = sorted(folder.glob("ledgers/*.sqlite"), key=lambda file: natural(file.name))
    if folder.is_dir() and not ledgers:
        raise LedgerError(f"{folder} has no ledgers of simulated sites: name a ledger's file")
    return ledgers if folder.is_dir() else [folder]


def _spent(ledger: Ledger, dataset: str, records_per_person: int | None) -> str:
    """Return the line on what a data set has spent, and on what its records and a person of it have."""
    from fedveil.cli.ledger_words import conditions, figure
    from fedveil.privacy.figures import honest_text
    from fedveil.privacy.units import RECORD

    terms, honest = ledger.terms(dataset), ledger.honest_sites(dataset)
    delta = min(terms.delta, 1.0)
    units = sorted({entry.unit for entry in ledger.entries() if entry.dataset == dataset})
    line = f"{dataset}: ε {figure(ledger.epsilon(dataset, delta))}"
    line += f" of {terms.epsilon:g}" if terms.epsilon < float("inf") else ""
    line += f" at δ {terms.delta:g}" if terms.delta < 1 else ""
    line += f", for one {' and for one '.join(units)}" if units else ""
    line += conditions(honest, ledger.epsilon_alone(dataset, delta))
    if (largest := ledger.largest(dataset, delta)) is not None:
        of_all = honest_text(ledger.honest_sites(dataset, under_any_name=True))
        line += f"; its records' largest, under any name: {figure(largest)}{of_all}"
    if records_per_person and units == [RECORD.name]:
        person = ledger.epsilon_of_person(dataset, records_per_person, delta)
        line += f"; of a person with {counted(records_per_person, 'record')}: {figure(person)}{honest_text(honest)}"
    return line


@ledger_app.command("remaining")
@for_people
def remaining(
    path: LedgerFile,
    dataset: Dataset,
    epsilon: Annotated[float | None, typer.Option(help="A budget; the ledger's own holds if it is smaller.")] = None,
    delta: Annotated[float | None, typer.Option(help="A δ; the ledger's own holds if it is smaller.")] = None,
) -> None:
    """Print how much of its budget a data set has left."""
    from fedveil.cli.ledger_words import EXPOSED, conditions
    from fedveil.privacy.figures import epsilon_text, remaining_text

    if epsilon is not None:
        positive(epsilon=epsilon)
    if delta is not None:
        in_range(0, 0.5, delta=delta)
    with _opened(path, dataset) as ledger:
        unlimited = float("inf")
        budget, at = ledger.terms(dataset).stricter(epsilon or unlimited, delta or unlimited)
        if budget == unlimited:
            raise ConfigError(f"{path} holds no budget for data set {dataset!r}: give one with --epsilon")
        if at == unlimited:
            raise ConfigError(f"{path} holds no δ for data set {dataset!r}: give one with --delta")
        spent, exposed = ledger.epsilon(dataset, at), ledger.exposed(dataset)
        reserved, withdrawn = ledger.kept(dataset, "", at), ledger.holds.withdrawn([dataset])
        condition = conditions(ledger.honest_sites(dataset), ledger.epsilon_alone(dataset, at))
    # Rounded against the site: what is left is never shown larger than it is.
    left = max(0.0, budget - spent)
    rest, gone = remaining_text(left, decimals=4), epsilon_text(spent, decimals=4)
    _say(f"{dataset}: ε {rest} of {budget:g} is left at δ {at:g}; {gone} is spent{condition}")
    if reserved:
        _say(f"Of that {epsilon_text(reserved, decimals=4)} is kept for runs that have a reservation.")
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
    dataset: Dataset,
    epsilon: Annotated[float, typer.Option(help="The new budget, over all runs together.")],
    delta: Annotated[float | None, typer.Option(help="A δ; the ledger's own holds if it is smaller.")] = None,
) -> None:
    """Raise or lower the budget of a data set; the old one stays in the ledger's history, with the time."""
    from fedveil.cli.ledger_words import EXPOSED, conditions
    from fedveil.privacy.figures import epsilon_text

    with _opened(path, dataset) as ledger:
        at = ledger.terms(dataset).delta if delta is None else delta
        if at == float("inf"):
            raise ConfigError(f"{path} holds no δ for data set {dataset!r}: give one with --delta")
        before, after = ledger.set_budget(dataset, epsilon, at), ledger.terms(dataset)
        spent, exposed = ledger.epsilon(dataset, after.delta), ledger.exposed(dataset)
        condition = conditions(ledger.honest_sites(dataset), ledger.epsilon_alone(dataset, after.delta))
    was = f"was {before.epsilon:g}" if before.epsilon < float("inf") else "had none"
    gone = epsilon_text(spent, decimals=4)
    _say(f"{dataset}: budget ε {epsilon:g} at δ {after.delta:g} ({was}); {gone} is spent{condition}")
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
    dataset: Dataset,
    run: Annotated[str, typer.Option(help="The run's name, as charges have it. It need not have begun.")],
    epsilon: Annotated[float, typer.Option(help="For what the run adds from now on; 0 ends an earlier reservation.")],
    until: Annotated[str, typer.Option(help="The last day, as 2026-12-31 (UTC), or a time with its zone.")],
) -> None:
    """Keep a part of a data set's budget for one run until a day: other runs are refused what would go into it."""
    from fedveil.client.ledger.holds import moment
    from fedveil.privacy.figures import honest_text, remaining_text

    end = moment(until)
    with _opened(path, dataset) as ledger:
        terms = ledger.terms(dataset)
        if epsilon and terms.epsilon == float("inf"):
            raise ConfigError(f"{path} holds no budget for data set {dataset!r}: set one with 'fedveil ledger budget'")
        spent = ledger.epsilon(dataset, min(terms.delta, 1.0))
        free = max(0.0, terms.epsilon - spent - ledger.kept(dataset, run, terms.delta)) if epsilon else epsilon
        condition = honest_text(ledger.honest_sites(dataset))
        if epsilon > free:
            raise ConfigError(
                f"{dataset}: ε {remaining_text(free, decimals=4)} is neither spent nor kept for another "
                f"run{condition}: reserve at most that"
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
    dataset: Dataset,
    reason: Annotated[str, typer.Option(help="Why; it stays in the ledger, and does not leave the site.")],
) -> None:
    """Stop a data set for good. No command takes it back, and what was sent before stays sent."""
    with _opened(path, dataset) as ledger:
        ledger.holds.withdraw(dataset, reason)
    _say(f"{dataset}: withdrawn. From now on every round on these records is refused, under any name.")
    _say("Records that were never charged are known by this name alone; 'fedveil site withdraw' reads them as well.")


@ledger_app.command("receipt")
@for_people
def receipt(
    path: LedgerFile,
    dataset: Dataset,
    run: Annotated[str, typer.Option(help="The run's name, as 'fedveil ledger show' has it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file for all of it, as JSON.")] = None,
    sign: Annotated[Path | None, typer.Option(help="A private key; the signature goes beside the file.")] = None,
) -> None:
    """Print what one run has cost a data set; as a file, with every charge, it can be signed and handed over."""
    from fedveil.cli.ledger_words import receipt_lines
    from fedveil.client.ledger.receipts import receipt_of
    from fedveil.common.files import write_output

    if sign is not None and output is None:
        raise ConfigError("--sign needs a file to sign: name one with --output")
    with _opened(path) as ledger:
        made = receipt_of(ledger, dataset, run)
    for line in receipt_lines(made, dataset, run):
        _say(line)
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
    """Write all rows of a ledger as JSON, or its charges, exposures and failures as CSV."""
    from fedveil.cli.ledger_words import csv_of, rows_of

    one_of(("json", "csv"), format=form)
    with _opened(path) as ledger:
        rows = rows_of(ledger)
    text = csv_of(rows) if form == "csv" else json.dumps(rows, indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    from fedveil.common.files import write_output

    write_output({output: text.encode()}, [path])
    counts = (len(rows[kind]) for kind in ("charges", "exposures", "failures"))
    _say("{} charges, {} exposures and {} failures are in {}".format(*counts, output))


@contextmanager
def _opened(path: Path, dataset: str = "") -> Iterator[Ledger]:
    """Open a ledger; LedgerError if it is missing, or knows nothing of ``dataset``."""
    from fedveil.client.ledger.ledger import Ledger

    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    with Ledger(path) as ledger:
        if dataset and dataset not in (known := _datasets(ledger)):
            raise LedgerError(f"{path} holds nothing about data set {dataset!r}{nearest(dataset, known)}")
        yield ledger


def _datasets(ledger: Ledger) -> list[str]:
    names = {entry.dataset for entry in ledger.entries()} | {budget.dataset for budget in ledger.budgets()}
    names |= {withdrawal.dataset for withdrawal in ledger.holds.withdrawals()}
    return sorted(names | {exposure.dataset for exposure in ledger.exposures()})


def _say(line: str) -> None:
    from fedveil.common.words import visible

    console.print(visible(line))

"""``fedveil ledger``: what a steward reads from a site's ledger. Nothing here writes a charge or a budget."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from common.check import in_range, nearest, one_of, positive
from common.errors import ConfigError, DataError, LedgerError
from experiments.people import for_people

if TYPE_CHECKING:
    from common.privacy.ledger import Ledger

ledger_app = typer.Typer(no_args_is_help=True, help="Look into a site's privacy ledger.")
console = Console(highlight=False, soft_wrap=True)

LedgerFile = Annotated[Path, typer.Argument(help="The ledger's file.")]


@ledger_app.command("show")
@for_people
def show(path: LedgerFile) -> None:
    """Print what has been charged to every data set of a ledger, and the budget that was set."""
    with _opened(path) as ledger:
        entries = ledger.entries()
        for dataset in _datasets(ledger):
            terms = ledger.terms(dataset)
            spent = ledger.epsilon(dataset, terms.delta) if terms.delta < 1 else 0.0
            budget = f" of {terms.epsilon:g}" if terms.epsilon < float("inf") else ""
            _say(f"{dataset}: ε {spent:.4f}{budget} at δ {terms.delta:g}")
            for entry in entries:
                if entry.dataset == dataset:
                    _say(
                        f"  {entry.charged_at}  run {entry.run} round {entry.round_number}  {entry.kind}: "
                        f"{entry.count} × (noise {entry.noise_multiplier:.4g}, sample rate {entry.sample_rate:.4g}), "
                        f"clip {entry.clip_norm:.4g}"
                    )


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
        known = _datasets(ledger)
        if dataset not in known:
            raise LedgerError(f"{path} holds nothing about data set {dataset!r}{nearest(dataset, known)}")
        unlimited = float("inf")
        budget, at = ledger.terms(dataset).stricter(epsilon or unlimited, delta or unlimited)
        if budget == unlimited:
            raise ConfigError(f"{path} holds no budget for data set {dataset!r}: give one with --epsilon")
        if at == unlimited:
            raise ConfigError(f"{path} holds no δ for data set {dataset!r}: give one with --delta")
        spent = ledger.epsilon(dataset, at)
    # Rounded against the site: what is left is never shown larger than it is.
    left = max(0.0, budget - spent)
    _say(f"{dataset}: ε {int(left * 1e4) / 1e4:.4f} of {budget:g} is left at δ {at:g}; {spent:.4f} is spent")
    if not left:
        _say("The site refuses every further round on these records.")


@ledger_app.command("export")
@for_people
def export(
    path: LedgerFile,
    form: Annotated[str, typer.Option("--format", help="json or csv.")] = "json",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file; without it, to the terminal.")] = None,
) -> None:
    """Write every charge and every budget of a ledger as JSON, or every charge as CSV."""
    one_of(("json", "csv"), format=form)
    with _opened(path) as ledger:
        charges = [dataclasses.asdict(entry) for entry in ledger.entries()]
        budgets = [dataclasses.asdict(budget) for budget in ledger.budgets()]
    text = _csv(charges) if form == "csv" else json.dumps({"charges": charges, "budgets": budgets}, indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    from server.files import replace_file

    try:
        replace_file(output, text.encode())
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error.strerror}): name another file") from error
    _say(f"{len(charges)} charges are in {output}")


@contextmanager
def _opened(path: Path) -> Iterator[Ledger]:
    from common.privacy.ledger import Ledger

    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    with Ledger(path) as ledger:
        yield ledger


def _datasets(ledger: Ledger) -> list[str]:
    return sorted({entry.dataset for entry in ledger.entries()} | {budget.dataset for budget in ledger.budgets()})


def _csv(charges: list[dict[str, Any]]) -> str:
    from common.privacy.ledger import Entry

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [item.name for item in dataclasses.fields(Entry)])
    writer.writeheader()
    writer.writerows(charges)
    return text.getvalue()


def _say(line: str) -> None:
    from server.report.words import visible

    console.print(visible(line), markup=False)

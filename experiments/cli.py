"""The ``fedveil`` command."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experiments.deploy.cli import doctor_app, server_app, site_app
from experiments.people import for_people as _for_people
from experiments.plan_cli import plan

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
ledger_app = typer.Typer(no_args_is_help=True, help="Look into a site's privacy ledger.")
app.add_typer(ledger_app, name="ledger")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")
app.add_typer(doctor_app, name="doctor")
app.command()(plan)
console = Console(highlight=False, soft_wrap=True)

Settings = Annotated[
    list[str] | None,
    typer.Option("-c", "--config", help="Settings: 'key=value key2=\"text\"' or a TOML file; may be given again."),
]


@app.command()
@_for_people
def run(
    settings: Settings = None,
    sites: Annotated[int, typer.Option(help="Simulated sites that the data are divided among.")] = 4,
    workers: Annotated[int, typer.Option(help="Processes that train at once; 0: as many as pay off.")] = 0,
) -> None:
    """Run a simulated federation through ``flwr run`` and report on it."""
    from experiments.settings import parse_settings
    from experiments.simulate import simulate
    from server.report import markdown_report
    from strategies import configure

    # A kill must end the SuperLink and Ray as well, so it takes the way of Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, overrides = time.monotonic(), parse_settings(settings or [])
    job = configure(overrides)
    privacy = job.config.privacy
    promise = f"ε ≤ {privacy.epsilon:g} at δ = {privacy.delta:g} for each site" if privacy.on else "privacy OFF"
    console.print(
        f"{job.strategy.name} on {job.config.model.name} and {job.config.data.name}: "
        f"{sites} sites, {job.config.rounds} rounds of {job.config.training.local_steps} steps, {promise}"
    )
    with console.status("starting Flower") as status:

        def watch(progress: Any) -> None:
            for line in progress.lines:
                console.print(line, markup=False)
            status.update(_progress_words(progress.state, time.monotonic() - began))

        folder = simulate(overrides, sites, watch, workers=workers)
    (folder / "report.md").write_text(markdown_report(folder), encoding="utf-8")
    print_summary(folder)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _progress_words(state: Any, seconds: float) -> str:
    if state.get("phase") != "training":
        return f"{state.get('phase', '')} ({seconds:.0f} s)"
    answered = ", ".join(state["answered"]) or "none yet"
    return (
        f"round {state['round']}/{state['rounds']}: {len(state['answered'])} of {state['asked']} sites "
        f"have answered ({answered}) ({seconds:.0f} s)"
    )


SITE_COLUMNS = (
    "steps_total",
    "sample_rate",
    "noise_multiplier",
    "clip_norm",
    "epsilon_total",
    "epsilon_budget",
    "epsilon_remaining",
)


def print_summary(folder: Path) -> None:
    """Print the table by site, the federation's figure, accuracy before and after, and the files."""
    from server.records import read_json
    from server.report import federation_epsilon, read_lines, site_rows

    table = Table(title="privacy spent, by site")
    for column in ("site", "rounds", "steps", "sample rate", "noise", "clip", "ε spent", "ε budget", "ε left"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for row in site_rows(folder):
        cells = ["no claim" if row[key] is None else f"{row[key]:.4g}" for key in SITE_COLUMNS]
        table.add_row(row["site"], str(row["rounds"]), *cells)
    console.print(table)
    result, total = read_json(folder / "result.json"), federation_epsilon(folder)
    if total is None:
        console.print("federation: privacy was OFF; this run promises nothing about any record")
    else:
        delta = read_lines(folder / "privacy.jsonl")[-1]["delta"]
        console.print(f"federation: (ε, δ) = ({total:.3f}, {delta:g}) per record, the maximum over sites")
    console.print(
        f"accuracy on public data: {100 * result['accuracy_before']:.1f} % before, "
        f"{100 * result['accuracy']:.1f} % after {result['rounds']} rounds"
    )
    if result["reason"]:
        console.print(f"ended early: {result['reason']}", markup=False)
    console.print(f"report: {folder / 'report.md'}\nadapter: {folder / 'adapter'}", markup=False)


@app.command()
@_for_people
def evaluate(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Load a run's adapter with stock PEFT and score it on the run's public test data."""
    from experiments.evaluate import evaluate_run

    score = evaluate_run(folder)
    console.print(f"accuracy {100 * score.accuracy:.1f} %  loss {score.loss:.4f}")


@app.command()
@_for_people
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Print a run's privacy report as Markdown, from the files in its folder."""
    from common.errors import DataError
    from server.report import markdown_report

    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no config.json")
    sys.stdout.write(markdown_report(folder))


@app.command()
@_for_people
def settings(config: Settings = None) -> None:
    """Print every setting with its value, as a TOML file that ``-c`` takes."""
    from experiments.settings import parse_settings, to_toml
    from strategies import configure, known_settings

    overrides = parse_settings(config or [])
    configure(overrides)
    sys.stdout.write(to_toml({**known_settings(), **overrides}))


@app.command()
@_for_people
def strategies() -> None:
    """Print the table of strategies as Markdown."""
    from strategies.table import strategy_table

    sys.stdout.write(strategy_table() + "\n")


@ledger_app.command("show")
@_for_people
def ledger_show(path: Annotated[Path, typer.Argument(help="The ledger's file.")]) -> None:
    """Print what has been charged to every data set of a ledger."""
    from common.errors import LedgerError
    from common.privacy.ledger import Ledger

    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    with Ledger(path) as ledger:
        entries = ledger.entries()
        for dataset in sorted({entry.dataset for entry in entries}):
            own = [entry for entry in entries if entry.dataset == dataset]
            delta = min(entry.delta for entry in own)
            console.print(f"{dataset}: ε {ledger.epsilon(dataset, delta):.4f} at δ {delta:g}", markup=False)
            for entry in own:
                console.print(
                    f"  {entry.charged_at}  run {entry.run} round {entry.round_number}  {entry.kind}: "
                    f"{entry.count} × (noise {entry.noise_multiplier:.4g}, sample rate {entry.sample_rate:.4g}), "
                    f"clip {entry.clip_norm:.4g}",
                    markup=False,
                )


if __name__ == "__main__":
    app()

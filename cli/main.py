"""The ``fedveil`` command."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fedveil.cli.doctor import doctor
from fedveil.cli.errors import Commands
from fedveil.cli.errors import for_people as _for_people
from fedveil.cli.ledger import ledger_app
from fedveil.cli.plan import plan
from fedveil.cli.report import keygen, print_summary, report, verify, watch
from fedveil.cli.server import server_app
from fedveil.cli.serving import ask, export, merge
from fedveil.cli.settings import settings
from fedveil.cli.site import site_app
from fedveil.cli.sweep import pictures, sweep, tune
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.common.paths import check_adapter
from fedveil.common.words import counted, decimal_text, names_text, natural, visible

if TYPE_CHECKING:
    from fedveil.common.run_lines import ProgressFile
    from fedveil.strategies.job import Job

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(ledger_app, name="ledger")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")
for command in (plan, doctor, report, watch, verify, keygen, merge, export, ask, sweep, pictures, tune, settings):
    app.command()(command)
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)

Overrides = Annotated[
    list[str] | None,
    typer.Option("-c", "--config", help="Settings: 'key=value key2=\"text\"' or a TOML file; may be given again."),
]


def _print_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import version

    from fedveil.common.bundle import own_digest

    print(f"fedveil {version('fedveil')}, bundle {own_digest()}")
    raise typer.Exit


@app.callback()
def fedveil(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version, and the hash of the code that sites must agree on.",
        ),
    ] = False,
) -> None:
    """Federated fine-tuning with low-rank adapters under differential privacy."""


@app.command()
@_for_people
def run(
    settings: Overrides = None,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Simulated sites that divide the data; 4, or as a resumed run began.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that train at once; 0: as many as pay off.")] = 0,
) -> None:
    """Run a simulated federation through ``flwr run`` and report on it."""
    from fedveil.common.config.sections import NO_ADAPTER
    from fedveil.common.config.text import parse_settings
    from fedveil.common.data.sources import train_and_test
    from fedveil.experiments.simulate import simulate
    from fedveil.experiments.site_count import USUAL, sites_of
    from fedveil.experiments.under_way import ways_on
    from fedveil.reports import write_reports
    from fedveil.server.resume import with_resumed
    from fedveil.strategies.job import configure, with_recipe

    end_as_by_ctrl_c()
    began = time.monotonic()
    overrides, note = with_recipe(with_resumed(parse_settings(settings or [])), sites=sites or USUAL)
    job = configure(overrides)
    if note:  # what is wrong with the data is said without a line above it on what the data leave open
        train_and_test(job.config.data, job.config.model.task)
    typer.echo(note, err=True, nl=bool(note))
    number = sites_of(job.config, sites)
    console.print(visible(_banner(job, number)))
    begun = [Path(str(overrides["resume"]))] if overrides.get("resume") else []

    def begin(folder: Path) -> None:
        begun.append(folder)
        console.print(visible(f"folder: {folder}"))

    try:
        with console.status("starting Flower") as status:

            def watch(progress: Any) -> None:
                for line in progress.lines:
                    console.print(line)
                status.update(Text(visible(_progress_words(progress.state, time.monotonic() - began))))

            folder = simulate(overrides, number, watch, workers=workers, begun=begin)
        write_reports(folder)
        print_summary(folder)
    except BaseException:
        for place in begun[-1:]:
            with suppress(OSError):  # of a terminal that is gone
                console.print(ways_on(place))
        raise
    trained = "head" if job.config.adapter.name == NO_ADAPTER else "adapter"
    console.print(f"folder: {folder}\nreport: {folder / 'report.html'}\n{trained}: {folder / 'adapter'}")
    console.print(f"{time.monotonic() - began:.0f} s in all")


@app.command()
@_for_people
def stop(
    run: Annotated[str, typer.Argument(help="A run's folder or its id, or a server's folder for its last job.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; runs if not said.")] = None,
) -> None:
    """End the `fedveil run` that is under way, as Ctrl-C in its terminal does, or the run of a server's last job.

    What sites have paid stays paid, and 'resume' goes on after the last round.
    """
    from fedveil.deploy.server_folder import is_server, open_server
    from fedveil.deploy.submit import stop_job
    from fedveil.experiments.under_way import stop, ways_on

    if is_server(Path(run)):
        print(stop_job(open_server(Path(run))))
        return
    folder, process = stop(run, output)
    console.print(visible(f"ended: `fedveil run`, process {process}"))
    console.print(ways_on(folder))


def _banner(job: Job, sites: int) -> str:
    """Return a run in one line: what is trained on what, by how many sites and rounds, under which promise."""
    config = job.config
    return (
        f"{config.method} on {config.model.name} and {config.data.name}: {counted(sites, 'site')}, "
        f"{counted(config.rounds, 'round')} of {counted(config.training.local_steps, 'step')}, "
        f"{job.mechanism.promise(config.privacy)}"
    )


def _progress_words(state: ProgressFile, seconds: float) -> str:
    if state.round_number is None:
        return f"{state.phase} ({seconds:.0f} s)"
    answered = names_text(sorted(state.answered, key=natural)) or "none yet"
    return (
        f"round {state.round_number}/{state.rounds}: {len(state.answered)} of {state.asked} sites "
        f"have answered ({answered}) ({seconds:.0f} s)"
    )


@app.command()
@_for_people
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
) -> None:
    """Load a run's adapter with stock PEFT and score it on the run's public test data."""
    check_adapter(folder / "adapter")
    from fedveil.experiments.evaluate import evaluate_run

    score = evaluate_run(folder)
    console.print(f"accuracy {100 * score.accuracy:.1f} %  loss {decimal_text(score.loss, 4)}")


@app.command()
@_for_people
def bundle(
    file: Annotated[Path | None, typer.Argument(help="A bundle as 'flwr build' writes it (.fab).")] = None,
) -> None:
    """Print the hash of the installed version's own bundle, or of a file, for ``bundles`` in a site's policy."""
    from fedveil.common.bundle import bundle_digest, own_digest
    from fedveil.deploy.files import read_bytes

    print(bundle_digest(read_bytes(file, "the bundle")) if file else own_digest())


if __name__ == "__main__":
    app()

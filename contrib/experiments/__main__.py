"""The commands of the experiments: ``python -m fedveil.contrib.experiments prune|recover|score|intruders|library``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedveil.cli.errors import Commands, for_people
from fedveil.common.words import UNKNOWN, counted, decimal_text, visible

if TYPE_CHECKING:
    from fedveil.common.model.score import Score

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@app.command()
@for_people
def prune(
    model: Annotated[str, typer.Argument(help="The large model, as model.name calls it.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the small one.")],
    groups: Annotated[int, typer.Option(help="Groups of heads that stay in each layer; 0: all.")] = 0,
    neurons: Annotated[int, typer.Option(help="Neurons that stay in each layer; 0: all.")] = 0,
    task: Annotated[str, typer.Option(help="Kind of task, as model.task.")] = "causal-lm",
    by: Annotated[
        Path | None,
        typer.Option(help="A run on the large model with server.rule 'loraprune', by whose scores to choose."),
    ] = None,
) -> None:
    """Write a base model with fewer heads and neurons, chosen on plain sentences or by a run, as a stock model."""
    from fedveil.contrib.experiments.pruning.prune import prune_model

    about = prune_model(model, target, groups, neurons, task, by)
    console.print(f"model: {target}, fingerprint {about.small_fingerprint}")
    console.print(f"of:    {about.large}, fingerprint {about.large_fingerprint}")


@app.command()
@for_people
def recover(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the adapter.")],
    pruned: Annotated[
        Path | None, typer.Option(help="The small model's folder, where it lies elsewhere than in the run.")
    ] = None,
) -> None:
    """Write the adapter of a run on a pruned model as stock PEFT loads it onto the large one."""
    from fedveil.contrib.experiments.pruning.recover import recover_run

    large = recover_run(folder, target, pruned)
    console.print(f"adapter: {target}, for {large}")
    console.print(f"score:   python -m fedveil.contrib.experiments score {folder} {target}")


@app.command()
@for_people
def score(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    recovered: Annotated[Path, typer.Argument(help="What `recover` made of it.")],
) -> None:
    """Score the large model on a run's public test data, as it is and with the recovered adapter."""
    from fedveil.contrib.experiments.pruning.recover import score_recovered

    def words(score: Score) -> str:
        return f"{score.name} {100 * score.accuracy:.1f} %  loss {decimal_text(score.loss, 4)}"

    alone, tuned = score_recovered(folder, recovered)
    console.print(f"large model:      {words(alone)}\nwith the adapter: {words(tuned)}")


@app.command()
@for_people
def intruders(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    top: Annotated[int, typer.Option(min=1, help="Largest singular vectors of each layer that are looked at.")] = 10,
    cosine: Annotated[float, typer.Option(help="A direction is an intruder if no old one is as near as this.")] = 0.5,
) -> None:
    """Count the intruder dimensions of a run's adapter, beside those of the run's noise alone, layer by layer."""
    from fedveil.contrib.experiments.intruders import intruders_of

    rows = intruders_of(folder, top, cosine)
    table = Table(title=f"intruders among the {top} largest singular vectors, cosine below {cosine:g}")
    for column in ("layer", "intruders", "of noise alone", f"σ {top} before", "σ 1 of the change", "above it after"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        of_noise = UNKNOWN if row.of_noise is None else str(row.of_noise)
        figures = (str(row.intruders), of_noise, f"{row.edge:.3g}", f"{row.largest:.3g}", str(row.above))
        table.add_row(Text(visible(row.layer)), *figures)
    console.print(table)
    total = f"{counted(sum(row.intruders for row in rows), 'intruder')} in {counted(len(rows), 'layer')}"
    noise = [row.of_noise for row in rows if row.of_noise is not None]
    beside = f"noise alone makes {sum(noise)}" if noise else f"nothing stands beside it: {rows[0].unknown}"
    console.print(Text(visible(f"{total}; {beside}")))


@app.command()
@for_people
def library(
    folder: Annotated[Path, typer.Argument(help="A new folder for runs, the library and results.json.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, after commas; empty: all seven.")] = "",
    records: Annotated[int, typer.Option(help="Training records of a task, over two sites.")] = 400,
    test: Annotated[int, typer.Option(help="Public test records of a task.")] = 60,
    rounds: Annotated[int, typer.Option(help="Of each task's run.")] = 6,
    epsilon: Annotated[float, typer.Option(help="Of each task's run; 0: without privacy.")] = 0.0,
) -> None:
    """Train a library of question tasks, and measure what a start at it is worth on each task left out."""
    from fedveil.contrib.experiments.library_tasks import TASKS, measure

    chosen = [name.strip() for name in tasks.split(",")] if tasks else list(TASKS)
    rows = measure(folder, chosen, records, test, rounds, epsilon, console.print)
    table = Table(title="loss before training, nats a token")
    for column in ("task", "zero", "best single", "mean", "described"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in rows:
        best = f"{row.best:.3f} {row.best_name}"
        table.add_row(row.task, f"{row.zero:.3f}", best, f"{row.mean:.3f}", f"{row.described:.3f}")
    console.print(table)


if __name__ == "__main__":
    app()

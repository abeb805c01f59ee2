"""``fedveil prune`` and ``recover``: a small base model to train on, and the adapter on the large one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import for_people

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def prune(
    model: Annotated[str, typer.Argument(help="The large model, as model.name calls it.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the small one.")],
    groups: Annotated[int, typer.Option(help="Groups of heads that stay in each layer; 0: all.")] = 0,
    neurons: Annotated[int, typer.Option(help="Neurons that stay in each layer; 0: all.")] = 0,
    task: Annotated[str, typer.Option(help="Kind of task, as model.task.")] = "causal-lm",
    by: Annotated[
        Path | None,
        typer.Option(help="A run on the large model with server.scores, whose scores choose in place of sentences."),
    ] = None,
) -> None:
    """Write a base model with fewer heads and neurons, chosen on plain sentences or by a run, as a stock model."""
    from experiments.pruning.prune import prune_model

    about = prune_model(model, target, groups, neurons, task, by)
    console.print(f"model: {target}, fingerprint {about.small_fingerprint}")
    console.print(f"of:    {about.large}, fingerprint {about.large_fingerprint}")


@for_people
def recover(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the adapter.")],
    pruned: Annotated[
        Path | None, typer.Option(help="The small model's folder, where it lies elsewhere than in the run.")
    ] = None,
) -> None:
    """Write the adapter of a run on a pruned model as stock PEFT loads it onto the large one."""
    from experiments.pruning.recover import recover_run

    large = recover_run(folder, target, pruned)
    console.print(f"adapter: {target}, for {large}")
    console.print(f"score:   fedveil evaluate {folder} --recovered {target}")

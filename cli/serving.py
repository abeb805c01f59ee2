"""``fedveil evaluate``, ``ask``, ``merge`` and ``export``: what becomes of a finished run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError
from fedveil.common.words import counted, decimal_text, percent_text

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'.")]


@for_people
def evaluate(folder: RunFolder) -> None:
    """Load a run's adapter with stock PEFT and score it on the run's public test data."""
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    from fedveil.experiments.evaluate import evaluate_run

    with console.status("loading the model and scoring"):
        score = evaluate_run(folder)
    console.print(f"accuracy {100 * score.accuracy:.1f} %  loss {decimal_text(score.loss, 4)}")


@for_people
def merge(
    folder: RunFolder,
    target: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    form: Annotated[
        str,
        typer.Option(help="merged; or seq-cls: PEFT's adapter with the head in it, of a run with head.pool 'stock'."),
    ] = "merged",
) -> None:
    """Merge a run's adapter into its base model and write both as stock libraries load them."""
    from fedveil.common.paths import check_adapter, check_vacant, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    check_vacant(target)
    from fedveil.experiments.serving.merge import merge_run

    with console.status("merging"):
        code = merge_run(folder, target, form)
    console.print(f"model: {target}\n\n{code}", end="")


@for_people
def export(
    folder: RunFolder,
    gguf: Annotated[Path, typer.Option(help="A new file for the adapter in llama.cpp's format.")],
) -> None:
    """Write a language model's adapter as one GGUF file, which llama.cpp takes with --lora."""
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    from fedveil.experiments.serving.gguf import export_gguf

    layers = export_gguf(folder, gguf)
    console.print(f"adapter: {gguf}, {counted(layers, 'layer')}")


@for_people
def ask(
    folder: RunFolder,
    words: Annotated[
        list[str],
        typer.Argument(help="A text (and its pair, where records have one), a prompt, or an image's path."),
    ],
) -> None:
    """Ask the model that a run ended with: labels with their probabilities, or a completion."""
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    if not all(word.strip() for word in words):
        raise ConfigError("a text is empty: write what to ask")
    from fedveil.experiments.serving.ask import ask_run

    with console.status("loading the model"):
        answers = list(ask_run(folder, words))
    for answer in answers:
        share = "" if answer.probability is None else f"{percent_text(answer.probability):>8}  "
        console.print(f"{share}{answer.text}")

"""``fedveil evaluate``, ``ask``, ``merge``, ``export`` and ``generate``: what becomes of a finished run's model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError, DataError, FedVeilError
from fedveil.common.words import counted, decimal_text, percent_text, visible

if TYPE_CHECKING:
    from fedveil.common.tasks import Answer

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'.")]


@for_people
def evaluate(
    folder: RunFolder,
    on: Annotated[
        str, typer.Option(help="Sets beside the run's own, after commas: names, or files with the run's columns.")
    ] = "",
    by: Annotated[str, typer.Option("--slice", help="A column of the files; scores are given by its values.")] = "",
) -> None:
    """Load a run's adapter with stock PEFT and score it on the run's public test data.

    With --on it is scored beside the model that the run began with, on each set: what was gained, forgotten, and moved.
    """
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    if by and not on:
        raise ConfigError("--slice is for --on: name files there that have the column")
    if on:
        _evaluate_on(folder, [name.strip() for name in on.split(",") if name.strip()], by)
        return
    from fedveil.experiments.evaluate import evaluate_run

    with console.status("loading the model and scoring"):
        score = evaluate_run(folder)
    beside = "".join(f"  {figure.name} {100 * figure.value:.1f} %" for figure in score.figures[1:])
    console.print(f"{score.name} {100 * score.accuracy:.1f} %{beside}  loss {decimal_text(score.loss, 4)}")


def _evaluate_on(folder: Path, sources: list[str], column: str) -> None:
    from fedveil.experiments.evaluate_on import evaluate_on
    from fedveil.reports import report_of
    from fedveil.reports.data import cares_of
    from fedveil.reports.evaluated import EvaluatedFile

    with console.status("loading the models and scoring"):
        found = evaluate_on(folder, sources, column)
    for text in cares_of(report_of(folder)):
        console.print(f"WARNING: {visible(text)}")
    for evaluation in found:
        for line in evaluation.lines():
            console.print(visible(line))
    console.print(f"written: {folder / EvaluatedFile.NAME}; scores of records that are not public have no noise")


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
    from fedveil.common.model.files import files_digest
    from fedveil.experiments.serving.merge import merge_run

    with console.status("merging"):
        code = merge_run(folder, target, form)
    console.print(f"model: {target}\nSHA-256 of its files: {files_digest(target)}\n\n{code}", end="")


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
def generate(
    folder: RunFolder,
    rows: Annotated[int, typer.Option(help="Rows of the table.")],
    out: Annotated[Path, typer.Option(help="A new file, .jsonl or .csv; its card, .md, is written beside it.")] = Path(
        "synthetic.jsonl"
    ),
    shares: Annotated[
        str, typer.Option(help="Values of the prompt's column with their shares, such as 'good=3,bad=1'; else even.")
    ] = "",
    temperature: Annotated[float, typer.Option(help="Below 1, likely words are drawn more often.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability of the likeliest words, which alone are drawn.")] = 0.95,
    new_tokens: Annotated[int, typer.Option(help="Tokens of one text; 0: as many as the run's records have.")] = 0,
    seed: Annotated[int | None, typer.Option(help="For tests; else the operating system's random numbers.")] = None,
) -> None:
    """Write a table of synthetic records with a language model's run, and a card; no record of a site is read."""
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    from fedveil.common.tasks.finished import Sampling
    from fedveil.experiments.serving.generate import Wanted, generate_table
    from fedveil.reports import report_of
    from fedveil.reports.table_card import NO_CLAIM, NOT_READ

    wanted = Wanted(rows, shares, Sampling(temperature, top_p, new_tokens), seed)
    with console.status("loading the model") as status:
        drawn = generate_table(folder, out, wanted, status.update)
    claim = report_of(folder).claim
    console.print(f"{out}, {out.with_suffix('.md')}: {visible(drawn.sentence)}")
    console.print(claim.sentence if claim.made else f"{NO_CLAIM} {claim.sentence}")
    console.print(NOT_READ)


@for_people
def ask(
    folder: RunFolder,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A text (and its pair, where records have one), a prompt, an image's or clip's path."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with a text on each line (and its pair, after a tab): the best answers.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Stay open, and answer each line that is typed.")
    ] = False,
) -> None:
    """Ask the model that a run ended with: labels with their probabilities, or a completion."""
    from fedveil.common.paths import check_adapter, given_run

    if sum((bool(words), file is not None, interactive)) != 1:
        raise ConfigError("what to ask is one of three: write a text, --file FILE or --interactive")
    folder = given_run(folder)
    check_adapter(folder / "adapter")
    lines = [words] if words else [line.split("\t") for line in _lines(file)] if file else []
    for number, line in enumerate(lines, 1):
        if not all(word.strip() for word in line):
            raise ConfigError(f"{f'{file}, line {number}' if file else 'a text'} is empty: write what to ask")
    from fedveil.experiments.serving.merge import load_finished

    with console.status("loading the model"):
        model = load_finished(folder)
        answers = model.answers(lines) if lines else []
    if file:
        for line, found in zip(lines, answers, strict=True):
            best = found[:1] if not model.task.scored.several else _chosen(found)
            typer.echo(f"{', '.join(map(_said, best))}\t{' '.join(line)}")  # rich would make blanks of the tab
    for answer in _chosen(answers[0]) if words else ():
        console.print(_said(answer))
    while interactive and (typed := _typed()):
        try:
            console.print("\n".join(map(_said, _chosen(model.answers([typed.split("\t")])[0]))))
        except FedVeilError as error:
            console.print(str(error))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: name a file with a text on each line") from error


def _typed() -> str:
    """Return the next line that is typed; empty at the end, or for an empty line."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _chosen(answers: list[Answer]) -> list[Answer]:
    """Return what is an answer or a part of it; of several labels that may be none."""
    from fedveil.common.tasks.finished import NO_LABEL

    return [answer for answer in answers if answer.chosen] or [NO_LABEL]


def _said(answer: Answer) -> str:
    share = "" if answer.probability is None else f"{percent_text(answer.probability):>8}  "
    return f"{share}{answer.text}"

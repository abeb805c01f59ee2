"""``fedveil judge``: how often a finished run of preferences prefers the better of two answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError
from fedveil.common.words import counted, percent_text, visible

if TYPE_CHECKING:
    from fedveil.common.model.score import Score

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
NAME = "preference"


@for_people
def judge(
    folder: Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'.")],
    pairs: Annotated[str, typer.Option(help="A file with the run's columns, or the name of a set of pairs.")],
) -> None:
    """Let a run of model.task 'preference' choose between the two answers of pairs that it was not trained on.

    A judge in text is shown each pair in both orders, and the figures of each are beside that of both.
    """
    from fedveil.common.paths import check_adapter, given_run

    folder = given_run(folder)
    check_adapter(folder / "adapter")
    with console.status("loading the model and scoring"):
        name, count, left_out, score = judged(folder, pairs)
    console.print(visible(f"{name}, {counted(count, 'pair')}: right {percent_text(score.accuracy)}"))
    for figure in score.figures[1:]:
        console.print(visible(f"  {figure.name}: {percent_text(figure.value)}"))
    if left_out:
        console.print(f"left out: {counted(left_out, 'pair')} with questions that the run's sites trained on")


def judged(run: Path, pairs: str) -> tuple[str, int, int, Score]:
    """Return the set's name, how many pairs are scored and how many left out, and the score.

    Raises:
        ConfigError: the run is of another task.
        DataError: the pairs cannot be read, or the run's sites trained on all of them.
    """
    from fedveil.common.model.device import choose_attention, choose_device
    from fedveil.common.model.scoring import score_records
    from fedveil.experiments.evaluate import PRECISIONS, load_result
    from fedveil.experiments.evaluate_on import set_of

    result = load_result(run / "adapter")
    about, task, base = result.about, result.task, result.base
    if about.task != NAME:
        raise ConfigError(f"the run is of model.task {about.task!r}, and a judge is of {NAME!r}: name another run")
    one = set_of(about, pairs, "")
    device = choose_device(str(about.settings.get("device", "auto")))
    choose_attention(base.module, device)
    records = task.prepare(base, one.data.examples, task.limit(base, about.max_length))
    score = score_records(result.module.to(device), task, base, records, device, PRECISIONS[about.precision])
    return one.name, len(records), one.left_out, score

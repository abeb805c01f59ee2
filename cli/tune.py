"""``fedveil tune``: a choice of settings that every site pays for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.errors import for_people
from common.ends import end_as_by_ctrl_c
from common.privacy.figures import epsilon_text

if TYPE_CHECKING:
    from experiments.tune import Tuned, Tuning

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def tune(
    file: Annotated[Path, typer.Argument(help="TOML file of trials: a base configuration, and a table for each.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the trials and their outcomes; in runs/tune if not said.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask once the total is printed.")] = False,
    server: Annotated[
        Path | None, typer.Option(help="A server's folder: the trials run on its sites, not on simulated ones.")
    ] = None,
    sites: Annotated[int, typer.Option(min=1, help="With --server: sites that must be online first.")] = 1,
    patience: Annotated[float, typer.Option(min=0, help="With --server: seconds to wait for them.")] = 300.0,
) -> None:
    """Print what all trials cost together, ask, run each with the same noise, charged in full, and name the best."""
    from common.words import visible
    from experiments.tune import conduct_trials, deployed, read_tuning, simulated, spent

    end_as_by_ctrl_c()
    tuning = read_tuning(file)
    output = output or Path("runs") / "tune" / tuning.name
    _print_price(tuning)
    if server:
        _say(
            f"A site refuses a trial that takes its ledger past ε {tuning.ledger_epsilon:g}, earlier runs included: "
            "ledger-epsilon in the file raises that, as far as its policy allows."
        )
    if not yes and not typer.confirm("Run them?"):
        console.print("nothing was run, and nothing is charged")
        return
    conduct = deployed(server, sites, patience, _say) if server else simulated(tuning, output)
    try:
        tuned = conduct_trials(tuning, output, conduct, _say)
    except BaseException:
        with suppress(OSError):  # of a terminal that is gone
            _say(f"folder: {output} (the same command goes on)")
        raise
    if not server:
        most = max(spent(output, tuning.delta).values())
        _say(f"charged to each ledger, at most: ε {epsilon_text(most)} at δ {tuning.delta:g}")
    _say(_ended(tuned, len(tuning.trials)))
    console.print(visible(f"report: {Path(tuned.best.folder) / 'report.html'}"))


def _print_price(tuning: Tuning) -> None:
    from common.words import visible
    from experiments.recipes import recipes_said
    from strategies.job import configure

    _say(recipes_said({trial.name: configure(trial.settings).config.recipe for trial in tuning.trials}))
    table = Table(title="trials, each charged in full")
    for column in ("trial", "its own settings", "ε alone"):
        table.add_column(column, justify="right" if column == "ε alone" else "left")
    for trial in tuning.trials:
        own = " ".join(f"{key}={value}" for key, value in trial.differs.items())
        table.add_row(Text(visible(trial.name)), Text(visible(own)), epsilon_text(trial.epsilon))
    console.print(table)
    _say(
        f"all {len(tuning.trials)} together: ε {epsilon_text(tuning.epsilon)} of {tuning.budget:g} at δ "
        f"{tuning.delta:g} per {tuning.unit}, with noise multiplier {tuning.noise_multiplier:.4g} in each. Every site "
        "is charged that, whichever is chosen: the server sees every trial, so no discount for publishing one holds."
    )


def _ended(tuned: Tuned, trials: int) -> str:
    from experiments.tune import score_words

    return (
        f"best by {tuned.by}: {tuned.best.trial}, {score_words(tuned.best)}. It is the best of {trials} on the same "
        "public records, so its score is flattered: measure it on others before it is quoted."
    )


def _say(line: str) -> None:
    from common.words import visible

    console.print(visible(line))

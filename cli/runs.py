"""``fedveil runs`` and ``stop``: simulated federations, listed and ended."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedveil.cli.errors import for_people
from fedveil.common.files import expanded
from fedveil.common.words import UNKNOWN, percent_text, visible

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def runs(output: Annotated[Path, typer.Argument(help="Folder of the runs.")] = Path("runs")) -> None:
    """List the runs of a folder, the latest at the end; which of them are under way."""
    from fedveil.common.paths import short_name
    from fedveil.experiments.runs import STARTING, UNDER_WAY, listed_runs
    from fedveil.privacy.figures import epsilon_text

    found = listed_runs(expanded(output))
    if not found:
        console.print(visible(f"no run in {output}: `fedveil run TABLE` starts one"))
        return
    year = f"{datetime.now(UTC).year}-"
    table = Table("run", "began, UTC", "state", "rounds", "accuracy", "ε", box=None, padding=(0, 1, 0, 0))
    table.columns[0].min_width = max(len(one.folder.name) for one in found)  # it is what commands take
    for one in found:
        score = percent_text(one.accuracy) + f" {one.judged_by}" * (one.judged_by != "accuracy")
        figures = (f"{one.rounds}/{one.planned}", score, epsilon_text(one.epsilon, absent=UNKNOWN))
        began = one.began[:16].replace("T", " ").removeprefix(year)
        row = (visible(one.folder.name), began, one.state, *figures)
        table.add_row(*map(Text, row), style="bold" if one.state in (STARTING, UNDER_WAY) else "")
    console.print(table)
    last = short_name(found[-1].folder.name, [one.folder.name for one in found])
    console.print(visible(f"commands take `latest`, or a run's first digits, too: `fedveil report {last}`"))


@for_people
def stop(
    run: Annotated[
        str, typer.Argument(help="A run's folder, its id or 'latest', or a server's folder for its last job.")
    ],
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

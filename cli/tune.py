"""``fedveil tune``: a choice between variants that every site pays for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.cli.errors import for_people
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.privacy.figures import epsilon_text

if TYPE_CHECKING:
    from fedveil.experiments.tune import Conduct


@for_people
def tune(
    file: Annotated[Path, typer.Argument(help="A sweep's file, with one seed and one ε: that of all together.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the trials; in runs/tune if not said.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask once the total is printed.")] = False,
    server: Annotated[
        Path | None, typer.Option(help="A server's folder: the trials run on its sites, not on simulated ones.")
    ] = None,
    sites: Annotated[int, typer.Option(min=1, help="With --server: sites that must be online first.")] = 1,
    ledger_epsilon: Annotated[
        float | None, typer.Option(min=0, help="With --server: ε that a ledger may hold, with what it held before.")
    ] = None,
) -> None:
    """Print what all variants cost together, ask, run each with the same noise, charged in full, and name the best."""
    from fedveil.experiments import tune as trials

    end_as_by_ctrl_c()
    tuning = trials.read_tuning(file)
    output = output or Path("runs") / "tune" / tuning.name
    for name, alone in tuning.alone.items():
        _say(f"{name}: ε {epsilon_text(alone)} alone")
    _say(
        f"all {len(tuning.trials)} together: ε {epsilon_text(tuning.epsilon)} of {tuning.budget:g} at δ "
        f"{tuning.delta:g}, with noise multiplier {tuning.noise_multiplier:.4g} in each. Every site is charged that, "
        "whichever is chosen: the server sees every trial, so no discount for publishing one holds."
    )
    conduct = _deployed(server, sites, ledger_epsilon) if server else trials.simulated(tuning, output)
    if not yes and not typer.confirm("Run them?"):
        _say("nothing was run, and nothing is charged")
        return
    try:
        best, charged = trials.tune(tuning, output, conduct, _say)
    except BaseException:
        with suppress(OSError):  # of a terminal that is gone
            _say(f"folder: {output} (the same command goes on)")
        raise
    _say(f"charged to each ledger, at most: ε {epsilon_text(charged)} at δ {tuning.delta:g}")
    _say(
        f"best is {best}. It is the best of {len(tuning.trials)} on the same public records, so its score is "
        "flattered: measure it on others before it is quoted."
    )
    _say(f"report: {best.folder / 'report.html'}")


def _deployed(server: Path, sites: int, ledger_epsilon: float | None) -> Conduct:
    """Return what submits a trial to a server's sites, whose own ledgers and policies decide."""
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.submit import submit
    from fedveil.experiments.tune import BUDGET

    folder = open_server(server)
    limit = {} if ledger_epsilon is None else {BUDGET: ledger_epsilon}
    # ``once``: a trial that ended before it was written down is not run, and paid, again.
    return lambda _, settings: submit(folder, {**settings, **limit}, _say, sites=sites, once=True)


def _say(line: str) -> None:
    from fedveil.common.words import visible

    print(visible(line), flush=True)

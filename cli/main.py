"""The ``fedveil`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from fedveil.cli.doctor import bundle, doctor
from fedveil.cli.errors import Commands
from fedveil.cli.import_ import import_
from fedveil.cli.ledger import ledger_app
from fedveil.cli.plan import plan
from fedveil.cli.report import keygen, report, verify, watch
from fedveil.cli.run import run
from fedveil.cli.runs import runs, stop
from fedveil.cli.server import server_app
from fedveil.cli.serving import ask, evaluate, export, generate, merge
from fedveil.cli.settings import settings
from fedveil.cli.site import site_app
from fedveil.cli.sweep import pictures, sweep, tune
from fedveil.common.rows import commands_beside

REAL_SITES = "Real sites"
AFTERWARDS = "Between runs"
PANELS = {
    "Train": (run, plan, runs, stop, settings, import_),
    "Look": (report, watch, evaluate, keygen, verify),
    "Use": (ask, merge, export, generate),
    REAL_SITES: (doctor, bundle),
    "Research": (sweep, tune, pictures),
}
GROUPS = {"server": (server_app, REAL_SITES), "site": (site_app, REAL_SITES), "ledger": (ledger_app, "Look")}
EXAMPLES = """
Examples:

fedveil plan reviews.csv --text review --label stars --sites 3

fedveil run reviews.csv --text review --label stars --sites 3 --epsilon 3

fedveil ask RUN_FOLDER "a warm and joyful film"

fedveil merge RUN_FOLDER model

fedveil report RUN_FOLDER
"""
app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXAMPLES
)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(command.__name__.rstrip("_"), rich_help_panel=panel)(command)
for name, (group, panel) in GROUPS.items():
    app.add_typer(group, name=name, rich_help_panel=panel)
for name, beside in commands_beside():
    if isinstance(beside, typer.Typer):
        app.add_typer(beside, name=name, rich_help_panel=AFTERWARDS)
    else:
        app.command(name, rich_help_panel=AFTERWARDS)(beside)


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


if __name__ == "__main__":
    app()

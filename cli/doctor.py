"""``fedveil doctor`` and ``bundle``: a folder of a server or a site, and the code that all of them run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError

if TYPE_CHECKING:
    from fedveil.cli.steps import Steps
    from fedveil.deploy.check_results import CheckResult


@for_people
def doctor(
    folder: Annotated[Path, typer.Argument(help="The server's or the site's folder.")],
    model: Annotated[
        str, typer.Option(help="Of a server: base model to show the fingerprint of; all-MiniLM-L6-v2 if not said.")
    ] = "",
    task: Annotated[str, typer.Option(help="Of a server: what it is used for; classification if not said.")] = "",
    health: Annotated[
        bool,
        typer.Option("--health", help="Ask only whether its programs run and answer, as probes do; half a second."),
    ] = False,
) -> None:
    """Examine a server's or a site's folder; exit code 1 if a check fails. A site asks its server and stays offline."""
    from fedveil.cli.steps import Steps

    failed = 0
    with Steps() as steps:
        for result in _health(folder) if health else _examination(folder, model, task, steps):
            failed += not result.ok
            steps.say(result.line())
    if failed:
        print(f"{failed} failed")
        raise typer.Exit(1)


def _health(folder: Path) -> Iterator[CheckResult]:
    from fedveil.deploy.health import examine_health

    return examine_health(folder)


def _examination(folder: Path, model: str, task: str, steps: Steps) -> Iterator[CheckResult]:
    from fedveil.deploy.doctor import examine_site
    from fedveil.deploy.server_checks import examine_server
    from fedveil.deploy.server_folder import is_server, open_server
    from fedveil.deploy.site_folder import open_site_folder

    if is_server(folder):
        return examine_server(open_server(folder), model or "all-MiniLM-L6-v2", task or "classification", steps)
    if model or task:
        raise ConfigError(f"--model and --task are of a server's folder, which {folder} is not: leave them out")
    return examine_site(open_site_folder(folder), steps)


@for_people
def bundle(
    file: Annotated[Path | None, typer.Argument(help="A bundle as 'flwr build' writes it (.fab).")] = None,
) -> None:
    """Print the hash of the installed version's own bundle, or of a file, for ``bundles`` in a site's policy."""
    from fedveil.common.bundle import bundle_digest, own_digest
    from fedveil.deploy.files import read_bytes

    print(bundle_digest(read_bytes(file, "the bundle")) if file else own_digest())

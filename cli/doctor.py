"""``fedveil doctor`` and ``bundle``: a folder of a server or a site, and the code that all of them run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError


@for_people
def doctor(
    folder: Annotated[Path, typer.Argument(help="The server's or the site's folder.")],
    model: Annotated[
        str, typer.Option(help="Of a server: base model to show the fingerprint of; all-MiniLM-L6-v2 if not said.")
    ] = "",
    task: Annotated[str, typer.Option(help="Of a server: what it is used for; classification if not said.")] = "",
) -> None:
    """Examine a server's or a site's folder; exit code 1 if a check fails. A site asks its server and stays offline."""
    from fedveil.deploy.doctor import examine_site
    from fedveil.deploy.server_checks import examine_server
    from fedveil.deploy.server_folder import is_server, open_server
    from fedveil.deploy.site_folder import open_site_folder

    if is_server(folder):
        results = examine_server(open_server(folder), model or "all-MiniLM-L6-v2", task or "classification")
    elif model or task:
        raise ConfigError(f"--model and --task are of a server's folder, which {folder} is not: leave them out")
    else:
        results = examine_site(open_site_folder(folder))
    failed = 0
    for result in results:
        failed += not result.ok
        print(result.line(), flush=True)
    if failed:
        print(f"{failed} failed")
        raise typer.Exit(1)


@for_people
def bundle(
    file: Annotated[Path | None, typer.Argument(help="A bundle as 'flwr build' writes it (.fab).")] = None,
) -> None:
    """Print the hash of the installed version's own bundle, or of a file, for ``bundles`` in a site's policy."""
    from fedveil.common.bundle import bundle_digest, own_digest
    from fedveil.deploy.files import read_bytes

    print(bundle_digest(read_bytes(file, "the bundle")) if file else own_digest())

"""``fedveil server``: the coordinator's keys, sites and jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.cli.errors import Commands, for_people

if TYPE_CHECKING:
    from fedveil.deploy.server_folder import ServerFolder
    from fedveil.strategies.job import Job

server_app = typer.Typer(cls=Commands, no_args_is_help=True, help="The coordinator's side: keys, sites, jobs.")
Folder = Annotated[Path, typer.Argument(help="The server's folder.")]
Authority = Annotated[
    Path | None, typer.Option(help="Folder of the certificate authority; by default FOLDER-authority.")
]


@server_app.command("init")
@for_people
def server_init(
    folder: Folder,
    name: Annotated[list[str], typer.Option(help="Host name or address that sites dial; may be given again.")],
    authority: Authority = None,
    fleet_port: Annotated[int, typer.Option(help="Port for sites.")] = 9092,
    control_host: Annotated[str, typer.Option(help="Address of the Control API; keep it local.")] = "127.0.0.1",
    control_port: Annotated[int, typer.Option(help="Port of the Control API.")] = 8000,
) -> None:
    """Make a server's folder: certificate authority, certificate, Flower's connection, service unit."""
    from fedveil.deploy.certificates import fingerprint, read_certificate
    from fedveil.deploy.server_folder import make_server
    from fedveil.deploy.units import server_steps, server_unit

    made = make_server(
        folder,
        name,
        authority=authority,
        control_host=control_host,
        control_port=control_port,
        fleet_port=fleet_port,
        unit=server_unit(folder, authority),
    )
    authority_certificate = read_certificate((made.path / "ca.crt").read_bytes(), "the authority")
    _say(server_steps(made, fingerprint(authority_certificate), authority))


@server_app.command("renew")
@for_people
def server_renew(folder: Folder, authority: Authority = None) -> None:
    """Issue a new certificate and key for the server; sites need nothing new. Restart the server afterwards."""
    from fedveil.deploy.server_folder import open_server, renew_server

    renew_server(open_server(folder), authority)
    _say("the server has a new certificate; restart it to use it")


@server_app.command("start")
@for_people
def server_start(folder: Folder) -> None:
    """Run the SuperLink and its runner in the foreground, as the service unit does."""
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.start import start_server

    start_server(open_server(folder), _say)


@server_app.command("register")
@for_people
def server_register(
    folder: Folder, key: Annotated[Path, typer.Argument(help="The site's node.pub; its comment is the site's name.")]
) -> None:
    """Let a site in. The server must be running."""
    from fedveil.deploy.registry import register_site
    from fedveil.deploy.server_folder import open_server

    _say(register_site(open_server(folder), key))


@server_app.command("revoke")
@for_people
def server_revoke(folder: Folder, site: Annotated[str, typer.Argument(help="The site's name.")]) -> None:
    """Shut a site out, from its next call on. The server must be running."""
    from fedveil.deploy.registry import revoke_site
    from fedveil.deploy.server_folder import open_server

    _say(revoke_site(open_server(folder), site))


@server_app.command("submit")
@for_people
def server_submit(
    folder: Folder,
    config: Annotated[list[str] | None, typer.Option("-c", "--config", help="Settings, as in 'fedveil run'.")] = None,
    sites: Annotated[int, typer.Option(min=1, help="Sites that must be online first.")] = 1,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for them.")] = 300.0,
    once: Annotated[bool, typer.Option(help="Do not run a job again that ended well with the same settings.")] = False,
) -> None:
    """Run a job on the sites, follow it to its end, and say by the exit code how it ended."""
    from fedveil.cli.steps import Steps
    from fedveil.cli.summary import print_summary
    from fedveil.common.config.text import parse_settings
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.submit import submit
    from fedveil.experiments.hub_sources import fetched

    server = open_server(folder)
    with Steps() as steps:
        steps("reading the settings")
        settings, ahead = fetched(parse_settings(config or [])), _ahead(server, sites)
        run = submit(server, settings, steps.say, sites=sites, patience=patience, once=once, ahead=ahead, step=steps)
    print_summary(run)


def _ahead(folder: ServerFolder, sites: int) -> Callable[[Job], list[str]]:
    """Return what says of a job what its plan warns of, for the sites that it names, or that are registered."""
    from fedveil.experiments.planner.ahead import warnings_ahead
    from fedveil.server.registered import names_in

    def warnings(job: Job) -> list[str]:
        config = job.config
        count = len(config.site_names) or max(sites, config.min_sites, len(names_in(folder.nodes)))
        return warnings_ahead(job, count, config.data.records)

    return warnings


def _say(line: str) -> None:
    print(line, flush=True)

"""``fedveil server``, ``fedveil site`` and ``fedveil doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from fedveil.cli.column_options import with_columns
from fedveil.cli.errors import Commands, for_people
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.deploy.check_results import CheckResult

server_app = typer.Typer(cls=Commands, no_args_is_help=True, help="The coordinator's side: keys, sites, jobs.")
site_app = typer.Typer(cls=Commands, no_args_is_help=True, help="A site's side: keys, policy, the node.")
doctor_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Look a server's or a site's folder over; exit code 1 if anything fails."
)

EPSILON, DELTA = 8.0, 1e-5
"""The budget of a new policy for which none is named."""
Labels = Annotated[
    str,
    typer.Option(
        help="All labels in the job's order, as data.labels: commas between them, quotes around one that has some."
    ),
]
MaxLength = Annotated[int, typer.Option(help="Most tokens that a job may cut a record to.")]
Fingerprint = Annotated[
    str, typer.Option(help="Its fingerprint and its files' hash, FINGERPRINT+FILES, from the coordinator.")
]
Folder = Annotated[Path, typer.Argument(help="The server's or the site's folder.")]


def _say(line: str) -> None:
    print(line, flush=True)


@server_app.command("init")
@for_people
def server_init(
    folder: Folder,
    name: Annotated[list[str], typer.Option(help="Host name or address that sites dial; may be given again.")],
    authority: Annotated[
        Path | None, typer.Option(help="Folder of the certificate authority; by default FOLDER-authority.")
    ] = None,
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
def server_renew(
    folder: Folder,
    authority: Annotated[
        Path | None, typer.Option(help="Folder of the certificate authority; by default FOLDER-authority.")
    ] = None,
) -> None:
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
    config: Annotated[list[str] | None, typer.Option("-c", "--config", help="Settings, as of 'fedveil run'.")] = None,
    sites: Annotated[int, typer.Option(min=1, help="Sites that must be online first.")] = 1,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for them.")] = 300.0,
    once: Annotated[bool, typer.Option(help="Do not run a job again that ended well with the same settings.")] = False,
) -> None:
    """Run a job on the sites, follow it to its end, and say by the exit code how it ended."""
    from fedveil.cli.report import print_summary
    from fedveil.common.config.text import parse_settings
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.submit import submit

    run = submit(open_server(folder), parse_settings(config or []), _say, sites=sites, patience=patience, once=once)
    print_summary(run)


@server_app.command("stop")
@for_people
def server_stop(folder: Folder) -> None:
    """End the run of the last job. What its sites have paid stays paid, and 'resume' goes on after its last round."""
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.submit import stop_job

    _say(stop_job(open_server(folder)))


@site_app.command("init")
@for_people
@with_columns
def site_init(
    folder: Folder,
    server: Annotated[str, typer.Option(help="HOST or HOST:PORT of the server.")],
    name: Annotated[str, typer.Option(help="The site's name in reports; default: the folder's name.")] = "",
    ca: Annotated[
        Path | None, typer.Option(help="ca.crt from the coordinator; may be put into the folder later.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File or folder with the site's records.")] = None,
    public_size: Annotated[int, typer.Option(help="Number of records, or persons, that you declare as public.")] = 0,
    person: Annotated[
        str, typer.Option(help="Column of whose a record is: persons are protected, each with all their records.")
    ] = "",
    epsilon: Annotated[float, typer.Option(help="Budget of the data set, over all runs.")] = EPSILON,
    delta: Annotated[float, typer.Option(help="Below one over the number of records.")] = DELTA,
    node: Annotated[str, typer.Option(help="More node settings, such as 'partition-id=0 num-partitions=2'.")] = "",
    task: Annotated[str, typer.Option(help="What the records are for, as the setting model.task.")] = "classification",
    *,
    columns: dict[str, str],
    labels: Labels = "",
    max_length: MaxLength = 128,
    model: Annotated[
        str, typer.Option(help="Base model that the doctor checks and the policy allows.")
    ] = "all-MiniLM-L6-v2",
    fingerprint: Fingerprint = "",
    runtime_port: Annotated[
        int, typer.Option(help="Loopback port for Flower's own processes; 0: a free one at each start.")
    ] = 0,
) -> None:
    """Make a site's folder: key pair, policy file, service unit."""
    from fedveil.deploy.commands import node_config
    from fedveil.deploy.policy_file import models_of, pins_of, policy_text
    from fedveil.deploy.site_folder import make_site
    from fedveil.deploy.units import site_steps, site_unit

    if data is not None:
        if public_size < 1:
            raise ConfigError("--public-size is needed beside --data: a whole number that you declare as public")
        data = expanded(data).absolute()
        if not data.exists():
            raise ConfigError(f"--data: there is nothing at {data}")
        node = f"{node_config({'data': str(data)})} {node}".strip()
    site = name or expanded(folder).absolute().name
    # A part of a public data set needs no pins, and then nobody may know its labels here.
    pins = pins_of(task, columns, labels, max_length) if data or columns or labels else {}
    made = make_site(
        folder,
        site,
        server,
        policy=policy_text(site, public_size, epsilon, delta, pins, models_of(model, fingerprint), person=person),
        node=node,
        authority=ca,
        runtime_port=runtime_port,
        model=model,
        task=task,
        fingerprint=fingerprint,
        unit=site_unit(folder, site),
    )
    _say(site_steps(made))


@site_app.command("check")
@for_people
def site_check(
    folder: Folder,
    node: Annotated[str, typer.Option(help="Node settings that win over the folder's.")] = "",
) -> None:
    """Read the site's records as a round does, and list the rows that are none, by number and reason."""
    from fedveil.deploy.site_check import check_site
    from fedveil.deploy.site_folder import open_site_folder

    check_site(open_site_folder(folder), _say, node)


@site_app.command("pin")
@for_people
@with_columns
def site_pin(
    folder: Annotated[Path, typer.Argument(help="The site's folder, or a policy file, which is made if need be.")],
    task: Annotated[str, typer.Option(help="What the records are for, as model.task; at first, classification.")] = "",
    *,
    columns: dict[str, str],
    labels: Labels = "",
    max_length: Annotated[int, typer.Option(min=0, help="Most tokens of a record; at first, 128.")] = 0,
    epsilon: Annotated[float, typer.Option(min=0, help="Budget of the data set, over all runs; at first, 8.")] = 0.0,
    delta: Annotated[float, typer.Option(min=0, help="Below one over the number of records; at first, 1e-05.")] = 0.0,
    model: Annotated[str, typer.Option(help="Base model to allow, by --fingerprint; the file's others stay.")] = "",
    fingerprint: Fingerprint = "",
) -> None:
    """Write into the site's policy what its records are for; any job that asks for something else is refused.

    What is left out stays as it is in the file.
    """
    from fedveil.client.pins import spoken
    from fedveil.client.policy import load_policy
    from fedveil.deploy.pin import MODELS, changed_models, changed_pins, pin

    path = expanded(folder).absolute()
    path = path / "policy.toml" if path.is_dir() else path
    made = not path.exists()
    budget = {"epsilon": epsilon or EPSILON * made, "delta": delta or DELTA * made}
    budget = {key: value for key, value in budget.items() if value}
    if bool(model) != bool(fingerprint):
        raise ConfigError("--model and --fingerprint name one base model: give both, or neither")
    models = {MODELS: changed_models(path, model, fingerprint)} if model else {}
    pin(path, changed_pins(path, task, columns, labels, max_length), {**budget, **models})
    policy = load_policy(path)
    if made:
        _say(f"made a new policy, with a budget of ε ≤ {policy.epsilon:g} at δ = {policy.delta:g}: {path}")
    _say(f"{path} pins {spoken(policy)}; the next round holds it")


@site_app.command("peers")
@for_people
def site_peers(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(help="identity.toml of each other site, handed over by its steward.")],
) -> None:
    """Make the roster of this site's secure sums from all sites' signing keys, and print its hash to compare."""
    from fedveil.deploy.peers import PEERS, make_roster
    from fedveil.deploy.site_folder import open_site_folder

    roster = make_roster(open_site_folder(folder), others)
    _say(f"peers.toml has {', '.join(roster.keys)}; its hash, which every steward must see: {roster.digest}")
    _say("once all have read it to each other, let the site join by the policy:")
    _say(f'  honest-sites = ...\n  epsilon-alone = ...\n  peers = "{PEERS}"\n  peers-hash = "{roster.digest}"')


@site_app.command("withdraw")
@for_people
def site_withdraw(
    folder: Folder,
    reason: Annotated[str, typer.Option(help="Why; it stays in the ledger, and does not leave the site.")],
    node: Annotated[str, typer.Option(help="Node settings that win over the folder's.")] = "",
) -> None:
    """Stop this site's records for good, under any name. No command takes it back, and what was sent stays sent."""
    from fedveil.deploy.site_folder import open_site_folder
    from fedveil.deploy.withdraw import withdraw_site

    withdraw_site(open_site_folder(folder), reason, _say, node)


@site_app.command("start")
@for_people
def site_start(
    folder: Folder,
    node: Annotated[str, typer.Option(help="Node settings that win over the folder's.")] = "",
) -> None:
    """Wait until the server lets this site in, then run its node in the foreground, as the service unit does."""
    from fedveil.deploy.site_folder import open_site_folder
    from fedveil.deploy.start import start_site

    start_site(open_site_folder(folder), _say, node)


@doctor_app.command("server")
@for_people
def doctor_server(
    folder: Folder,
    model: Annotated[str, typer.Option(help="Base model to show the fingerprint of.")] = "all-MiniLM-L6-v2",
    task: Annotated[str, typer.Option(help="What it is used for, as the setting model.task.")] = "classification",
) -> None:
    """Look a server's folder over."""
    from fedveil.deploy.doctor import examine_server
    from fedveil.deploy.server_folder import open_server

    _report(examine_server(open_server(folder), model, task))


@doctor_app.command("site")
@for_people
def doctor_site(folder: Folder) -> None:
    """Look a site's folder over; asks the server, and does not go online."""
    from fedveil.deploy.doctor import examine_site
    from fedveil.deploy.site_folder import open_site_folder

    _report(examine_site(open_site_folder(folder)))


def _report(findings: Iterable[CheckResult]) -> None:
    failed = 0
    for finding in findings:
        failed += not finding.ok
        _say(finding.line())
    if failed:
        _say(f"{failed} failed")
        raise typer.Exit(1)

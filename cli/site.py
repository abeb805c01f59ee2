"""``fedveil site``: a site's keys, policy and node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.cli.column_options import with_columns
from fedveil.cli.errors import Commands, for_people
from fedveil.cli.table_options import labels_said
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded

site_app = typer.Typer(cls=Commands, no_args_is_help=True, help="A site's side: keys, policy, the node.")
EPSILON, DELTA = 8.0, 1e-5
"""The budget of a new policy for which none is named."""
Labels = Annotated[
    list[str] | None,
    typer.Option(
        help="All labels in the job's order, as data.labels: commas between them, quotes around one that has some; or "
        "the option once for each label, as it stands."
    ),
]
MaxLength = Annotated[int, typer.Option(help="Most tokens that a job may cut a record to.")]
Fingerprint = Annotated[
    str, typer.Option(help="Its fingerprint and its files' hash, FINGERPRINT+FILES, from the coordinator.")
]
Folder = Annotated[Path, typer.Argument(help="The site's folder.")]
Node = Annotated[str, typer.Option(help="Node settings that win over the folder's.")]


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
    columns: dict[str, Scalar],
    labels: Labels = None,
    max_length: MaxLength = 128,
    model: Annotated[
        str, typer.Option(help="Base model that the doctor checks and the policy allows; hub:NAME is fetched now.")
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
    from fedveil.experiments.hub_sources import fetched

    model = str(fetched({"model.name": model})["model.name"])
    if data is not None:
        if public_size < 1:
            raise ConfigError("--public-size is needed beside --data: a whole number that you declare as public")
        data = expanded(data).absolute()
        if not data.exists():
            raise ConfigError(f"--data: there is nothing at {data}")
        node = f"{node_config({'data': str(data)})} {node}".strip()
    site = name or expanded(folder).absolute().name
    # A part of a public data set needs no pins, and then nobody may know its labels here.
    pins = pins_of(task, columns, labels_said(labels), max_length) if data or columns or labels else {}
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
def site_check(folder: Folder, node: Node = "") -> None:
    """Read the site's records as a round does, and list the rows that are none, by number and reason."""
    from fedveil.cli.steps import Steps
    from fedveil.deploy.site_check import check_site
    from fedveil.deploy.site_folder import open_site_folder

    with Steps() as steps:
        steps("reading the policy")
        check_site(open_site_folder(folder), steps.say, node, step=steps)


@site_app.command("pin")
@for_people
@with_columns
def site_pin(
    folder: Annotated[Path, typer.Argument(help="The site's folder, or a policy file, which is made if need be.")],
    task: Annotated[str, typer.Option(help="What the records are for, as model.task; at first, classification.")] = "",
    *,
    columns: dict[str, Scalar],
    labels: Labels = None,
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
    from fedveil.client.policy_file import load_policy
    from fedveil.deploy.pin import MODELS, changed_models, changed_pins, pin

    path = expanded(folder).absolute()
    path = path / "policy.toml" if path.is_dir() else path
    made = not path.exists()
    budget = {"epsilon": epsilon or EPSILON * made, "delta": delta or DELTA * made}
    budget = {key: value for key, value in budget.items() if value}
    if bool(model) != bool(fingerprint):
        raise ConfigError("--model and --fingerprint name one base model: give both, or neither")
    models = {MODELS: changed_models(path, model, fingerprint)} if model else {}
    pin(path, changed_pins(path, task, columns, labels_said(labels), max_length), {**budget, **models})
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


@site_app.command("evaluate")
@for_people
def site_evaluate(
    folder: Folder,
    run: Annotated[
        list[Path] | None, typer.Option(help="The folder of a run that was handed over; once for each.")
    ] = None,
    by: Annotated[str, typer.Option("--slice", help="A column; scores are given for each of its values, too.")] = "",
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Train a model here alone at the run's noise, too; the same budget pays for it."),
    ] = False,
    node: Node = "",
) -> None:
    """Score base, kept states and final models on the site's held-out rows. Nothing of it leaves the site.

    No task is answered meanwhile. The scores have no noise: no ε covers what you tell others of them.
    """
    from fedveil.deploy.site_folder import open_site_folder
    from fedveil.experiments.site_evaluate import evaluate_site

    scores, path = evaluate_site(open_site_folder(folder), [expanded(one) for one in run or ()], by, node, alone=alone)
    for line in scores.lines():
        _say(line)
    _say(f"written: {path}; no ε covers what is told of it")


@site_app.command("withdraw")
@for_people
def site_withdraw(
    folder: Folder,
    reason: Annotated[str, typer.Option(help="Why; it stays in the ledger, and does not leave the site.")],
    node: Node = "",
) -> None:
    """Stop this site's records for good, under any name. No command takes it back, and what was sent stays sent."""
    from fedveil.deploy.site_folder import open_site_folder
    from fedveil.deploy.withdraw import withdraw_site

    withdraw_site(open_site_folder(folder), reason, _say, node)


@site_app.command("start")
@for_people
def site_start(folder: Folder, node: Node = "") -> None:
    """Wait until the server lets this site in, then run its node in the foreground, as the service unit does."""
    from fedveil.deploy.site_folder import open_site_folder
    from fedveil.deploy.start import start_site

    start_site(open_site_folder(folder), _say, node)


def _say(line: str) -> None:
    print(line, flush=True)

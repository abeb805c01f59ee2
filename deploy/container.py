"""The parts of docker-compose.yml that are no command of ``fedveil``: making keys once, and letting sites in.

Run as ``python -m fedveil.deploy.container keys | job``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar
    from fedveil.strategies.job import Job

FOLDER, PKI = Path("/federation"), Path("/pki")
FLEET_PORT, CONTROL_PORT = 9092, 8000
SERVER, CONTROL = "superlink", "control"
"""Host names on the sites' networks and on the coordinator's network."""
PATIENCE = 600
"""Seconds for which a job waits for its sites."""


def make_keys(
    sites: int,
    epsilon: float,
    delta: float,
    pki: Path = PKI,
    *,
    settings: str = "",
    fingerprint: str = "",
    mechanisms: str = "",
    honest: int = 0,
    alone: float = 0.0,
) -> None:
    """Make every missing part: authority, server, sites, and the coordinator's view without any key.

    Each site gets its part of a job's data for good, and refuses a job that divides otherwise: ledgers would count for
    other sites' records. A site beyond the first number has no part.

    Args:
        sites: number of sites that get a key pair.
        epsilon, delta: budget in each new site's policy.
        pki: where the volumes are mounted: ``authority``, ``server``, ``coordinator``, ``site-1``, ...
        settings, fingerprint: of the job, as ``fedveil run -c`` takes them, and of its base model unless that is known.
        mechanisms: allowed by new policies beside the job's own, with commas; a trusted server must be named here.
        honest, alone: sites that each policy takes for honest, and its ``epsilon-alone``; 0: no secure sums. The roster
            is of all sites, and is pinned in their policies: here one machine plays all stewards.

    Raises:
        FedVeilError: a volume is unusable, a policy cannot express the settings, or ``alone`` lacks ``honest``.
    """
    from fedveil.common.config.text import parse_settings
    from fedveil.common.data.partition import division_of
    from fedveil.common.errors import ConfigError
    from fedveil.deploy.server_folder import make_server
    from fedveil.strategies.job import configure

    if alone and not honest:
        raise ConfigError("SITE_EPSILON_ALONE needs SITE_HONEST_SITES: say how many sites the policies take for honest")
    job = configure(parse_settings([settings]))
    if not (pki / "server" / "server.toml").is_file():
        make_server(pki / "server", [SERVER], authority=pki / "authority", control_host=CONTROL)
        print("made the certificate authority and the server's certificate", flush=True)
    coordinator = pki / "coordinator"
    for place in ("runs", "nodes", "keys"):
        (coordinator / place).mkdir(exist_ok=True)
    for name in ("ca.crt", "server.toml"):
        _copy(pki / "server" / name, coordinator / name)
    parts, fixed = _handed_out(pki / "site-1", sites, division_of(job.config))
    for number in range(1, sites + 1):
        folder = pki / f"site-{number}"
        part = f"partition-id={number - 1} num-partitions={parts}{fixed}" if number <= parts else ""
        if not (folder / "site.toml").is_file():
            policy = _policy(job, folder.name, (epsilon, delta), fingerprint, mechanisms, (honest, alone))
            _make_site(folder, job, part, policy, fingerprint)
        _say_if_refused(folder, folder.name, job)
        if not part:
            print(
                f"{folder.name} has no part of the job's data, which are divided among {parts} sites: it needs "
                f"SITE_{number}_DATA; 'docker compose down --volumes' starts over",
                flush=True,
            )
        (folder / "ledger").mkdir(exist_ok=True)
        _copy(folder / "node.pub", coordinator / "keys" / f"{folder.name}.pub")
    if honest:
        _pin_rosters([pki / f"site-{number}" for number in range(1, sites + 1)])


def _policy(
    job: Job, site: str, budget: tuple[float, float], fingerprint: str, mechanisms: str, sums: tuple[int, float]
) -> str:
    """Return the text of a new site's policy for a job, with ε and δ, and with h and ε alone of secure sums."""
    from fedveil.deploy.peers import PEERS
    from fedveil.deploy.policy_file import mechanisms_of_job, models_of, pins_of_job, policy_text
    from fedveil.privacy.units import PERSON

    config = job.config
    named = [name.strip() for name in mechanisms.split(",") if name.strip()]
    # Until all keys are made there is no roster: a hash that none has lets no site into a sum.
    roster: dict[str, Scalar] = {"peers": PEERS, "peers-hash": "0" * 64}
    return policy_text(
        site,
        0,
        *budget,
        pins_of_job(job),
        models_of(config.model.name, fingerprint),
        list(dict.fromkeys([*mechanisms_of_job(config), *named])),
        config.data.person if config.privacy.unit == PERSON.name else "",
        {"honest-sites": sums[0], "epsilon-alone": sums[1], **roster} if sums[0] else {},
    )


def _make_site(folder: Path, job: Job, part: str, policy: str, fingerprint: str) -> None:
    from fedveil.deploy.site_folder import make_site

    model = job.config.model
    make_site(
        folder,
        folder.name,
        f"{SERVER}:{FLEET_PORT}",
        policy=policy,
        node=part,
        authority=folder.with_name("server") / "ca.crt",
        model=model.name,
        task=model.task,
        fingerprint=fingerprint,
    )
    print(f"made the key pair of {folder.name}", flush=True)


def _pin_rosters(sites: Sequence[Path]) -> None:
    """Make each site's roster, and pin its hash in the policies that join secure sums."""
    from fedveil.deploy.peers import ENTRY, make_roster
    from fedveil.deploy.pin import pin_roster
    from fedveil.deploy.site_folder import open_site_folder

    folders = [open_site_folder(site) for site in sites]
    for own in folders:
        roster = make_roster(own, [other.path / ENTRY for other in folders if other is not own])
        if _joins_sums(own.path / "policy.toml"):
            pin_roster(own.path / "policy.toml", roster.digest)


def _copy(source: Path, place: Path) -> None:
    """Replace a file by a copy, and a link as well, which may lead into a site's volume."""
    from fedveil.deploy.files import put_file, read_bytes

    put_file(place, read_bytes(source, "what the coordinator gets"), private=False)


def _joins_sums(policy: Path) -> bool:
    """Return whether a policy allows secure sums; the error of an invalid one has been printed."""
    from fedveil.client.policy_file import load_policy
    from fedveil.common.errors import ConfigError

    try:
        return load_policy(policy).honest_sites > 0
    except ConfigError:
        return False


def _say_if_refused(folder: Path, name: str, job: Job) -> None:
    """Print why a site will refuse this job, if it will: its policy was made for another, or does not let it in."""
    from fedveil.client.policy_file import load_policy
    from fedveil.common.errors import FedVeilError

    try:
        load_policy(folder / "policy.toml").check_job(job, private=False)
    except FedVeilError as error:
        change = f"docker compose run --rm --entrypoint fedveil keys site pin {folder} ..."
        print(f"{name} will refuse this job: {error}; '{change}' changes its policy, and its ledger stays", flush=True)


def _handed_out(first: Path, sites: int, division: str) -> tuple[int, str]:
    """Return the number of sites that divide a job's data, and how, as when the first was made."""
    from fedveil.deploy.site_folder import node_settings, open_site_folder

    if (first / "site.toml").is_file():
        node = node_settings(open_site_folder(first))
        sites, division = int(node.get("num-partitions", 0)), str(node.get("division", ""))
    return sites, f' division="{division}"' if division else ""


def job_command(sites: int, settings: str, folder: Path = FOLDER) -> list[str]:
    """Register the sites' keys and return the command that submits the job; a revoked key is printed and left out.

    Raises:
        ConfigError: all sites were shut out, or as for ``register_site``, like DataError and RunFailed.
    """
    from fedveil.common.errors import ConfigError
    from fedveil.deploy.commands import program
    from fedveil.deploy.registry import ShutOut, register_site
    from fedveil.deploy.server_folder import open_server

    server, shut_out = open_server(folder), set[str]()
    for key in sorted((folder / "keys").glob("site-*.pub")):
        try:
            print(register_site(server, key), flush=True)
        except ShutOut as error:
            shut_out.add(key.stem)
            print(f"{error}; the job goes on without it", flush=True)
    wanted = sites - len(shut_out & {f"site-{number}" for number in range(1, sites + 1)})
    if wanted < 1:
        raise ConfigError("every site was shut out: 'docker compose down --volumes' starts over")
    submit = [program("fedveil"), "server", "submit", str(folder), "--once"]
    return [*submit, "--sites", str(wanted), "--patience", str(PATIENCE), "-c", settings]


def _start_job() -> NoReturn:
    command = job_command(int(_number("SITES", 4, 1)), os.environ.get("FEDVEIL_SETTINGS", ""))
    os.execv(command[0], command)


def _said(do: Callable[[], None]) -> int:
    """Return the exit code of a part whose errors are printed for people."""
    from fedveil.common.errors import FedVeilError

    try:
        do()
    except (FedVeilError, OSError) as error:
        print(f"fedveil: {error}", file=sys.stderr)
        return 1
    return 0


def _make_keys_by_environment() -> None:
    make_keys(
        int(_number("SITES", 4, 1)),
        _number("SITE_EPSILON", 8.0),
        _number("SITE_DELTA", 1e-5),
        settings=os.environ.get("FEDVEIL_SETTINGS", ""),
        fingerprint=os.environ.get("MODEL_FINGERPRINT", ""),
        mechanisms=os.environ.get("SITE_MECHANISMS", ""),
        honest=int(_number("SITE_HONEST_SITES", 0, 0)),
        alone=_number("SITE_EPSILON_ALONE", 0.0),
    )


def _number(name: str, default: float, least: int | None = None) -> float:
    """Return a figure of the environment; with ``least`` it is a whole number that is no less."""
    from fedveil.common.errors import ConfigError

    text = os.environ.get(name, str(default))
    wanted = "a number" if least is None else f"a whole number of at least {least}"
    try:
        number = float(text)
    except ValueError:
        number, wanted, least = math.nan, "a number", 0
    if least is not None and not (number.is_integer() and number >= least):
        raise ConfigError(f"{name} is {text!r}: write {wanted}, or leave it out")
    return number


def main(role: str) -> int:
    """Play one role and return the exit code."""
    if role == "keys":
        return _said(_make_keys_by_environment)
    if role == "job":
        return _said(_start_job)
    print(f"unknown role {role!r}: keys or job", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]) if len(sys.argv) == 2 else 2)

"""The parts of docker-compose.yml that are no command of ``fedveil``: making keys once, letting sites in, and health.

Run as ``python -m fedveil.deploy.container keys | job | healthy-server | healthy-site``. Health is asked
for every few seconds, so its way imports the standard library alone.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from fedveil.common.config.sections import Scalar
    from fedveil.strategies.job import Job

FOLDER, PKI = Path("/federation"), Path("/pki")
FLEET_PORT, CONTROL_PORT = 9092, 8000
SERVER, CONTROL = "superlink", "control"
"""Host names on the sites' networks and on the coordinator's network."""
PATIENCE = 600
"""Seconds for which a job waits for its sites."""
ESTABLISHED = "01"
"""A TCP connection's state in /proc/net/tcp."""


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
    """Make whatever is not there yet: authority, server, sites, and the coordinator's view without any key.

    Each site gets its part of a job's data for good: another number of sites, or another division, later would
    divide the records anew, and ledgers would count for records that others hold. So what divides them is written
    into the sites' settings, and they refuse a job that divides otherwise. A site beyond the first number has no part.

    Args:
        sites: how many sites get a key pair.
        epsilon: budget in each site's policy.
        delta: the delta that it holds at.
        pki: where the volumes are mounted: ``authority``, ``server``, ``coordinator``, ``site-1``, ...
        settings: of the job, as ``fedveil run -c`` takes them: each new site's policy pins what it asks for, and its
            node how the data are divided.
        fingerprint: of the job's base model, needed unless FedVeil knows that by its hash.
        mechanisms: that each new site's policy allows beside what the job alone gets, names with commas between them:
            a trusted server is in no policy unless it stands here.
        honest: how many sites of the roster each policy takes for honest; 0: no site joins a secure sum. The roster is
            of all sites, made anew and put into their policies whenever keys are: here one machine is all stewards.
        alone: each policy's ``epsilon-alone``, needed with ``honest``.

    Raises:
        FedVeilError: a volume cannot be written, or holds half a folder; or the settings are no job's, or a policy
            cannot say what they ask for; or there is ``alone`` without ``honest``.
    """
    from fedveil.common.config.text import parse_settings
    from fedveil.common.data.partition import division_of
    from fedveil.common.errors import ConfigError
    from fedveil.deploy.peers import ENTRY, PEERS, make_roster
    from fedveil.deploy.pin import pin_roster
    from fedveil.deploy.policy_file import mechanisms_of_job, models_of, pins_of_job, policy_text
    from fedveil.deploy.server_folder import make_server
    from fedveil.deploy.site_folder import make_site, open_site_folder
    from fedveil.privacy.units import PERSON
    from fedveil.strategies.job import configure

    if alone and not honest:
        raise ConfigError("SITE_EPSILON_ALONE needs SITE_HONEST_SITES: say how many sites the policies take for honest")
    job = configure(parse_settings([settings]))
    model, privacy = job.config.model, job.config.privacy
    named = [name.strip() for name in mechanisms.split(",") if name.strip()]
    allowed = list(dict.fromkeys([*mechanisms_of_job(job.config), *named]))
    # Until all keys are made there is no roster: a hash that none has lets no site into a sum.
    sums: dict[str, Scalar] = (
        {"honest-sites": honest, "epsilon-alone": alone, "peers": PEERS, "peers-hash": "0" * 64} if honest else {}
    )
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
        folder, name = pki / f"site-{number}", f"site-{number}"
        part = f"partition-id={number - 1} num-partitions={parts}{fixed}" if number <= parts else ""
        if not (folder / "site.toml").is_file():
            make_site(
                folder,
                name,
                f"{SERVER}:{FLEET_PORT}",
                policy=policy_text(
                    name,
                    0,
                    epsilon,
                    delta,
                    pins_of_job(job.config),
                    models_of(model.name, fingerprint),
                    allowed,
                    job.config.data.person if privacy.unit == PERSON.name else "",
                    sums,
                ),
                node=part,
                authority=pki / "server" / "ca.crt",
                model=model.name,
                task=model.task,
                fingerprint=fingerprint,
            )
            print(f"made the key pair of {name}", flush=True)
        _say_if_refused(folder, name, job)
        if not part:
            print(
                f"{name} has no part of the job's data, which are divided among {parts} sites: it needs "
                f"SITE_{number}_DATA; 'docker compose down --volumes' starts over",
                flush=True,
            )
        (folder / "ledger").mkdir(exist_ok=True)
        _copy(folder / "node.pub", coordinator / "keys" / f"{name}.pub")
    folders = [open_site_folder(pki / f"site-{number}") for number in range(1, sites + 1)]
    for own in folders if honest else ():
        roster = make_roster(own, [other.path / ENTRY for other in folders if other is not own])
        policy = own.path / "policy.toml"
        if _joins_sums(policy):
            pin_roster(policy, roster.digest)


def _copy(source: Path, place: Path) -> None:
    """Put a file's copy in the place of what is there: of a link as well, which may lead into a site's volume."""
    from fedveil.deploy.files import put_file, read_bytes

    put_file(place, read_bytes(source, "what the coordinator gets"), private=False)


def _joins_sums(policy: Path) -> bool:
    """Whether a policy takes part in secure sums; one that is none takes part in nothing, which was said."""
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
        print(f"{name} will refuse this job: {error}; see 'fedveil site pin'", flush=True)


def _handed_out(first: Path, sites: int, division: str) -> tuple[int, str]:
    """Return among how many sites a job's data are divided, and how, as when the first was made."""
    from fedveil.deploy.site_folder import node_settings, open_site_folder

    if (first / "site.toml").is_file():
        node = node_settings(open_site_folder(first))
        sites, division = int(node.get("num-partitions", 0)), str(node.get("division", ""))
    return sites, f' division="{division}"' if division else ""


def job_command(sites: int, settings: str, folder: Path = FOLDER) -> list[str]:
    """Register the sites' public keys and return the command that submits the job to those that are let in.

    A key that was shut out is said and left out: it lies here at every start, and is no reason to stop the others.

    Args:
        sites: how many sites the job is for; those that were shut out are not waited for.
        settings: of the job, as ``fedveil run -c`` takes them.
        folder: the coordinator's.

    Raises:
        ConfigError: a key is none or another site's, or all sites were shut out.
        DataError: a file cannot be read.
        RunFailed: the server refused or did not answer.
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


def server_is_well(folder: Path = FOLDER) -> bool:
    """Whether both ports of the SuperLink answer with a certificate of the federation's authority."""
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    try:
        for host, port in (("localhost", FLEET_PORT), (CONTROL, CONTROL_PORT)):
            with socket.create_connection((host, port), timeout=5) as plain:
                context.wrap_socket(plain, server_hostname=host).close()
    except OSError as error:
        print(error)
        return False
    return True


def site_is_well(tables: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> bool:
    """Whether this site's node holds a connection to a Fleet port."""
    for table in tables:
        rows = table.read_text(encoding="ascii").splitlines()[1:] if table.is_file() else []
        for row in rows:
            remote, state = row.split()[2:4]
            if state == ESTABLISHED and int(remote.rpartition(":")[2], 16) == FLEET_PORT:
                return True
    print("no connection to the server")
    return False


def _start_job() -> NoReturn:
    command = job_command(_whole("SITES", 4, 1), os.environ.get("FEDVEIL_SETTINGS", ""))
    os.execv(command[0], command)


def _said(do: Callable[[], None]) -> int:
    """Return the exit code of a part whose errors are for people; those of the disk are as the machine says them."""
    from fedveil.common.errors import FedVeilError

    try:
        do()
    except (FedVeilError, OSError) as error:
        print(f"fedveil: {error}", file=sys.stderr)
        return 1
    return 0


def _make_keys_by_environment() -> None:
    make_keys(
        _whole("SITES", 4, 1),
        _number("SITE_EPSILON", 8.0),
        _number("SITE_DELTA", 1e-5),
        settings=os.environ.get("FEDVEIL_SETTINGS", ""),
        fingerprint=os.environ.get("MODEL_FINGERPRINT", ""),
        mechanisms=os.environ.get("SITE_MECHANISMS", ""),
        honest=_whole("SITE_HONEST_SITES", 0, 0),
        alone=_number("SITE_EPSILON_ALONE", 0.0),
    )


def _whole(name: str, default: int, least: int) -> int:
    number = _number(name, default)
    if not (number.is_integer() and number >= least):
        _refuse(name, f"a whole number of at least {least}")
    return int(number)


def _number(name: str, default: float) -> float:
    try:
        number = float(os.environ.get(name, default))
    except ValueError:
        _refuse(name, "a number")
    return number


def _refuse(name: str, wanted: str) -> NoReturn:
    from fedveil.common.errors import ConfigError

    raise ConfigError(f"{name} is {os.environ[name]!r}: write {wanted}, or leave it out")


def main(role: str) -> int:
    """Play one role and return the exit code."""
    if role == "healthy-server":
        return 0 if server_is_well() else 1
    if role == "healthy-site":
        return 0 if site_is_well() else 1
    if role == "keys":
        return _said(_make_keys_by_environment)
    if role == "job":
        return _said(_start_job)
    print(f"unknown role {role!r}: keys, job, healthy-server or healthy-site", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]) if len(sys.argv) == 2 else 2)

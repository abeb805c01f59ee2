"""A server's folder: what ``fedveil server init`` makes and everything else reads.

=================== ====================================================================
``server.toml``     names, addresses and places (see ServerFolder)
``ca.crt``          the authority's certificate: this goes to every site
``server.pem``      the server's certificate
``server.key``      its private key
``tasks.pem``       the key that signs the tasks of runs, and its certificate
``renewal.key``     both, while a renewal goes on or after one that was interrupted
``flwr/``           Flower's own folder (FLWR_HOME) with the connection ``fedveil``
``nodes/``          public keys of the sites, ``NAME.pub``
``groups.toml``     groups of sites that jobs may name, if the coordinator wrote any (``deploy.registry``)
``state/``          the SuperLink's database: registered sites and runs
``runs/``           one folder a run
=================== ====================================================================

The certificate authority, whose key is needed only to issue certificates, lies in a folder of its own beside this one:
``NAME-authority/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import read_settings_file, to_toml
from fedveil.common.errors import ConfigError, DataError, ProtocolError
from fedveil.common.files import expanded
from fedveil.common.messages.signed import tasks_key
from fedveil.common.ports import LARGEST, check_port, dialled
from fedveil.deploy.certificates import (
    Issued,
    alternative_names,
    belongs_to,
    is_issued_by,
    new_authority,
    new_server_certificate,
    new_task_certificate,
    read_certificate,
)
from fedveil.deploy.files import FOLDER_MODE, make_folder, put_file, read_bytes
from fedveil.server.signing import TASKS, read_tasks_key

Folder = TypeVar("Folder")

FLEET_PORT = 9092
CONTROL_PORT = 8000
CONNECTION, RENEWAL = "fedveil", "renewal.key"
"""Name of the server's connection in Flower's configuration, and of the file of an unfinished renewal."""
LOCAL_NAMES = ("localhost", "127.0.0.1")
"""Always in the certificate: the server's own programs dial these."""


@dataclass(frozen=True)
class ServerFolder:
    """A server's folder as ``server.toml`` describes it."""

    path: Path
    names: str
    """What sites dial, separated by commas."""
    fleet: str = f"0.0.0.0:{FLEET_PORT}"
    """Address of the Fleet API: the one port that sites need."""
    control_host: str = "127.0.0.1"
    """Address of the Control API. Any program that reaches it can run code at every site."""
    control_port: int = CONTROL_PORT

    @property
    def name_list(self) -> tuple[str, ...]:
        """The names in ``names``."""
        return tuple(name.strip() for name in self.names.split(",") if name.strip())

    @property
    def fleet_port(self) -> int:
        """Port of the Fleet API."""
        return int(self.fleet.rpartition(":")[2])

    @property
    def control(self) -> str:
        """Address of the Control API as it is dialled."""
        return dialled(self.control_host, self.control_port)

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.path / "flwr"

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.path / "state" / "superlink.db"

    @property
    def nodes(self) -> Path:
        """Public keys and node ids of the registered sites."""
        return self.path / "nodes"

    @property
    def runs(self) -> Path:
        """Where run folders are made."""
        return self.path / "runs"


def is_server(path: Path) -> bool:
    """Return whether a folder is one that ``fedveil server init`` made."""
    return (expanded(path) / "server.toml").is_file()


def open_server(path: Path) -> ServerFolder:
    """Return the folder that ``fedveil server init`` made; ConfigError if ``server.toml`` is missing or invalid."""
    folder = open_folder(ServerFolder, expanded(path).absolute(), "server.toml", "fedveil server init")
    port = folder.fleet.rpartition(":")[2]
    if not (is_number(port) and 0 < int(port) < 1 << 16):
        raise ConfigError(
            f"{folder.path / 'server.toml'}: fleet = {folder.fleet!r} has no port: write ADDRESS:PORT, such as "
            f"0.0.0.0:{FLEET_PORT}"
        )
    check_port(f"{folder.path / 'server.toml'}: control-port", folder.control_port)
    return folder


def is_number(port: str) -> bool:
    """Return whether a text may be a port: short and of ASCII digits, since Python reads other digits as well."""
    return port.isascii() and port.isdecimal() and len(port) <= len(str(LARGEST))


def open_folder(kind: type[Folder], path: Path, name: str, command: str) -> Folder:
    """Return a folder's description from its TOML file, whose keys are the fields of ``kind``."""
    if not (path / name).is_file():
        raise ConfigError(f"{path} has no {name}: make the folder with '{command}'")
    known = {field.name.replace("_", "-"): field for field in fields(kind) if field.name != "path"}  # type: ignore[arg-type]
    values: dict[str, Scalar] = read_settings_file(path / name)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path / name}: unknown key {key!r}{nearest(key, known)}")
        if type(value).__name__ != known[key].type:
            raise ConfigError(f"{path / name}: {key} must be of type {known[key].type}, not {value!r}")
    arguments: dict[str, Any] = {known[key].name: value for key, value in values.items()}
    try:
        return kind(**{"path": path, **arguments})
    except TypeError as error:
        raise ConfigError(f"{path / name} lacks a key: {error}") from error


def folder_toml(folder: Any) -> bytes:
    """Return the TOML file from which ``open_folder`` reads a folder's description."""
    keys = [field.name for field in fields(folder) if field.name != "path"]
    return to_toml({key.replace("_", "-"): getattr(folder, key) for key in keys}).encode()


def make_server(
    path: Path,
    names: Sequence[str],
    *,
    authority: Path | None = None,
    control_host: str = "127.0.0.1",
    control_port: int = CONTROL_PORT,
    fleet_port: int = FLEET_PORT,
    unit: Mapping[str, bytes] | None = None,
    now: datetime | None = None,
) -> ServerFolder:
    """Make a server's folder: authority, certificate, connection.

    Args:
        path, names, control_host, control_port, fleet_port: of the folder; it listens for sites on all addresses.
        authority: folder of the certificate authority, made if missing. Default: ``authority_beside(path)``.
        unit: a service unit that goes into it as well, by the file's name.
        now: when the certificate is issued, for SERVER_DAYS. Default: now.

    Raises:
        ConfigError: a name or a port is invalid, or the folder exists; nothing was changed.
        DataError: a folder cannot be written.
    """
    path = expanded(path).absolute()
    if is_server(path):
        raise ConfigError(f"{path} is a server's folder already and is not overwritten: name another folder")
    alternative_names(names)
    for what, port in (("fleet-port", fleet_port), ("control-port", control_port)):
        check_port(what, port)
    if fleet_port == control_port:
        raise ConfigError(f"fleet-port and control-port are both {fleet_port}: give each its own")
    folder = ServerFolder(path, ",".join(names), f"0.0.0.0:{fleet_port}", control_host, control_port)
    _make_private(path)  # before the authority's folder: one that is named may lie in it
    issuer = _authority(expanded(authority or authority_beside(path)).absolute())
    certificate = new_server_certificate(_certified(folder), issuer, now)
    files = {
        "ca.crt": issuer.certificate,
        "server.pem": certificate.certificate,
        "server.key": certificate.key,
        TASKS: _tasks(issuer, now),
        "flwr/config.toml": connection_toml(folder).encode(),
        **(unit or {}),
        "server.toml": folder_toml(folder),
    }
    make_folder(path, files, private=frozenset({"server.key", TASKS}))
    for place in (folder.database.parent, folder.runs, folder.nodes):
        place.mkdir(mode=FOLDER_MODE, exist_ok=True)
    return folder


def authority_beside(path: Path) -> Path:
    """Return the default folder of a server's authority: ``NAME-authority`` beside it, which no server reads."""
    return path.with_name(f"{path.name}-authority")


def _certified(folder: ServerFolder) -> list[str]:
    """Return the names and addresses that a server's certificate is for."""
    return list(dict.fromkeys([*folder.name_list, *LOCAL_NAMES, folder.control_host]))


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {path} ({error.strerror}): name a folder that you may write") from error


def connection_toml(folder: ServerFolder) -> str:
    """Return Flower's configuration file with the connection to this server's Control API."""
    connection: dict[str, Scalar] = {
        "address": folder.control,
        "root-certificates": str(folder.path / "ca.crt"),
    }
    return f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{to_toml(connection)}'


def renew_server(folder: ServerFolder, authority: Path | None = None) -> None:
    """Replace the server's certificate and key, and those of its tasks, by new ones; sites need nothing new.

    The server's pair is written to one file first, which ``finish_renewal`` puts in place, also after an interruption.

    Raises:
        DataError: the authority's folder is incomplete or not that of ``ca.crt``, or this one cannot be written.
            The certificates in use stay.
    """
    authority = expanded(authority or authority_beside(folder.path)).absolute()
    issuer = _read_authority(authority)
    made = new_server_certificate(_certified(folder), issuer)
    known = read_certificate(read_bytes(folder.path / "ca.crt", "the authority's certificate"), "the authority")
    if not is_issued_by(read_certificate(made.certificate, "the server"), known):
        raise DataError(f"{authority} is not the authority of {folder.path / 'ca.crt'}: name that one's folder")
    put_file(folder.path / TASKS, _tasks(issuer), private=True)
    put_file(folder.path / RENEWAL, made.key + made.certificate, private=True)
    finish_renewal(folder)


def finish_renewal(folder: ServerFolder) -> bool:
    """Put a pending certificate and its key in their places, and return whether there were any.

    Raises:
        DataError: the folder cannot be written, or the file with both is damaged.
    """
    pending = folder.path / RENEWAL
    if not pending.is_file():
        return False
    content = read_bytes(pending, "the renewed certificate")
    key, mark, rest = content.partition(b"-----BEGIN CERTIFICATE-----")
    if not belongs_to(read_certificate(mark + rest, "the server"), key):
        raise DataError(f"{pending} is damaged: remove it, and run 'fedveil server renew'")
    put_file(folder.path / "server.key", key, private=True)
    put_file(folder.path / "server.pem", mark + rest, private=False)
    try:
        pending.unlink()
    except OSError as error:
        raise DataError(f"cannot remove {pending} ({error.strerror})") from error
    return True


def _tasks(authority: Issued, now: datetime | None = None) -> bytes:
    """Return the file of a new key that signs tasks."""
    made = new_task_certificate(authority, now)
    return made.key + made.certificate


def check_tasks(path: Path) -> None:
    """Raise DataError unless sites accept the key of a server's folder as one that signs tasks."""
    key, encoded = read_tasks_key(path)
    authority = read_certificate(read_bytes(path / "ca.crt", "the authority's certificate"), "the authority")
    try:
        if tasks_key(encoded, authority).public_bytes_raw() != key.public:
            raise DataError(f"{TASKS} holds another key than its certificate's: renew both with 'fedveil server renew'")
    except ProtocolError as error:
        raise DataError(f"{TASKS}: {error}; renew it with 'fedveil server renew'") from error


def _authority(path: Path) -> Issued:
    if not (path / "ca.crt").exists():
        made = new_authority("FedVeil certificate authority")
        make_folder(path, {"ca.key": made.key, "ca.crt": made.certificate}, private=frozenset({"ca.key"}))
    return _read_authority(path)


def _read_authority(path: Path) -> Issued:
    return Issued(
        read_bytes(path / "ca.crt", "the authority's certificate"), read_bytes(path / "ca.key", "the authority's key")
    )

"""A site's folder: what ``fedveil site init`` makes and everything else reads.

================= ======================================================================
``site.toml``     the server's address, the node's settings and places (see SiteFolder)
``node.key``      the private key by which this site proves itself; never leaves the site
``node.pub``      its public half: this goes to the coordinator
``identity.key``  the private key by which other sites know this one in secure sums; never leaves the site
``identity.toml`` its public half, with the site's name: this goes to the other stewards, and not by the server
``peers.toml``    the roster of such sums, if ``fedveil site peers`` made one
``ca.crt``        the certificate authority's certificate, from the coordinator
``policy.toml``   what the data steward allows; the server can ask for less, never for more
``ledger/``       the privacy ledger, never restored; beside it ``states/`` that are kept and ``scores/``
================= ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedveil.client.ledger.file import only_ledger
from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.ports import check_port
from fedveil.deploy.certificates import read_certificate
from fedveil.deploy.files import make_folder, read_bytes
from fedveil.deploy.node_keys import is_pair, new_node_key
from fedveil.deploy.road import Road, road_to
from fedveil.deploy.server_folder import FLEET_PORT, folder_toml, is_number, open_folder
from fedveil.privacy.secure_sum import Identity
from fedveil.privacy.secure_sum.roster import SITE_NAME, entry

if TYPE_CHECKING:
    from fedveil.client.policy import Policy

ANY_PORT = 0
"""A free port at each start, so that sites of one machine do not clash."""


@dataclass(frozen=True)
class SiteFolder:
    """A site's folder as ``site.toml`` describes it."""

    path: Path
    site: str
    """Name in reports."""
    server: str
    """HOST:PORT of the server's Fleet API."""
    runtime_port: int = ANY_PORT
    """Port on this machine's loopback by which Flower's own processes talk; 0: a free one at each start."""
    model: str = "all-MiniLM-L6-v2"
    """Base model that ``fedveil doctor`` checks."""
    task: str = "classification"
    """What it is used for, as the setting ``model.task``."""
    fingerprint: str = ""
    """Its fingerprint, from the coordinator; empty: only shown."""
    https_proxy: str = field(default="", repr=False)
    """Proxy that the server is dialled through, ``http://HOST:PORT``; empty: that of the environment, if any."""
    no_proxy: str = ""
    """Names and networks that are dialled past it, separated by commas, beside those of the environment."""
    processes: int = 0
    """Programs that compute at the site, of one thread each; 0: one a core. Their number shows in no bit of a sum."""
    node: str = ""
    """The node's settings besides site, ledger and policy, as Flower takes them: ``data="..." public-size=2000``."""

    @property
    def host(self) -> str:
        """Host part of ``server``; of an address of IPv6 without its brackets, as it is dialled and certified."""
        return self.server.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        """Port part of ``server``."""
        return int(self.server.rpartition(":")[2])

    @property
    def road(self) -> Road:
        """How the server is dialled; ConfigError if a proxy's address is none, or its password can be read."""
        return road_to(self.host, self.path / "site.toml", self.https_proxy, self.no_proxy)

    @property
    def ledger(self) -> Path:
        """The privacy ledger: one, whatever the site is called; LedgerError if the folder holds several."""
        return only_ledger(self.path / "ledger")


def open_site_folder(path: Path) -> SiteFolder:
    """Return the folder that ``fedveil site init`` made.

    Raises:
        ConfigError: ``site.toml`` is missing, or has an unknown or ill-typed key, or an invalid server or port.
    """
    folder = open_folder(SiteFolder, expanded(path).absolute(), "site.toml", "fedveil site init")
    file, (host, _, port) = folder.path / "site.toml", folder.server.rpartition(":")
    if not (_is_host(host) and is_number(port)):
        raise ConfigError(f"{file}: server = {folder.server!r} has no port: write HOST:PORT, such as HOST:{FLEET_PORT}")
    check_port(f"{file}: the port of the server {folder.server!r}", folder.port)
    if folder.runtime_port != ANY_PORT:
        check_port(f"{file}: runtime-port", folder.runtime_port)
    if folder.processes < 0:
        raise ConfigError(f"{file}: processes is {folder.processes}: write a number from 1 on, or 0 for one a core")
    return folder


def _is_host(host: str) -> bool:
    """Whether a text can be dialled: it is not empty, and nothing in it would begin another line or word."""
    return bool(host) and host.isprintable() and " " not in host


def make_site(
    path: Path,
    site: str,
    server: str,
    *,
    policy: str,
    node: str = "",
    authority: Path | None = None,
    runtime_port: int = ANY_PORT,
    model: str = "all-MiniLM-L6-v2",
    task: str = "classification",
    fingerprint: str = "",
    unit: Mapping[str, bytes] | None = None,
) -> SiteFolder:
    """Make a site's folder: key pair, policy, description.

    Args:
        path, site, server, node, runtime_port, model, task, fingerprint: of the folder; ``server`` may lack its port.
        policy: text of the site's policy file.
        authority: the authority's certificate; None: it is copied to ``ca.crt`` later.
        unit: a service unit that goes into it as well, by the file's name.

    Raises:
        ConfigError: a setting is wrong, or the folder exists; nothing was changed.
        DataError: a file cannot be read or written.
    """
    path = expanded(path).absolute()
    if runtime_port != ANY_PORT:
        check_port("runtime-port", runtime_port)
    if not SITE_NAME.fullmatch(site):
        raise ConfigError(
            f"the site's name is {site!r}: take a letter or digit, then at most 63 of letters, digits, '.', '_' and '-'"
        )
    address = _with_port(server)
    if (path / "site.toml").exists():
        raise ConfigError(f"{path} is a site's folder already and is not overwritten: name another folder")
    folder = SiteFolder(path, site, address, runtime_port, model, task, fingerprint, node=node)
    node_settings(folder)
    files: dict[str, bytes] = {}
    if authority is not None:
        files["ca.crt"] = read_bytes(expanded(authority), "the authority's certificate")
        read_certificate(files["ca.crt"], "the authority")
    key, identity = new_node_key(site), Identity.new()
    files |= {
        "node.key": key.private,
        "node.pub": key.public,
        "identity.key": identity.pem(),
        "identity.toml": entry(site, identity.public).encode(),
        "policy.toml": policy.encode(),
        **(unit or {}),
        "site.toml": folder_toml(folder),
    }
    make_folder(path, files, private=frozenset({"node.key", "identity.key", "policy.toml", "site.toml"}))
    return folder


def _with_port(server: str) -> str:
    """Return a server's address as HOST:PORT; ConfigError if it is invalid."""
    host, _, port = server.rpartition(":") if ":" in server else (server, "", str(FLEET_PORT))
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"the server is {server!r}: write an address of IPv6 in brackets, as [ADDRESS]:PORT")
    if not _is_host(host) or not is_number(port):
        raise ConfigError(f"the server is {server!r}: write HOST or HOST:PORT")
    check_port(f"the port of the server {server!r}", int(port))
    return f"{host}:{port}"


def node_settings(folder: SiteFolder, more: str = "") -> dict[str, Scalar]:
    """Return the node's configuration: the folder's own, then ``node``, then ``more``.

    Raises:
        ConfigError: a key is unknown to a site.
        LedgerError: the folder holds several ledgers, and the settings name none.
    """
    from fedveil.client.node import NODE_KEYS  # imports torch: seconds that only this needs

    own = parse_settings([folder.node, more])
    settings: dict[str, Scalar] = {
        "site": folder.site,
        # Of several in the folder the steward names the one that goes on: then which is its one is not asked.
        "ledger": own["ledger"] if "ledger" in own else str(folder.ledger),
        "policy": str(folder.path / "policy.toml"),
        "identity": str(folder.path / "identity.key"),
    } | own
    for key in settings:
        if key not in NODE_KEYS:
            raise ConfigError(f"unknown node setting {key!r}{nearest(key, NODE_KEYS)}")
    return settings


def check_name(folder: SiteFolder, settings: Mapping[str, Scalar]) -> None:
    """Check that the node answers under the name that its key is registered by, and with that key.

    Under any other one it would train and pay for every round, and the server would drop its replies.

    Raises:
        ConfigError: node.pub has another name as its comment or none, or node.key does not belong to it.
        DataError: node.pub or node.key cannot be read, or is no key.
    """
    words = read_bytes(folder.path / "node.pub", "the site's public key").decode(errors="replace").split()
    named, own = " ".join(words[2:]), str(settings["site"])
    if named != own:
        raise ConfigError(
            f"this site answers as {own!r}, and its key in node.pub is named {named!r}: the server would drop every "
            "reply, each of them paid for; set 'site' to the key's name, or make a folder of that name"
        )
    if not is_pair(read_bytes(folder.path / "node.key", "the site's key"), " ".join(words).encode()):
        raise ConfigError(
            "node.pub is not node.key's: the server would know this site as another, and drop every reply, each of "
            "them paid for; put the right node.key back, or make a folder with a new pair by 'fedveil site init'"
        )


def policy_of_node(settings: Mapping[str, Scalar]) -> Policy:
    """Return the steward's policy, checked with the node's settings as every round will check them again.

    Raises:
        ConfigError: the policy is invalid, or not fit for the public size, or the settings name neither records nor
            a part of a job's data.
    """
    # Imports torch: seconds that only this needs.
    from fedveil.client.held_out import held_out_of
    from fedveil.client.kept_states import kept_states_of
    from fedveil.client.node import part_of, policy_of, public_size_of, rank_of

    policy = policy_of(settings)
    if size := public_size_of(settings, policy):
        policy.check_size(size)
    rank_of(settings)
    held_out_of(settings, policy)
    kept_states_of(settings)
    if "data" not in settings:
        part_of(settings)
    return policy


def check_pinned(folder: SiteFolder, settings: Mapping[str, Scalar]) -> Policy:
    """Return the steward's policy, once it says what the site's own records are for, and what they may cost.

    Raises:
        ConfigError: it does not; the message tells what to add. Or as for policy_of_node.
    """
    from fedveil.client.pins import unpinned
    from fedveil.client.policy import NO_BUDGET
    from fedveil.privacy import trusting_the_server

    policy = policy_of_node(settings)
    if "data" in settings and not policy.task:
        place = folder.path if settings["policy"] == str(folder.path / "policy.toml") else settings["policy"]
        raise ConfigError(unpinned(str(place), folder.task))
    charged = set(policy.allowed_mechanisms) - set(trusting_the_server())
    if "data" in settings and policy.lacks_budget and charged and not policy.allow_no_privacy:
        raise ConfigError(NO_BUDGET)
    return policy

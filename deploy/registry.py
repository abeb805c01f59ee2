"""The registry of sites that may join: public keys and node ids, at the SuperLink and in the server's folder.

Flower's answer and the folder's files are two steps, and a process may be killed between them. So Flower's word counts:
a key that it knows is looked up there, and a repeated command completes an interrupted one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fedveil.common.check import PLAIN_NAME, plain_names
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import replace_file, sync_folder
from fedveil.common.toml import read_toml
from fedveil.deploy.control import control_of
from fedveil.deploy.files import read_bytes
from fedveil.deploy.node_keys import public_pem
from fedveil.deploy.server_folder import ServerFolder
from fedveil.privacy.secure_sum.roster import SITE_NAME
from fedveil.server.named import unregistered
from fedveil.server.registered import names_in

GROUPS = "groups.toml"
"""File of a server's folder: names of groups, each with its sites, such as ``stroke = ["clinic", "ward"]``."""


class ShutOut(ConfigError):
    """A key was shut out: Flower keeps its row, and lets it in no more."""


def register_site(folder: ServerFolder, public_key: Path) -> str:
    """Register a site's key and return what to tell people.

    Raises:
        ShutOut: the key was shut out.
        ConfigError: the file is no public key with a site's name, or name or key is another site's.
        DataError, RunFailed: a file cannot be read; the server refused or did not answer.
    """
    line = _words(public_key)
    if len(line) != 3 or not line[0].startswith("ecdsa-sha2-") or not SITE_NAME.fullmatch(line[2]):
        raise ConfigError(f"{public_key} is not a site's node.pub: it must be 'ecdsa-sha2-... KEY NAME'")
    name, text = line[2], " ".join(line) + "\n"
    key_file, number = folder.nodes / f"{name}.pub", folder.nodes / f"{name}.id"
    if key_file.exists() and _words(key_file)[:2] != line[:2]:
        raise ConfigError(f"{name} is registered with another key: revoke it first with 'fedveil server revoke'")
    for other in sorted(folder.nodes.glob("*.pub")):
        if other.stem != name and _words(other)[:2] == line[:2]:
            raise ConfigError(_owned(public_key, other.stem, name))
    with control_of(folder) as control:
        node = control.register(public_key.absolute())
        known = "" if node else control.node_of(text.encode())
    if not node and not known:
        raise ShutOut(f"{name}'s key was shut out: the site makes a new one with 'fedveil site init'")
    for other in sorted(folder.nodes.glob("*.id")):
        if known and other.stem != name and _words(other, "the site's number") == [known]:
            raise ConfigError(_owned(public_key, other.stem, name))
    if known and key_file.exists() and number.exists() and _words(number, "the site's number") == [known]:
        return f"{name} was registered before"
    folder.nodes.mkdir(exist_ok=True)
    # A run reads these while it goes on (``server.registered``): never half a file. The key comes first, so that the
    # name is taken: if this is killed in between, the key is looked up the next time.
    replace_file(key_file, text.encode())
    replace_file(number, f"{node or known}\n".encode())
    return f"{name} is registered"


def _words(path: Path, what: str = "the site's public key") -> list[str]:
    """Return the words of a key's or a number's file; one that is not UTF-8 has others than any key or number."""
    return read_bytes(path, what).decode("utf-8", errors="replace").split()


def _key(path: Path) -> bytes:
    """Return the line of a registered key; empty if it is missing or no key."""
    try:
        line = read_bytes(path, "the site's public key")
        public_pem(line)
    except DataError:
        return b""
    return line


def _owned(public_key: Path, owner: str, name: str) -> str:
    return f"{public_key} is the key of {owner}, which is registered: {name} makes its own with 'fedveil site init'"


def online_words(online: Collection[int], names: Mapping[int, str]) -> str:
    """Return in words how many nodes are online, and which registered sites are not.

    >>> online_words({7}, {7: "clinic", 9: "ward"})
    '1 online, not ward'
    """
    away = sorted(name for node, name in names.items() if node not in online)
    return f"{len(online)} online" + (f", not {', '.join(away)}" if away else "")


def with_groups(folder: ServerFolder, settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a job's settings with the sites of each group of ``groups.toml`` that ``named-sites`` names in its place.

    A site that is named by itself and by a group, or by two, is named once.

    Raises:
        ConfigError: the file is not one list of sites for each group.
    """
    names, groups = plain_names(str(settings.get("named-sites", ""))), _groups(folder)
    if not set(names) & set(groups) or len(set(names)) < len(names):
        return dict(settings)
    members = dict.fromkeys(site for name in names for site in groups.get(name, [name]))
    return {**settings, "named-sites": ", ".join(members)}


def check_named(folder: ServerFolder, sites: Collection[str]) -> None:
    """Raise ConfigError unless all sites that a job names are registered."""
    if sites and (words := unregistered(sites, names_in(folder.nodes).values(), _groups(folder))):
        raise ConfigError(words)


def _groups(folder: ServerFolder) -> dict[str, list[str]]:
    path = folder.path / GROUPS
    groups = read_toml(path, "the groups of sites") if path.exists() else {}
    sites = set(names_in(folder.nodes).values()) if groups else set()
    for name, members in groups.items():
        listed = isinstance(members, list) and all(isinstance(site, str) for site in members)
        if not (listed and members and PLAIN_NAME.fullmatch(name)) or name in sites:
            raise ConfigError(
                f"{path}: {name!r} is no group: write a name that no site has, and its sites, such as "
                'stroke = ["clinic", "ward"]'
            )
    return groups


def revoke_site(folder: ServerFolder, name: str) -> str:
    """Shut a site out and return what to tell people; its files leave the folder.

    Raises:
        ConfigError: no site of this name was registered with this folder.
        DataError: the folder does not say which node is the site's, or the server never had it.
        RunFailed: the server refused or did not answer.
    """
    key_file, number = folder.nodes / f"{name}.pub", folder.nodes / f"{name}.id"
    if not SITE_NAME.fullmatch(name) or not (key_file.is_file() or number.is_file()):
        known = ", ".join(sorted({path.stem for kind in ("id", "pub") for path in folder.nodes.glob(f"*.{kind}")}))
        raise ConfigError(f"no site {name!r} is registered; registered are: {known or 'none'}")
    node, key = " ".join(_words(number, "the site's number")) if number.is_file() else "", _key(key_file)
    numbered = node.isascii() and node.isdecimal()
    if not numbered and not key:
        raise DataError(f"neither {number} nor {key_file} says which node is the site's: put its node.pub there")
    with control_of(folder) as control:
        if numbered:
            control.revoke(node)
        # A number that Flower does not know is no proof: what counts is that it lets the key in no more.
        if key:
            if left := control.node_of(key):
                control.revoke(left)
        elif not control.has_node(node):
            raise DataError(
                f"{number} says {node}, and the server never had such a node: nobody is shut out; put the site's "
                f"node.pub at {key_file}"
            )
    for path in (key_file, number):
        path.unlink(missing_ok=True)
    sync_folder(folder.nodes)
    return f"{name} is shut out; what its ledger has been charged stays charged"

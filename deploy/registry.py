"""The registry of sites that may join: public keys and node ids, at the SuperLink and in the server's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from common.errors import ConfigError
from common.files import replace_file
from common.secure_sum.roster import SITE_NAME
from deploy.control import control_of
from deploy.files import read_bytes
from deploy.server_folder import ServerFolder


def register_site(folder: ServerFolder, public_key: Path) -> str:
    """Register a site's key and return what to tell people.

    Raises:
        ConfigError: the file is no public key with the site's name as its comment, the name has another key, the key
            is another site's, or it was shut out.
        RunFailed: the server refused or did not answer.
    """
    line = read_bytes(public_key, "the site's public key").decode("utf-8", errors="replace").split()
    if len(line) != 3 or not line[0].startswith("ecdsa-sha2-") or not SITE_NAME.fullmatch(line[2]):
        raise ConfigError(f"{public_key} is not a site's node.pub: it must be 'ecdsa-sha2-... KEY NAME'")
    name, kept = line[2], folder.nodes / f"{line[2]}.pub"
    if kept.exists() and kept.read_text(encoding="utf-8").split()[:2] != line[:2]:
        raise ConfigError(f"{name} is registered with another key: revoke it first with 'fedveil server revoke'")
    for other in sorted(folder.nodes.glob("*.pub")):
        if other.stem != name and other.read_text(encoding="utf-8").split()[:2] == line[:2]:
            raise ConfigError(
                f"{public_key} is the key of {other.stem}, which is registered: {name} makes its own with "
                "'fedveil site init'"
            )
    with control_of(folder) as control:
        node = control.register(public_key.absolute())
    if not node:
        # Flower keeps a revoked key's row, and lets that key in no more.
        if not (folder.nodes / f"{name}.id").is_file():
            raise ConfigError(f"{name}'s key was shut out: the site makes a new one with 'fedveil site init'")
        return f"{name} was registered before"
    folder.nodes.mkdir(exist_ok=True)
    # A run reads these while it goes on (``server.registered``): never half a file.
    replace_file(folder.nodes / f"{name}.id", f"{node}\n".encode())
    replace_file(kept, (" ".join(line) + "\n").encode())
    return f"{name} is registered as node {node}"


def online_words(online: Collection[int], names: Mapping[int, str]) -> str:
    """Return in words how many nodes are online, and which registered sites are not.

    >>> online_words({7}, {7: "clinic", 9: "ward"})
    '1 online, not ward'
    """
    away = sorted(name for node, name in names.items() if node not in online)
    return f"{len(online)} online" + (f", not {', '.join(away)}" if away else "")


def revoke_site(folder: ServerFolder, name: str) -> str:
    """Shut a site out and return what to tell people.

    Raises:
        ConfigError: no site of this name was registered with this folder.
        RunFailed: the server refused or did not answer.
    """
    found = folder.nodes / f"{name}.id"
    if not SITE_NAME.fullmatch(name) or not found.is_file():
        known = ", ".join(sorted(path.stem for path in folder.nodes.glob("*.id"))) or "none"
        raise ConfigError(f"no site {name!r} is registered; registered are: {known}")
    with control_of(folder) as control:
        control.revoke(found.read_text(encoding="utf-8").strip())
    for path in (found, folder.nodes / f"{name}.pub"):
        path.unlink(missing_ok=True)
    return f"{name} is shut out; what its ledger has been charged stays charged"

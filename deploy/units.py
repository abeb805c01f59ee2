"""systemd units for a server and a site, and the next steps that ``init`` prints."""

from __future__ import annotations

import getpass
import os
import re
import shlex
from pathlib import Path

from fedveil.common.files import expanded
from fedveil.common.ports import dialled
from fedveil.deploy.commands import program
from fedveil.deploy.server_folder import ServerFolder, authority_beside
from fedveil.deploy.site_folder import SiteFolder

UNIT = """\
# Install: copy to /etc/systemd/system/, then systemctl daemon-reload and systemctl enable --now {name}
[Unit]
Description={description}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
ExecStart={command}
Restart=always
RestartSec=10
TimeoutStopSec=15
KillMode=mixed
NoNewPrivileges=yes
CapabilityBoundingSet=
PrivateTmp=yes
PrivateDevices={private_devices}
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
ReadWritePaths={writable}
{hidden}UMask=0077

[Install]
WantedBy=multi-user.target
"""


def server_unit(path: Path, authority: Path | None = None) -> dict[str, bytes]:
    """Return ``fedveil-server.service`` of a server's folder at ``path``, by the file's name.

    Args:
        path: the folder.
        authority: of the certificate authority, which the unit's processes do not see; None: where ``init`` puts it.
    """
    place = expanded(authority or authority_beside(expanded(path).absolute())).absolute()
    hidden = f"InaccessiblePaths={unit_word(f'-{place}')}\n"
    words = "server", "start"
    return _unit(path, "fedveil-server", "FedVeil server (SuperLink and runner)", words, "yes", hidden)


def site_unit(path: Path, site: str) -> dict[str, bytes]:
    """Return ``fedveil-site.service`` of a site's folder at ``path``. GPUs are devices, so a site keeps /dev.

    Its first process ends the others: a SuperNode that gets a second signal does not take leave of the server.
    """
    return _unit(path, "fedveil-site", f"FedVeil site {site} (SuperNode and worker)", ("site", "start"), "no")


def _unit(
    path: Path, name: str, description: str, words: tuple[str, ...], private_devices: str, hidden: str = ""
) -> dict[str, bytes]:
    folder = str(expanded(path).absolute())
    text = UNIT.format(
        name=name,
        description=description,
        user=_user(),
        # Of the arguments alone is $ a variable's sign.
        command=" ".join([unit_word(program("fedveil")), *words, unit_word(folder.replace("$", "$$"))]),
        private_devices=private_devices,
        writable=unit_word(folder),
        hidden=hidden,
    )
    return {f"{name}.service": text.encode()}


def _user() -> str:
    """Return the user's name, or number where the machine has no name for it, as in a container; systemd takes both."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def unit_word(text: str) -> str:
    """Return one word of a systemd unit: blanks part words there, and ``%`` names a specifier.

    >>> unit_word("/srv/St Mary's/site")
    '"/srv/St Mary\\'s/site"'
    >>> unit_word("/srv/site")
    '/srv/site'
    """
    text = text.replace("%", "%%")
    if not re.search(r"""[\s"'\\]""", text):
        return text
    return '"' + re.sub(r"""(["\\])""", r"\\\1", text) + '"'


def server_steps(folder: ServerFolder, authority_fingerprint: str, authority: Path | None = None) -> str:
    """Return what ``fedveil server init`` prints; ``authority`` as for ``make_server``."""
    path = shlex.quote(str(folder.path))
    place = expanded(authority or authority_beside(folder.path)).absolute()
    return f"""\
{folder.path} is ready. The authority's fingerprint (SHA-256), to be compared at every site:
  {authority_fingerprint}
Next:
  1. start it          fedveil server start {path}
                       (or install {folder.path}/fedveil-server.service)
  2. open port {folder.fleet_port} to the sites; keep {folder.control} closed
  3. give every site   {folder.path}/ca.crt and the name {dialled(folder.name_list[0], folder.fleet_port)}
  4. let a site in     fedveil server register {path} THE_SITES_node.pub
  5. check it          fedveil doctor {path}
  6. run a job         fedveil server submit {path} -c SETTINGS --sites 2
  7. move {shlex.quote(str(place))} off this machine: it is needed only by 'fedveil server renew'."""


def site_steps(folder: SiteFolder) -> str:
    """Return what ``fedveil site init`` prints."""
    path = shlex.quote(str(folder.path))
    authority = "" if (folder.path / "ca.crt").exists() else f"\n  0. put the coordinator's ca.crt into {folder.path}"
    return f"""\
{folder.path} is ready.
Next:{authority}
  1. read the policy   {folder.path}/policy.toml: budget and limits are yours to set
  2. send the coordinator {folder.path}/node.pub (never node.key)
  3. check it          fedveil site check {path} (which rows cannot be used)
                       fedveil doctor {path}
                       (compare the authority's fingerprint with the coordinator's over a separate channel)
  4. start it          fedveil site start {path}
                       (or install {folder.path}/fedveil-site.service)
Never restore {folder.path}/ledger from a backup: it would forget what was spent."""

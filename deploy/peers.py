"""The roster of a site's secure sums: a signing key of its own, and the entries of all sites that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedveil.common.files import expanded, replace_file
from fedveil.deploy.files import PRIVATE_MODE, read_bytes
from fedveil.deploy.site_folder import SiteFolder
from fedveil.privacy.secure_sum import Roster
from fedveil.privacy.secure_sum.roster import joined

KEY, ENTRY, PEERS = "identity.key", "identity.toml", "peers.toml"


def make_roster(folder: SiteFolder, others: Sequence[Path]) -> Roster:
    """Write ``peers.toml`` from this site's entry and the other sites' (``identity.toml``), in place of an earlier one.

    Raises:
        ConfigError: an entry is invalid, a site has two keys, or together they are no roster.
        DataError: a file cannot be read or written.
    """
    places = [folder.path / ENTRY, *(expanded(path) for path in others)]
    texts = {str(path): read_bytes(path, "the roster's entry").decode(errors="replace") for path in places}
    roster = joined(texts)
    replace_file(folder.path / PEERS, roster.text().encode())
    (folder.path / PEERS).chmod(PRIVATE_MODE)
    return roster

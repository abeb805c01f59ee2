"""A site among those of a secure sum: who it is, and which peers its steward accepts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedveil.client.pins import refusal
from fedveil.client.policy import Policy
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.files import expanded
from fedveil.privacy.secure_sum import Identity, Roster
from fedveil.privacy.secure_sum.roster import load_roster


@dataclass(frozen=True)
class Party:
    """A site among those of a roster."""

    site: str
    identity: Identity
    roster: Roster
    honest: int
    """Sites of the roster that the steward takes for honest, at least."""

    def check_size(self, sites: int, honest: int) -> None:
        """Raise PolicyRefusal unless any ``sites`` sites of the roster have ``honest`` honest ones.

        The server chooses them, and would choose those that need not be honest first.
        """
        others = len(self.roster.keys) - self.honest
        if sites - others < honest:
            raise refusal(
                "honest-sites",
                f"{self.honest} of the roster's {len(self.roster.keys)}",
                f"privacy.honest-sites = {honest} of a sum of {sites} sites, of which {others} need not be honest",
            )

    def check_named(self, sites: Collection[str], honest: int) -> None:
        """Raise PolicyRefusal unless the sites that a run names are of the roster, with ``honest`` honest ones."""
        if foreign := sorted(set(sites) - set(self.roster.keys)):
            raise PolicyRefusal(
                f"the run names {', '.join(map(repr, foreign))}, and the roster of this site's steward does not: "
                "stewards must agree on one roster, and a run of theirs names sites of it"
            )
        self.check_size(len(set(sites)), honest)

    def check_threshold(self, sites: int, colluders: int) -> None:
        """Raise PolicyRefusal if the steward takes more sites for not honest than the run's ``colluders``.

        Those of them that hold shares could help the server to both secrets of a site. It is so at any number of
        sites, so that a run which begins well goes on as sites are lost.
        """
        others = len(self.roster.keys) - self.honest
        # The threshold t has 2t > sites + colluders. So with others <= colluders 2t > sites + others: two lists with t
        # signatures each have an honest site in common. With one more that holds only where sites + colluders is even.
        if others > colluders:
            raise refusal(
                "honest-sites",
                f"{self.honest} of the roster's {len(self.roster.keys)}",
                f"privacy.colluders = {colluders} of a sum of {sites} sites that may lose some, of which {others} need "
                "not be honest",
            )


def party_of(site: str, node: Mapping[str, Scalar], policy: Policy, run: str, *, simulated: bool) -> Party:
    """Return who a site is in secure sums, and whom its steward takes for its peers.

    In a simulation, one machine's own, there is no one to keep out: signing keys follow from the run's name.

    Raises:
        ConfigError: the node names no ``identity`` or the policy no ``peers``, or one of the files is invalid; or the
            roster is not the one of ``peers-hash``, has another key for this site, or fewer sites than the steward
            takes for honest.
        PolicyRefusal: the roster does not have this site.
    """
    if simulated and not policy.peers:
        names = [f"site-{i}" for i in range(int(node.get("num-partitions", 0)))]
        identities = {name: _simulated(run, name) for name in names}
        roster = Roster({name: own.public for name, own in identities.items()})
        party = Party(site, _simulated(run, site), roster, len(names))
    else:
        if "identity" not in node or not policy.peers:
            raise ConfigError(
                "a site that joins secure sums needs 'identity' in the node's settings and 'peers' in the policy: its "
                "own signing key, and the roster of all sites"
            )
        own = _identity(expanded(str(node["identity"])))
        party = Party(site, own, _roster(roster_file(node, policy), policy.peers_hash), policy.honest_sites)
    if party.honest > len(party.roster.keys):
        raise ConfigError(
            f"the policy has honest-sites = {party.honest}, and its roster {len(party.roster.keys)} sites: count those "
            "of the roster alone, or hand over a whole one"
        )
    if site not in party.roster.keys:
        raise PolicyRefusal(f"the roster of this site's steward does not have {site!r}: stewards must agree on one")
    if party.roster.keys[site] != party.identity.public:
        raise ConfigError(f"the roster has another signing key for {site!r} than the site's own: hand over the new one")
    return party


def roster_file(node: Mapping[str, Scalar], policy: Policy) -> Path:
    """Return where the policy's roster is: beside the policy, if it names no folder."""
    return expanded(str(node["policy"])).parent / expanded(policy.peers)


def _roster(path: Path, pinned: str) -> Roster:
    """Read the policy's roster, of that hash; an error, which the server reads, does not say where the file is."""
    try:
        roster = load_roster(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), "<peers>")) from error
    if roster.digest != pinned:
        raise ConfigError(
            f"the roster <peers> has the hash {roster.digest}, and the policy's peers-hash is {pinned or 'missing'}: "
            "put back the roster that the stewards agreed on, or let them compare the new one's hash and set that"
        )
    return roster


def _simulated(run: str, site: str) -> Identity:
    return Identity.from_secret(hashlib.sha256(json.dumps(["simulated", run, site]).encode()).digest())


def _identity(path: Path) -> Identity:
    try:
        return Identity.from_pem(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the signing key {path} cannot be read ({error.strerror}): check 'identity'") from error

"""One signed list of survivors, and the sum without masks: the end of a sum from which sites may be lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedveil.common.errors import ProtocolError
from fedveil.privacy.secure_sum.attempt import check_count
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.context import PROTOCOL, AttemptName
from fedveil.privacy.secure_sum.identity import Identity, is_signed
from fedveil.privacy.secure_sum.masks import Words, add_mask, mask_of, pair_seed
from fedveil.privacy.secure_sum.roster import Roster
from fedveil.privacy.secure_sum.shares import SHARE_BYTES, combined, is_share, threshold, weights


@dataclass(frozen=True)
class Agreement:
    """A site's word that it takes part in a sum of certain sites, and of no other sites in the same attempt."""

    site: str
    digest: bytes
    """Of the context, 32 bytes."""
    signature: bytes


@dataclass
class Holder:
    """One site's part in one attempt after its vector: one signed list, and one share of each site."""

    name: AttemptName
    site: str
    digest: bytes
    """Of the context."""
    threshold: int
    least: tuple[int, int]
    """Of the survivors: honest sites, and beside them those that may collude."""
    held: Mapping[str, bytes]
    """By site of the sum, in the order of names: a share of its own mask's seed, and one of its key."""
    survivors: tuple[str, ...] = ()
    """Of the list that was signed; empty until one is."""

    def sign(self, survivors: Sequence[str], identity: Identity) -> Agreement:
        """Return this site's word that the sum is of these sites, in the order of their names.

        Raises:
            ProtocolError: they are no sites of the sum, do not hold this one, are too few, or are others than those
                that it signed before.
        """
        named = tuple(survivors)
        if list(named) != sorted(set(named) & set(self.held)) or self.site not in named:
            raise ProtocolError("the survivors are not sites of the sum, this one among them, in the order of names")
        check_count(len(named), *self.least)
        if self.survivors not in ((), named):
            raise ProtocolError("other survivors were signed for in this attempt before: each attempt has one list")
        self.survivors = named
        return Agreement(self.site, self.digest, identity.sign(self._signed()))

    def reveal(self, signatures: Mapping[str, bytes], roster: Roster) -> tuple[bytes, ...]:
        """Return a share of each site of the sum: of its own mask if it survived, else of its key.

        A signature counts that is by a survivor, over the list that this site signed and this context. Others are
        ignored, so that one site which signs something else does not cost the attempt.

        Args:
            signatures: of that list, by survivor.
            roster: the steward's own.

        Raises:
            ProtocolError: this site has signed no list, or those that count are fewer than the threshold.
        """
        if not self.survivors:
            raise ProtocolError("this site has signed for no survivors in this attempt: it tells no shares")
        survived, content = set(self.survivors), self._signed()
        signed = sum(
            site in survived and is_signed(content, signature, roster.keys.get(site, b""))
            for site, signature in signatures.items()
        )
        if signed < self.threshold:
            raise ProtocolError(
                f"{signed} sites have signed the survivors, and {self.threshold} are needed: others may have "
                "been told of other survivors"
            )
        return tuple(s[:SHARE_BYTES] if site in survived else s[SHARE_BYTES:] for site, s in self.held.items())

    def _signed(self) -> bytes:
        values = {**asdict(self.name), "context": self.digest, "survivors": list(self.survivors)}
        return canonical(f"{PROTOCOL}/survivors", values)


def are_shares(revealed: Sequence[bytes], sites: int) -> bool:
    """Return whether a survivor revealed what could be one share of each site; else its answer is left out."""
    return len(revealed) == sites and all(is_share(share) for share in revealed)


def unmasked(
    vectors: Mapping[str, Words],
    offers: Mapping[str, bytes],
    holders: Sequence[str],
    colluders: int,
    digest: bytes,
    revealed: Mapping[str, Sequence[bytes]],
) -> Words:
    """Return the sum of the survivors' vectors modulo 2³², without any mask: the server's part.

    Args:
        vectors, offers: the survivors' vectors, and public keys of the masks of all sites of the sum, by site.
        holders, colluders: the sites that hold shares, and how many of them may collude.
        digest: of the context.
        revealed: the survivors' shares (``Holder.reveal``), by holder; what is not ``are_shares`` is left out.

    Raises:
        ProtocolError: too few revealed shares, or these are not the secrets of these sites.
    """
    needed, names, sites = threshold(len(holders), colluders), sorted(holders), sorted(offers)
    whole = [holder for holder in names if are_shares(revealed.get(holder, ()), len(sites))]
    if len(whole) < needed:
        raise ProtocolError(f"{len(whole)} sites told their shares, and {needed} are needed")
    chosen = whole[:needed]
    factors = weights([1 + names.index(holder) for holder in chosen])
    total = np.zeros_like(next(iter(vectors.values())))
    for vector in vectors.values():
        total += vector
    for place, site in enumerate(sites):
        secret = combined([revealed[holder][place] for holder in chosen], factors)
        if site in vectors:
            total -= mask_of(secret, len(total))
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        if key.public_key().public_bytes_raw() != offers[site]:
            raise ProtocolError(f"the shares that were told of site {site!r} are not of its key")
        for survivor in vectors:
            # What the lost site would have added: the survivor's mask with it goes away.
            add_mask(total, pair_seed(key, offers[survivor], digest, site, survivor), site, survivor)
    return total

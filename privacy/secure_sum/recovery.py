"""A sum that some sites may be lost from: a second mask, shares of both masks' secrets, one agreed list of survivors.

Beside the masks of its pairs a site adds one of its own, from a seed that it draws. That seed and the secret half of
the key of its pairs' masks are shared among all sites of the attempt (``shares``), each share sealed for its holder.
Once the vectors are in, the server names the sites whose vectors it has, the survivors. They sign that list, each one
list an attempt. Who sees as many signatures of its list as tell a secret answers with one share for each site: of the
own mask's seed if it survived, of the key if it was lost. So the server takes off the own masks of the survivors, and
the masks of their pairs with those that were lost; the other pairs' go away in the sum.

Of one site it never gets both secrets. With n sites and c that may collude, ⌊(n + c) / 2⌋ + 1 shares tell a secret
(``threshold``). Two lists with so many signatures each have an honest site in common, and that one signs one list.

This is the protocol of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
figure 4, round by round, on the complete graph and with its consistency check. As there, shares are sealed under other
keys than those of the masks: a key that opened them would, once it is told for a site that was lost, open both shares
that this site holds of everybody.

All secrets of a site in an attempt follow from 32 bytes and from what the server says of the sites, so that a task
which comes twice has one answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import urandom

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum.attempt import KeyOffer, check_count, checked_keys
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.context import PROTOCOL, AttemptName, Context, Task, Terms
from fedveil.privacy.secure_sum.identity import Identity, is_signed
from fedveil.privacy.secure_sum.masks import Words, add_mask, derived, mask_of, pair_seed, shared_secret
from fedveil.privacy.secure_sum.roster import Roster
from fedveil.privacy.secure_sum.shares import SECRET_BYTES, SHARE_BYTES, combined, is_share, split, weights

SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Of the two shares that one site gives another, with the seal of ChaCha20-Poly1305 (RFC 8439)."""
_NONCE = bytes(12)
"""A key seals once."""


def threshold(sites: int, colluders: int) -> int:
    """Return how many shares tell a secret, such that no two groups get both of a site's from ``sites`` holders.

    ``colluders`` holders may answer both groups, and every other one answers one.

    >>> threshold(4, 1), threshold(20, 1), threshold(100, 10)
    (3, 11, 56)
    """
    return (sites + colluders) // 2 + 1


def least_sites(honest: int, colluders: int, drop_outs: int) -> int:
    """Return with how many sites an attempt begins, so that ``drop_outs`` of them may be lost at any time.

    What is left has ``honest`` honest sites beside ``colluders``, and tells the secrets.

    >>> least_sites(2, 1, 0), least_sites(2, 1, 2), least_sites(15, 1, 4)
    (3, 6, 20)
    """
    return max(honest + colluders + drop_outs, 2 * drop_outs + colluders + 1)


def may_be_lost(sites: int, honest: int, colluders: int, drop_outs: int, min_sites: int) -> int:
    """Return how many of an attempt's ``sites`` may be lost: ``drop_outs``, or fewer where some are gone for good.

    What is left has ``honest`` honest sites beside ``colluders``, is ``min_sites`` at least, and tells the secrets.

    >>> [may_be_lost(sites, 2, 1, 2, 2) for sites in (7, 6, 5, 4, 3)]
    [2, 2, 1, 1, 0]
    """
    return max(0, min(drop_outs, sites - min_sites, sites - honest - colluders, (sites - colluders - 1) // 2))


@dataclass(frozen=True)
class Sharing:
    """What a site shares out before its vector."""

    offer: KeyOffer
    """Its key of the masks, signed for those who hold shares of its secret half."""
    sealed: tuple[bytes, ...]
    """For each site of the attempt in the order of their names, ``SEALED_BYTES`` that only that one opens."""


@dataclass(frozen=True)
class Agreement:
    """A site's word that it takes part in a sum of certain sites, and of no other sites in the same attempt."""

    site: str
    digest: bytes
    """Of the context, 32 bytes."""
    signature: bytes


def _signed_sealing(name: AttemptName, site: str, public: bytes) -> bytes:
    return canonical(f"{PROTOCOL}/sealing-key", {**asdict(name), "site": site, "public": public})


class RecoverableAttempt:
    """One site's part in one attempt up to its vector: a key, shares, one masked vector.

    Args:
        name: the attempt.
        site: this site's name in the roster.
        identity: its signing key.
        secret: 32 bytes, as ``secret`` of the one that made the key; empty: new ones.
    """

    def __init__(self, name: AttemptName, site: str, identity: Identity, secret: bytes = b"") -> None:
        self.name, self._site, self._identity = name, site, identity
        self.secret = secret or urandom(SECRET_BYTES)
        """What all secrets of this attempt follow from; empty once they are agreed on."""
        public = self._own_key("sealing key").public_key().public_bytes_raw()
        self.offer = KeyOffer(site, public, identity.sign(_signed_sealing(name, site, public)))
        """The key under which the others seal their shares for this site."""
        self.sealing: dict[str, bytes] = {}
        """The same keys of all sites that hold shares, in the order of their names; empty until they are shared."""
        self.threshold = 0
        """How many shares tell a secret."""
        self._masks: tuple[bytes, dict[str, bytes]] | None = None

    def share(self, offers: Sequence[KeyOffer], roster: Roster, honest: int, colluders: int) -> Sharing:
        """Check the keys of all sites of the attempt, and share this site's secrets out among them.

        Args:
            offers: as ``checked_keys``.
            roster: the steward's own, never the server's.
            honest: the run's ``privacy.honest-sites``.
            colluders: the run's ``privacy.colluders``.

        Raises:
            ProtocolError: as ``checked_keys``, or the sites are too few.
            MechanismError: the vector was masked before.
        """
        self._check_fresh()
        keys = checked_keys(offers, self.offer, self.name, roster, _signed_sealing)
        check_count(len(keys), honest, colluders)
        self.sealing, self.threshold = dict(sorted(keys.items())), threshold(len(keys), colluders)
        salt, sealer = self._sharing(), self._own_key("sealing key")
        masks, mask_keys = (
            split(self._derived(what, salt), self.threshold, len(keys), self._derived(f"shares of the {what}", salt))
            for what in ("own mask", "mask key")
        )
        sealed = []
        for peer, shares in zip(self.sealing, zip(masks, mask_keys, strict=True), strict=True):
            box = _box(sealer, self.sealing[peer], salt, self._site, peer, peer)
            sealed.append(box.encrypt(_NONCE, b"".join(shares), None))
        public = self._own_key("mask key", salt).public_key().public_bytes_raw()
        signature = self._identity.sign(self._signed_mask(self.name, self._site, public))
        return Sharing(KeyOffer(self._site, public, signature), tuple(sealed))

    def agree(
        self, offers: Sequence[KeyOffer], sealed: Sequence[bytes], roster: Roster, terms: Terms, task: Task
    ) -> Holder:
        """Check what the server says of the sum, and open the shares, before anything is charged; return them.

        The secrets are dropped here, but for what masks one vector.

        Args:
            offers: the masks' keys of all sites that shared, this one's among them.
            sealed: what each of them sealed for this site, in the same order.
            roster: the steward's own.
            terms: the run's, as this site prices them.
            task: what this site was given.

        Raises:
            ProtocolError: as ``checked_keys``; nothing was shared out; the sites are too few, or others than those that
                hold shares; or what one of them sealed cannot be opened.
            MechanismError: the vector was masked before.
        """
        self._check_fresh()
        if not self.sealing:
            raise ProtocolError("this site has shared no secrets in that attempt: a vector is masked after that")
        salt = self._sharing()
        key = self._own_key("mask key", salt)
        own = KeyOffer(self._site, key.public_key().public_bytes_raw(), b"")
        keys = checked_keys(offers, own, self.name, roster, self._signed_mask)
        check_count(len(keys), terms.honest_sites, terms.colluders)
        if strangers := sorted(set(keys) - set(self.sealing)):
            raise ProtocolError(f"site {strangers[0]!r} is in the sum and holds no shares: it was not among the keys")
        if len(sealed) != len(offers):
            raise ProtocolError(f"the task has {len(sealed)} sealed shares of {len(offers)} sites: each gives one pair")
        opener, held = self._own_key("sealing key"), dict[str, bytes]()
        for offer, content in zip(offers, sealed, strict=True):
            box = _box(opener, self.sealing[offer.site], salt, offer.site, self._site, offer.site)
            try:
                held[offer.site] = box.decrypt(_NONCE, content, None)
            except (InvalidTag, ValueError) as error:
                raise ProtocolError(
                    f"the shares of site {offer.site!r} cannot be opened: they were changed, or sealed for others"
                ) from error
            if len(held[offer.site]) != 2 * SHARE_BYTES:
                raise ProtocolError(f"what site {offer.site!r} sealed is not two shares")
        digest = Context(self.name, terms, task, keys, salt).digest()
        pairs = {peer: pair_seed(key, other, digest, self._site, peer) for peer, other in keys.items()}
        del pairs[self._site]
        self._masks, self.secret = (self._derived("own mask", salt), pairs), b""
        least = terms.honest_sites, terms.colluders
        return Holder(self.name, self._site, digest, self.threshold, least, dict(sorted(held.items())))

    def masked(self, words: Words) -> Words:
        """Return ``words`` with this site's own mask and those of its pairs, modulo 2³², once.

        Raises:
            MechanismError: the attempt was not agreed on, or has masked its vector already.
        """
        masks, self._masks = self._masks, None
        if masks is None:
            raise MechanismError("an attempt masks one vector, once it is agreed on, and no second one")
        own, pairs = masks
        masked = words + mask_of(own, len(words))
        for peer, seed in pairs.items():
            add_mask(masked, seed, self._site, peer)
        return masked

    def _check_fresh(self) -> None:
        if not self.secret:
            raise MechanismError("an attempt masks one vector, and its secrets are gone")

    def _derived(self, what: str, salt: bytes = b"") -> bytes:
        return derived(self.secret, salt, canonical(f"{PROTOCOL}/own", {"for": what}))

    def _own_key(self, what: str, salt: bytes = b"") -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._derived(what, salt))

    def _sharing(self) -> bytes:
        """Return the hash of who holds shares under which keys, and of how many of them tell a secret."""
        keys = [[name, key] for name, key in self.sealing.items()]
        values = {**asdict(self.name), "threshold": self.threshold, "keys": keys}
        return hashlib.sha256(canonical(f"{PROTOCOL}/sharing", values)).digest()

    def _signed_mask(self, name: AttemptName, site: str, public: bytes) -> bytes:
        values = {**asdict(name), "site": site, "public": public, "sharing": self._sharing()}
        return canonical(f"{PROTOCOL}/shared-key", values)


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


def _box(
    own: X25519PrivateKey, peer_key: bytes, sharing: bytes, sender: str, holder: str, peer: str
) -> ChaCha20Poly1305:
    """Return what seals, and opens, the shares that one site gives another: one key for each direction and attempt."""
    info = canonical(f"{PROTOCOL}/sealed-shares", {"from": sender, "to": holder})
    return ChaCha20Poly1305(derived(shared_secret(own, peer_key, peer), sharing, info))


def are_shares(told: Sequence[bytes], sites: int) -> bool:
    """Return whether what a survivor told could be one share of each of so many sites; else its answer is left out."""
    return len(told) == sites and all(is_share(share) for share in told)


def unmasked(
    vectors: Mapping[str, Words],
    offers: Mapping[str, bytes],
    holders: Sequence[str],
    colluders: int,
    digest: bytes,
    told: Mapping[str, Sequence[bytes]],
) -> Words:
    """Return the sum of the survivors' vectors modulo 2³², without any mask: the server's part.

    Args:
        vectors: of the survivors, by site.
        offers: public keys of the masks of all sites of the sum, by site.
        holders: the sites that hold shares.
        colluders: the run's ``privacy.colluders``.
        digest: of the context.
        told: what survivors told (``Holder.reveal``), by holder; what is not ``are_shares`` is left out.

    Raises:
        ProtocolError: too few told, or what they told are not the secrets of these sites.
    """
    needed, names, sites = threshold(len(holders), colluders), sorted(holders), sorted(offers)
    whole = [holder for holder in names if are_shares(told.get(holder, ()), len(sites))]
    if len(whole) < needed:
        raise ProtocolError(f"{len(whole)} sites told their shares, and {needed} are needed")
    chosen = whole[:needed]
    factors = weights([1 + names.index(holder) for holder in chosen])
    total = np.zeros_like(next(iter(vectors.values())))
    for vector in vectors.values():
        total += vector
    for place, site in enumerate(sites):
        secret = combined([told[holder][place] for holder in chosen], factors)
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

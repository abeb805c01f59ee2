"""A sum that some sites may be lost from: a second mask, shares of both masks' secrets, one agreed list of survivors.

Beside the masks of its pairs a site adds one of its own, from a seed that it draws. That seed and the secret half of
the key of its pairs' masks are shared among all sites of the attempt (``shares``), each share sealed for its holder.
Once the vectors are in, the server names the sites whose vectors it has, the survivors. They sign that list, each one
list an attempt. Who sees as many signatures of its list as tell a secret answers with one share for each site: of the
own mask's seed if it survived, of the key if it was lost. So the server takes off the own masks of the survivors, and
the masks of their pairs with those that were lost; the other pairs' go away in the sum.

Of one site it never gets both secrets. With n sites and c that may collude, ⌊(n + c) / 2⌋ + 1 shares tell a secret
(``threshold``). Two lists with that many signatures each have an honest site in common, and that one signs one list.

This is the protocol of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
figure 4, round by round, on the complete graph and with its consistency check. As there, shares are sealed under other
keys than those of the masks: a key that opened them would, once it is revealed for a site that was lost, open both
shares that this site holds of everybody.

All secrets of a site in an attempt follow from 32 bytes and from what the server says of the sites, so that a task
which comes twice has one answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import urandom

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum.attempt import KeyOffer, check_count, checked_keys
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.context import PROTOCOL, AttemptName, Context, Task, Terms
from fedveil.privacy.secure_sum.identity import Identity
from fedveil.privacy.secure_sum.masks import Words, add_mask, derived, mask_of, pair_seed, shared_secret
from fedveil.privacy.secure_sum.roster import Roster
from fedveil.privacy.secure_sum.shares import SECRET_BYTES, SHARE_BYTES, split, threshold
from fedveil.privacy.secure_sum.survivors import Holder

SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Of the two shares that one site gives another, with the seal of ChaCha20-Poly1305 (RFC 8439)."""
_NONCE = bytes(12)
"""A key seals once."""


@dataclass(frozen=True)
class Sharing:
    """What a site shares out before its vector."""

    offer: KeyOffer
    """Its key of the masks, signed for those who hold shares of its secret half."""
    sealed: tuple[bytes, ...]
    """For each site of the attempt in the order of their names, ``SEALED_BYTES`` that only that one opens."""


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
        shares = self._opened(offers, sealed, salt)
        digest = Context(self.name, terms, task, keys, salt).digest()
        pairs = {peer: pair_seed(key, other, digest, self._site, peer) for peer, other in keys.items()}
        del pairs[self._site]
        self._masks, self.secret = (self._derived("own mask", salt), pairs), b""
        least = terms.honest_sites, terms.colluders
        return Holder(self.name, self._site, digest, self.threshold, least, dict(sorted(shares.items())))

    def _opened(self, offers: Sequence[KeyOffer], sealed: Sequence[bytes], salt: bytes) -> dict[str, bytes]:
        """Return what each site sealed for this one, by site."""
        if len(sealed) != len(offers):
            raise ProtocolError(f"the task has {len(sealed)} sealed shares of {len(offers)} sites: each gives one pair")
        opener, shares = self._own_key("sealing key"), dict[str, bytes]()
        for offer, content in zip(offers, sealed, strict=True):
            box = _box(opener, self.sealing[offer.site], salt, offer.site, self._site, offer.site)
            try:
                shares[offer.site] = box.decrypt(_NONCE, content, None)
            except (InvalidTag, ValueError) as error:
                raise ProtocolError(
                    f"the shares of site {offer.site!r} cannot be opened: they were changed, or sealed for others"
                ) from error
            if len(shares[offer.site]) != 2 * SHARE_BYTES:
                raise ProtocolError(f"what site {offer.site!r} sealed is not two shares")
        return shares

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


def _box(
    own: X25519PrivateKey, peer_key: bytes, sharing: bytes, sender: str, holder: str, peer: str
) -> ChaCha20Poly1305:
    """Return what seals, and opens, the shares that one site gives another: one key for each direction and attempt."""
    info = canonical(f"{PROTOCOL}/sealed-shares", {"from": sender, "to": holder})
    return ChaCha20Poly1305(derived(shared_secret(own, peer_key, peer), sharing, info))

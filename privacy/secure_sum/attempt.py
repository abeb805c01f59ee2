"""A site's part in one attempt: a new key, one check of the others' keys, one masked vector, and then no key.

The key is kept in memory alone, so a restarted site has lost it and the attempt fails. A caller that keeps it from
one message to the next makes sure that it serves once: of two vectors under one mask the difference is bare. (Python
drops the key; it cannot wipe the memory that held it.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.context import PROTOCOL, AttemptName, Context, Task, Terms
from fedveil.privacy.secure_sum.identity import Identity, is_signed
from fedveil.privacy.secure_sum.masks import Words, add_mask, pair_seed
from fedveil.privacy.secure_sum.roster import Roster


@dataclass(frozen=True)
class KeyOffer:
    """A site's public key of one attempt, signed."""

    site: str
    public: bytes
    """X25519, 32 raw bytes."""
    signature: bytes
    """By the site's signing key, over the attempt's name, the site's and the public key."""


def _signed(name: AttemptName, site: str, public: bytes) -> bytes:
    return canonical(f"{PROTOCOL}/key", {**asdict(name), "site": site, "public": public})


def checked_keys(
    offers: Sequence[KeyOffer],
    own: KeyOffer,
    name: AttemptName,
    roster: Roster,
    signed: Callable[[AttemptName, str, bytes], bytes],
) -> dict[str, bytes]:
    """Return the public keys of an attempt by site, once every one of them is known to be its site's.

    Args:
        offers: as the server says, this site's among them.
        own: this site's, as it made it.
        name: of the attempt.
        roster: the steward's own, never the server's.
        signed: returns what a site signs of its key.

    Raises:
        ProtocolError: the attempt is of another roster; an offer is of no site of it, is there twice, is not signed by
            that site for this attempt, or is another than this site's own; or a key is there twice.
    """
    if roster.digest != name.roster:
        raise ProtocolError("the attempt is of another roster than this site's: stewards must agree on one")
    keys: dict[str, bytes] = {}
    for offer in offers:
        if offer.site not in roster.keys:
            raise ProtocolError(f"site {offer.site!r} is not in the roster: its noise may be anybody's")
        if offer.site in keys or offer.public in keys.values():
            raise ProtocolError(f"the key of site {offer.site!r} is there twice: no mask would hide anything")
        if not is_signed(signed(name, offer.site, offer.public), offer.signature, roster.keys[offer.site]):
            raise ProtocolError(f"the key of site {offer.site!r} is not signed by that site for this attempt")
        keys[offer.site] = offer.public
    if keys.get(own.site) != own.public:
        raise ProtocolError("this site's own key is not among those of the attempt: its masks would not be its own")
    return keys


def check_count(sites: int, honest: int, colluders: int) -> None:
    """Raise ProtocolError unless ``sites`` are enough for a sum."""
    if sites < honest + colluders:
        raise ProtocolError(
            f"the attempt has {sites} sites: {honest} honest ones beside {colluders} that may collude need "
            f"{honest + colluders}"
        )


class SiteAttempt:
    """One site's part in one attempt.

    Args:
        name: the attempt.
        site: this site's name in the roster.
        identity: its signing key.
        secret: the secret half of a key that was made for this attempt before, as ``secret``; empty: a new key.
    """

    def __init__(self, name: AttemptName, site: str, identity: Identity, secret: bytes = b"") -> None:
        self.name, self._site = name, site
        self._private: X25519PrivateKey | None = (
            X25519PrivateKey.from_private_bytes(secret) if secret else X25519PrivateKey.generate()
        )
        public = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.offer = KeyOffer(site, public, identity.sign(_signed(name, site, public)))
        """What goes to the server, and from it to the others."""
        self.secret = secret or self._private.private_bytes_raw()
        """The secret half of the attempt's key. Between two messages it is kept in memory, and used once."""
        self._context: Context | None = None
        self._seeds: dict[str, bytes] = {}

    def agree(self, offers: Sequence[KeyOffer], roster: Roster, terms: Terms, task: Task) -> Context:
        """Check what the server says of the attempt, before anything is charged; return what the masks are bound to.

        The masks' seeds are derived here, and the key is dropped.

        Args:
            offers: of all sites of the attempt, this one's among them.
            roster: the steward's own, never the server's.
            terms: the run's, as this site prices them.
            task: what this site was given.

        Raises:
            ProtocolError: an offer is of no site of the roster, is there twice, is not signed by that site for this
                attempt, or is another than this site's own; a key is there twice, or is invalid; the sites are too few;
                or another task was given for the same attempt before.
        """
        keys = checked_keys(offers, self.offer, self.name, roster, _signed)
        check_count(len(keys), terms.honest_sites, terms.colluders)
        context = Context(self.name, terms, task, keys)
        if self._context is not None and self._context.encoded() != context.encoded():
            raise ProtocolError("another task was given for this attempt before: each attempt has one")
        if self._private is not None:
            digest, peers = context.digest(), {peer: key for peer, key in keys.items() if peer != self._site}
            self._seeds = {peer: pair_seed(self._private, key, digest, self._site, peer) for peer, key in peers.items()}
            self._private, self._context, self.secret = None, context, b""
        return context

    def masked(self, words: Words) -> Words:
        """Return ``words`` with this site's masks, modulo 2³², once: the seeds are dropped.

        Raises:
            MechanismError: the attempt was not agreed on, or has masked its vector already.
        """
        seeds, self._seeds = self._seeds, {}
        if not seeds:
            raise MechanismError("an attempt masks one vector, once it is agreed on, and no second one")
        masked = words.copy()
        for peer, seed in seeds.items():
            add_mask(masked, seed, self._site, peer)
        return masked

"""The mask of a pair of sites: uniform words that only these two can derive.

X25519 (RFC 7748) makes the secret, HKDF-SHA256 (RFC 5869) a seed of it that is bound to the context and to the two
names, and AES-256 in counter mode (NIST SP 800-38A) the words. A seed serves one mask: the context holds keys that were
made for one attempt.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedveil.common.errors import ProtocolError
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.context import PROTOCOL

Words = NDArray[np.uint32]
SEED_BYTES = 32


def pair_seed(secret_key: X25519PrivateKey, peer_key: bytes, context: bytes, own: str, peer: str) -> bytes:
    """Return the seed of the mask of two sites, ``SEED_BYTES``; both get the same one.

    Args:
        secret_key: this site's key of the attempt.
        peer_key: the other's public key, 32 raw bytes.
        context: the context's hash.
        own: this site's name.
        peer: the other's.

    Raises:
        ProtocolError: the key is invalid, or one of the few with which every secret is zero.
    """
    first, second = sorted((own, peer))
    info = canonical(f"{PROTOCOL}/mask", {"first": first, "second": second})
    return derived(shared_secret(secret_key, peer_key, peer), context, info)


def shared_secret(secret_key: X25519PrivateKey, peer_key: bytes, peer: str) -> bytes:
    """Return what two sites' keys make of each other, 32 bytes, from which seeds are derived; as ``pair_seed``."""
    try:
        return secret_key.exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError as error:
        raise ProtocolError(f"the key of site {peer!r} makes no secret: it is no key of this protocol") from error


def derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Return ``SEED_BYTES`` of HKDF-SHA256: another secret for every ``salt`` and ``info``."""
    return HKDF(SHA256(), SEED_BYTES, salt=salt, info=info).derive(secret)


def mask_of(seed: bytes, count: int) -> Words:
    """Return ``count`` uniform words of a seed: the key stream of AES-256-CTR from counter 0, little-endian."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), dtype="<u4").astype(np.uint32, copy=False)


def add_mask(words: Words, seed: bytes, own: str, peer: str) -> None:
    """Add the mask of a pair to ``words`` in place, modulo 2³², or take it away: of the two names the first adds it."""
    mask = mask_of(seed, len(words))
    (np.add if own < peer else np.subtract)(words, mask, out=words)

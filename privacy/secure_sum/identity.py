"""A site's signing key (Ed25519, RFC 8032): by it the other sites know that a mask's key is this site's."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedveil.common.errors import DataError

KEY_BYTES = 32
"""Of a public key."""
SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class Identity:
    """One site's private signing key; ``public`` alone ever leaves the site."""

    _key: Ed25519PrivateKey

    @classmethod
    def new(cls) -> Identity:
        """Return a key from the operating system's entropy."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, content: bytes) -> Identity:
        """Return the key that a file holds (PEM, PKCS#8, no password).

        Raises:
            DataError: it holds none.
        """
        try:
            key = load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise DataError("the site's signing key is no PEM key without a password: make a new one") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise DataError("the site's signing key is not an Ed25519 key: make a new one")
        return cls(key)

    @classmethod
    def from_secret(cls, secret: bytes) -> Identity:
        """Return the key of ``KEY_BYTES`` secret bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(secret))

    def pem(self) -> bytes:
        """Return the content of the file that ``from_pem`` reads; it is secret."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public(self) -> bytes:
        """The public key, ``KEY_BYTES`` raw bytes."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, content: bytes) -> bytes:
        """Return the ``SIGNATURE_BYTES`` of the signature of ``content``."""
        return self._key.sign(content)


def is_signed(content: bytes, signature: bytes, public: bytes) -> bool:
    """Return whether ``signature`` is of ``content`` by the private half of ``public`` (``KEY_BYTES`` raw bytes)."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True

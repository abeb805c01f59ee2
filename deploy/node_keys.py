"""The key pair by which a site proves itself to the server (ECDSA P-384, OpenSSH form, as Flower reads it)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.common.errors import DataError


@dataclass(frozen=True)
class NodeKey:
    """One site's pair. Only ``public`` ever leaves the site."""

    private: bytes
    public: bytes


def new_node_key(site: str) -> NodeKey:
    """Return a new pair; the site's name is the public key's comment."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return NodeKey(private, _public_line(key.public_key()) + f" {site}\n".encode())


def read_node_key(private: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a site.

    Raises:
        DataError: it is not an elliptic-curve key in OpenSSH form.
    """
    try:
        key = serialization.load_ssh_private_key(private, None)
    except (ValueError, TypeError) as error:
        raise DataError(
            "the site's private key is not in OpenSSH form without a passphrase: make a new pair"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError("the site's private key is not an elliptic-curve key: make a new pair")
    return key


def is_pair(private: bytes, public: bytes) -> bool:
    """Whether ``public`` (a line in OpenSSH form) belongs to ``private``.

    Raises:
        DataError: ``private`` is not a site's key.
    """
    return public.split()[:2] == _public_line(read_node_key(private).public_key()).split()


def public_pem(line: bytes) -> bytes:
    """Return a site's public key, a line in OpenSSH form, as Flower keeps it (PEM).

    Raises:
        DataError: it is not one.
    """
    try:
        key = serialization.load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError("a site's public key is not in OpenSSH form: take the site's node.pub") from error
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half of a site's key as Flower keeps it (PEM)."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signature(key: ec.EllipticCurvePrivateKey, text: str) -> bytes:
    """Return a site's signature of a text, as Flower asks for it of the time."""
    return key.sign(text.encode("ascii"), ec.ECDSA(hashes.SHA256()))


def _public_line(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)

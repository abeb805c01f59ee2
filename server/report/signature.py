"""The signature of a report: Ed25519 (RFC 8032) over the bytes of ``report.json``.

The signature file holds the 64 raw bytes, so that other tools can check it as well::

    openssl pkeyutl -verify -pubin -inkey PUBLIC.pem -rawin -in report.json -sigfile report.json.sig
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from common.errors import DataError


def make_key(path: Path) -> Path:
    """Write a new private key to ``path`` (owner only) and the public one beside it, whose path is returned.

    Raises:
        DataError: one of the files exists already, or cannot be written.
    """
    key, public = Ed25519PrivateKey.generate(), path.with_suffix(".pub.pem")
    texts = (
        (path, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        (public, 0o644, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
    )
    for file, _, _ in texts:
        if file.exists():
            raise DataError(f"{file} exists already, and a key is never overwritten: name another file")
    for file, mode, text in texts:
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
                opened.write(text)
        except OSError as error:
            raise DataError(f"the key {file} cannot be written ({error.strerror}): name another place") from error
    return public


def sign(content: bytes, key_file: Path) -> bytes:
    """Return the 64 bytes of the signature of ``content`` by the private key in ``key_file`` (PEM, no password).

    Raises:
        DataError: the file cannot be read or holds no Ed25519 private key.
    """
    try:
        key = load_pem_private_key(_read(key_file, "key"), password=None)
    except TypeError as error:
        raise DataError(f"the key {key_file} asks for a password: give one without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{key_file} holds no private key in PEM: make one with `fedveil keygen`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{key_file} is not an Ed25519 key: make one with `fedveil keygen`")
    return key.sign(content)


def is_genuine(report: Path, signature: Path, key_file: Path) -> bool:
    """Return whether ``signature`` is that of the very bytes of ``report``, by the key whose public half is given.

    Raises:
        DataError: a file cannot be read, or ``key_file`` holds no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(_read(key_file, "public key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{key_file} holds no public key in PEM: ask the server's owner for it") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DataError(f"{key_file} is not an Ed25519 public key: ask the server's owner for it")
    try:
        key.verify(_read(signature, "signature"), _read(report, "report"))
    except InvalidSignature:
        return False
    return True


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the {what} {path} cannot be read ({error.strerror}): check the path") from error

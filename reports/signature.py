"""The signature of a report: Ed25519 (RFC 8032) over a statement that names the run and hashes every file of it.

The statement (``report.signed.json``) is one JSON object in canonical form. It begins with what it is for
(``CONTEXT``), so that no signature of anything else by the same key passes for one; it says of which run it is, how
that ended, its ε and when it was signed; and it holds the SHA-256 of the report in all three forms and of every audit
file in the folder. The signature file holds the 64 raw bytes, so that other tools can check it as well::

    openssl pkeyutl -verify -pubin -inkey PUBLIC.pem -rawin -in report.signed.json -sigfile report.signed.json.sig

An older statement on the same run stays genuine: its time and its figures tell which is which.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from common.run_lines import AUDITS

CONTEXT = "FedVeil signed report, 1"
STATEMENT, SIGNATURE = "report.signed.json", "report.signed.json.sig"


class NotGenuine(DataError):
    """A report is not what was signed."""


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


def statement(
    run: str, strategy: str, status: str, epsilon: float | None, delta: float | None, files: Mapping[str, bytes]
) -> bytes:
    """Return what is signed, with the present time; ε and δ are None without a claim, ``files`` are by name."""
    spoken = None if epsilon is None or math.isfinite(epsilon) else str(epsilon)
    value = {
        "context": CONTEXT,
        "run": run,
        "strategy": strategy,
        "status": status,
        "epsilon": spoken or epsilon,
        "delta": delta,
        "signed": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def covers(signed: bytes, files: Mapping[str, bytes]) -> bool:
    """Whether a statement is of these files, to the last byte, and of no others."""
    try:
        named = json.loads(signed)["files"]
    except (ValueError, TypeError, KeyError):
        return False
    return bool(named == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def verified(folder: Path, key_file: Path) -> dict[str, Any]:
    """Return the statement on the report in ``folder``, once signature and every file have been found right.

    Raises:
        NotGenuine: the signature is not of this statement by this key, or a file was changed or added, of the report
            or of the adapter that lies beside it.
        DataError: a file cannot be read, or ``key_file`` holds no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(_read(key_file, "public key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{key_file} holds no public key in PEM: ask the server's owner for it") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DataError(f"{key_file} is not an Ed25519 public key: ask the server's owner for it")
    signed = _read(folder / STATEMENT, "signed statement")
    try:
        key.verify(_read(folder / SIGNATURE, "signature"), signed)
    except InvalidSignature:
        raise NotGenuine(f"{folder / STATEMENT} was changed, or {key_file} is not the signer's key") from None
    value: dict[str, Any] = json.loads(signed)
    if value.get("context") != CONTEXT:
        raise NotGenuine(f"{folder / STATEMENT} is signed, but is no statement on a report")
    for name, digest in value["files"].items():
        if hashlib.sha256(_read(folder / name, "signed file")).hexdigest() != digest:
            raise NotGenuine(f"{folder / name} was changed after it was signed")
    for name, digest in _adapter(folder).items():
        if (folder / name).is_file() and hashlib.sha256(_read(folder / name, "file")).hexdigest() != digest:
            raise NotGenuine(f"{folder / name} is not of the adapter that the signed report is about")
    added = sorted(path.name for path in folder.glob(AUDITS) if path.is_file() and path.name not in value["files"])
    if added:
        raise NotGenuine(f"{', '.join(added)} in {folder} came after the report was signed")
    return value


def _adapter(folder: Path) -> dict[str, str]:
    """Return the hashes of the adapter's files that the report, found genuine before, states."""
    origin = json.loads(_read(folder / "report.json", "signed file")).get("origin") or {}
    files: dict[str, str] = origin.get("files", {})
    return files


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the {what} {path} cannot be read ({error.strerror}): check the path") from error

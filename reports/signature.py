"""The signature of a run's result: Ed25519 (RFC 8032) over a statement that names the run and hashes every file of it.

The statement (``report.signed.json``) is one JSON object in canonical form. It begins with what it is for
(``CONTEXT``), so that no signature of anything else by the same key passes for one; it says of which run it is, how
that ended and after how many rounds, its ε and when it was signed; and it holds the SHA-256 of everything in the folder
that is given to others (``members``): the report in all its forms, the adapter with its model card, the same cut to
lower ranks where a strategy exports it, and every audit. One that is changed, missing or added is found.

It also hashes the server's files that the report's figures are computed from (``EVIDENCE``), which need not be given to
others: a present one must be what was signed, and ``fedveil verify`` names the missing ones. A running run writes to
them, so it is signed again at its end. Left out are ``beside.json`` and the declarations, which are signed as report
and card quote them, and the log and ledger of a trusted server, which may reveal who was drawn when.

The signature file holds the 64 raw bytes, so that other tools can check it as well::

    openssl pkeyutl -verify -pubin -inkey PUBLIC.pem -rawin -in report.signed.json -sigfile report.signed.json.sig

An older statement on the same run stays genuine: its time and its figures tell which is which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

from fedveil.common.errors import DataError
from fedveil.common.files import finite
from fedveil.common.findings import AUDITS
from fedveil.common.other_runs import TuningFile
from fedveil.common.run_lines import BaselineFile, ConfigFile, PrivacyLine, ResultFile, RoundLine
from fedveil.common.server_file import ServerFile

CONTEXT = "FedVeil signed run, 2"
STATEMENT, SIGNATURE = "report.signed.json", "report.signed.json.sig"
FORMS = ("report.md", "report.html", "report.json")
EVIDENCE = tuple(
    kind.NAME for kind in (ConfigFile, ServerFile, BaselineFile, RoundLine, PrivacyLine, ResultFile, TuningFile)
)
"""What a report's figures of the run itself are computed from."""
ADAPTER = "adapter"
RANKS = "ranks"
"""The adapter cut to lower ranks, in a folder each."""


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


def members(folder: Path) -> list[str]:
    """Return what a statement on the run in ``folder`` must name, as it lies there, by path within it, in order.

    In ``adapter/`` and ``ranks/`` that is everything, because a program that loads an adapter may open any file of it.
    """
    found = [path for path in map(folder.joinpath, FORMS) if path.is_file()]
    found += [path for path in _given(folder) if path.is_symlink() or path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in [*found, *_audits(folder)])


def evidence(folder: Path) -> dict[str, bytes]:
    """Return what of ``EVIDENCE`` lies in a run's folder, by name."""
    return {name: (folder / name).read_bytes() for name in EVIDENCE if (folder / name).is_file()}


@dataclass(frozen=True)
class Run:
    """The run as a statement describes it; ε and δ are None without a claim."""

    run: str
    method: str
    """What was trained, in one name."""
    status: str
    rounds_done: int
    rounds_planned: int
    epsilon: float | None
    delta: float | None
    project: str
    """By the server's word; empty: it names none."""
    named_sites: list[str]
    """That the run was for, by name; empty: it was for all. Who of them was drawn in a round is said nowhere."""
    honest_sites: int
    """Of each sum, that ε counts on; 0: it counts on no other site."""
    epsilon_alone: float | None
    """What holds where no other site is honest; None: ε itself, or it is not known."""
    trials: int | None
    """Number of trials of which the run is one, then their total ε and its δ; None for a single run."""
    epsilon_trials: float | None
    delta_trials: float | None


def statement(run: Run, files: Mapping[str, bytes], lines: Mapping[str, bytes]) -> bytes:
    """Return the bytes to sign, with the present time; ``files`` by path in the folder, ``lines`` its ``evidence``."""
    value = {
        "context": CONTEXT,
        **finite(asdict(run)),
        "signed": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": _digests(files),
        "evidence": _digests(lines),
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def covers(signed: bytes, files: Mapping[str, bytes], lines: Mapping[str, bytes]) -> bool:
    """Return whether a statement covers exactly these bytes; arguments as for ``statement``."""
    try:
        value = json.loads(signed)
        return bool(value["files"] == _digests(files) and value["evidence"] == _digests(lines))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def verified(folder: Path, key_file: Path) -> dict[str, Any]:
    """Return the statement on the run in ``folder``, once signature and every file have been found right.

    Raises:
        NotGenuine: the signature is wrong, or a file was changed, added or removed since, or is a link.
        DataError: a file cannot be read, or ``key_file`` holds no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(_read(key_file, "public key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{key_file} {_instead_of_public(key_file)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DataError(f"{key_file} is not an Ed25519 public key: ask the server's owner for it")
    signed = _read(folder / STATEMENT, "signed statement")
    try:
        key.verify(_read(folder / SIGNATURE, "signature"), signed)
    except InvalidSignature:
        raise NotGenuine(f"{folder / STATEMENT} was changed, or {key_file} is not the signer's key") from None
    value: dict[str, Any] = json.loads(signed)
    if value.get("context") != CONTEXT:
        raise NotGenuine(
            f"{folder / STATEMENT} is signed, but is no statement of this FedVeil on a run: sign the run again"
        )
    for path in _given(folder):
        if path.is_symlink():
            # What it leads to may be the same today and another tomorrow.
            raise NotGenuine(f"{path} is a link: what is given to others must be the files themselves")
    for name, digest in value["files"].items():
        _same(folder, name, digest, "was changed after it was signed")
    _check_evidence(folder, value["evidence"])
    added = [name for name in members(folder) if name not in value["files"]]
    if added:
        raise NotGenuine(f"{', '.join(added)} in {folder} came after the run was signed")
    return value


def _instead_of_public(key_file: Path) -> str:
    """Return what a file without a public key holds, and which file to name instead."""
    if b"PRIVATE KEY-----" not in _read(key_file, "public key"):
        return "holds no public key in PEM: ask the server's owner for it"
    public = key_file.with_suffix(".pub.pem")
    found = f"name {public}, which lies beside it" if public.is_file() else "ask the server's owner for it"
    return f"is a private key, and a signature is verified with the public one: {found}"


def _check_evidence(folder: Path, signed: Mapping[str, str]) -> None:
    """Raise NotGenuine if a line that a report was computed from is not what was signed."""
    for name in EVIDENCE:
        if (folder / name).is_symlink():
            raise NotGenuine(f"{folder / name} is a link: what was signed must be the file itself")
        if not (folder / name).is_file():
            continue
        if name not in signed:
            raise NotGenuine(f"{name} in {folder} came after the run was signed")
        _same(folder, name, signed[name], "was changed after it was signed")


def _given(folder: Path) -> list[Path]:
    """Return the folders that are given to others in full, and everything in them."""
    return [path for whole in (folder / ADAPTER, folder / RANKS) for path in (whole, *whole.rglob("*"))]


def _audits(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(AUDITS) if path.is_file())


def _same(folder: Path, name: str, digest: str, fault: str) -> None:
    if not (folder / name).is_file():
        raise NotGenuine(f"{folder / name} was signed, and is missing")
    if hashlib.sha256(_read(folder / name, "signed file")).hexdigest() != digest:
        raise NotGenuine(f"{folder / name} {fault}")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the {what} {path} cannot be read ({error.strerror}): check the path") from error

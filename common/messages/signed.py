"""Signatures of tasks and answers: by them a site knows that the server asks, and the server which site answers.

Flower checks which node calls, and not whose a message is that it hands over: any registered site can push a task in
the server's name, and, to anyone who can name a task, an answer in another site's.

The server signs each task with a key (Ed25519) whose certificate is of the federation's authority, and of no other use:
neither is a TLS certificate one that signs tasks, nor the reverse. It signs the run, as Flower numbers it, the hash of
the settings that the site is given with the message, the node that receives it, and the message, which says round and
attempt. A site signs each answer with its node's key (ECDSA P-384), over the hash of the signed task and the message.
What is signed is in canonical form, opened by its purpose (``privacy.secure_sum.canonical``), and holds the message's
random bytes: no signature is of two messages.

Both stand in the message's header beside what they are of: ``signature`` and, in a task, ``certificate`` (DER).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key, load_ssh_public_key

from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import DataError, PolicyRefusal, ProtocolError
from fedveil.privacy.secure_sum.canonical import Value, canonical
from fedveil.privacy.secure_sum.identity import Identity

if TYPE_CHECKING:
    from flwr.app import RecordDict

TASK, ANSWER = "fedveil/task/1", "fedveil/answer/1"
SIGNS_TASKS = x509.ObjectIdentifier("2.25.317053887983115253946698418666240259836")
"""The only extended key usage of a certificate whose key signs tasks; the number is of a random UUID."""
SIGNATURE, CERTIFICATE = "signature", "certificate"
RENEW = "the server's operator renews it with 'fedveil server renew'"


@dataclass(frozen=True)
class SiteKeys:
    """What a site knows of the server, and signs its answers with."""

    authority: x509.Certificate
    node: ec.EllipticCurvePrivateKey

    @classmethod
    def read(cls, authority: Path, node: Path) -> SiteKeys:
        """Return them from a site's ``ca.crt`` and ``node.key``.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            key = load_ssh_private_key(node.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(authority.read_bytes())
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise DataError(f"{authority} or {node} cannot be read: restore them, or make the folder again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise DataError(f"{node} is not an elliptic-curve key: make a new pair")
        return cls(certificate, key)


@dataclass(frozen=True)
class Asked:
    """Whom a task is for, and with what."""

    run: str
    """The run's number at the SuperLink."""
    settings: Mapping[str, Scalar]
    """As the site is given them with the message."""
    node: int

    def task(self, record: RecordDict) -> bytes:
        """Return what is signed of a task.

        Raises:
            ProtocolError: the message has not the records that a message of FedVeil has.
        """
        # Each value by its type and its text: 1, 1.0, True and "1" are four settings.
        settings = [[key, type(value).__name__, str(value)] for key, value in sorted(self.settings.items())]
        where: dict[str, Value] = {"run": self.run, "settings": settings, "node": str(self.node)}
        return canonical(TASK, where | _content(record))


def digest(task: bytes) -> bytes:
    """Return what an answer names its task by, 32 bytes."""
    return hashlib.sha256(task).digest()


def sign_task(record: RecordDict, asked: Asked, key: Identity, certificate: bytes) -> bytes:
    """Put the server's signature and its certificate (DER) into a task, and return the task's digest."""
    task = asked.task(record)
    record.config_records["header"].update({SIGNATURE: key.sign(task), CERTIFICATE: certificate})
    return digest(task)


def check_task(record: RecordDict, task: bytes, authority: x509.Certificate, now: datetime | None = None) -> None:
    """Raise ProtocolError unless a key that the authority lets sign tasks has signed ``task``.

    Args:
        record: the message, with signature and certificate.
        task: what must be signed, by ``Asked.task``.
        authority: the authority's certificate.
        now: the time at which the certificate must hold; default: now.
    """
    header = record.config_records["header"]
    signature, encoded = header.get(SIGNATURE), header.get(CERTIFICATE)
    if not (isinstance(signature, bytes) and isinstance(encoded, bytes)):
        raise ProtocolError("the task is not signed: it may be of another site, and nothing of it was looked at")
    try:
        tasks_key(encoded, authority, now).verify(signature, task)
    except InvalidSignature as error:
        raise ProtocolError(
            "the task's signature is not of this message, run, site and settings: it may be of another site"
        ) from error


def tasks_key(encoded: bytes, authority: x509.Certificate, now: datetime | None = None) -> Ed25519PublicKey:
    """Return the key of a certificate (DER) by which the authority lets it sign tasks, and that holds now.

    Raises:
        ProtocolError: it is no such certificate.
    """
    try:
        certificate = x509.load_der_x509_certificate(encoded)
        certificate.verify_directly_issued_by(authority)
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise ProtocolError("the task's certificate is none of this federation's authority that signs tasks") from error
    if list(uses) != [SIGNS_TASKS] or not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("the task's certificate is of this federation's authority, and not one that signs tasks")
    if not certificate.not_valid_before_utc <= (now or datetime.now(UTC)) <= certificate.not_valid_after_utc:
        raise ProtocolError(f"the task's certificate does not hold now by this site's clock: set the clock, or {RENEW}")
    return key


def sign_answer(record: RecordDict, task: bytes, keys: SiteKeys) -> None:
    """Put a site's signature into its answer to the task of this digest."""
    signature = keys.node.sign(_answer(record, task), ec.ECDSA(hashes.SHA384()))
    record.config_records["header"][SIGNATURE] = signature


def is_answer(record: RecordDict, task: bytes, public: bytes) -> bool:
    """Return whether a site has signed a message as its answer to the task of this digest.

    Args:
        record: the message; nothing in it is believed.
        task: the digest.
        public: the site's public key, a line in OpenSSH form.
    """
    try:
        key, signature = load_ssh_public_key(public), record.config_records["header"][SIGNATURE]
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(signature, bytes):
            return False
        key.verify(signature, _answer(record, task), ec.ECDSA(hashes.SHA384()))
    except Exception:  # a peer chooses these bytes: whatever they break, they are no answer of that site
        return False
    return True


def check_unsigned(config: RunConfig) -> None:
    """Raise PolicyRefusal if a run without signatures counts on a secret draw of sites.

    Any registered site could send them tasks, and see by what becomes of them who was drawn.
    """
    if config.privacy.site_rate < 1:
        raise PolicyRefusal(
            f"privacy.site-rate = {config.privacy.site_rate:g} counts on nobody knowing who is drawn, and nobody signs "
            "this run's messages, so any registered site may meddle: start with 'fedveil server start' and 'fedveil "
            "site start', or set it to 1"
        )


def certificate_der(pem: bytes) -> bytes:
    """Return a certificate as it travels; ValueError if ``pem`` holds none."""
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def _answer(record: RecordDict, task: bytes) -> bytes:
    return canonical(ANSWER, {"task": task} | _content(record))


def _content(record: RecordDict) -> dict[str, Value]:
    """Return all of a message but its signature and certificate, by name.

    Raises:
        ProtocolError: it has other records, or other fields of a header, than a message of FedVeil.
    """
    header = record.config_records.get("header")
    if header is None or len(record.config_records) > 1 or record.metric_records:
        raise ProtocolError("the message has not the one header that a message of FedVeil has")
    fields = {key: value for key, value in header.items() if key not in (SIGNATURE, CERTIFICATE)}
    if set(fields) != {"protocol", "nonce", "body"}:
        raise ProtocolError(f"the message's header has the fields {sorted(fields)}")
    protocol, nonce, body = fields["protocol"], fields["nonce"], fields["body"]
    if not (type(protocol) is int and isinstance(nonce, bytes) and isinstance(body, bytes)):
        raise ProtocolError("the message's header has a field of another type than a message of FedVeil")
    # What Flower reads from JSON may be of any type.
    blocks: list[Value] = [
        [block, name, repr([array.dtype, array.stype, array.shape]), hashlib.sha256(array.data).digest()]
        for block, arrays in sorted(record.array_records.items())
        for name, array in sorted(arrays.items())
    ]
    # A block without an array is one, too.
    return {"protocol": protocol, "nonce": nonce, "body": body, "blocks": blocks, "named": sorted(record.array_records)}

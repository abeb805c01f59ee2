"""The federation's certificate authority and the server's certificate (X.509, ECDSA P-384).

Both hold what RFC 5280 asks for and Python's contexts check by default from 3.13 on (VERIFY_X509_STRICT): key
identifiers (sections 4.2.1.1 and 4.2.1.2) and critical key usage (4.2.1.3).

Sites know one thing of the server: the authority's certificate. The authority's key can make a false server, so it is
needed only to issue, and is best kept on another machine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.signed import SIGNS_TASKS

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,62})?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62})?)*")
CLOCK_ALLOWANCE = timedelta(minutes=10)
"""A new certificate is valid from this long ago, for sites whose clock is behind."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def new_authority(name: str) -> Issued:
    """Return a new certificate authority that can issue server certificates and no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        _builder(subject, subject, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    )
    return Issued(_pem(builder.sign(key, hashes.SHA384())), _key_pem(key))


def new_server_certificate(names: Sequence[str], authority: Issued, now: datetime | None = None) -> Issued:
    """Return a server certificate for ``names`` (host names and IP addresses), signed by ``authority``.

    It is valid for SERVER_DAYS from ``now``, which defaults to the present.

    Raises:
        ConfigError: there is no name, or one is neither a host name nor an address.
        DataError: the authority's files are not a certificate and its key.
    """
    key, alternatives = ec.generate_private_key(ec.SECP384R1()), alternative_names(names)
    builder = (
        _issued(names[0][:64], key, authority, now)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
    )
    return Issued(_pem(builder.sign(_read_key(authority.key), hashes.SHA384())), _key_pem(key))


def new_task_certificate(authority: Issued, now: datetime | None = None) -> Issued:
    """Return a key that signs tasks (Ed25519), and its certificate, which is good for nothing else; as the server's.

    Raises:
        DataError: the authority's files are not a certificate and its key.
    """
    key = Ed25519PrivateKey.generate()
    builder = _issued("FedVeil tasks", key, authority, now).add_extension(
        x509.ExtendedKeyUsage([SIGNS_TASKS]), critical=True
    )
    return Issued(_pem(builder.sign(_read_key(authority.key), hashes.SHA384())), _key_pem(key))


def _issued(
    name: str, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, authority: Issued, now: datetime | None
) -> x509.CertificateBuilder:
    """Return the beginning of a certificate that an authority issues for the signatures of a key."""
    issuer = read_certificate(authority.certificate, "the authority")
    if not belongs_to(issuer, authority.key):
        raise DataError("the authority's ca.key is not the key of its ca.crt: put both back from one copy")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, issuer.subject, key, SERVER_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_identifier_of(issuer), critical=False)
    )


def alternative_names(names: Sequence[str]) -> x509.SubjectAlternativeName:
    """Return host names and addresses in the form that a certificate holds them.

    Raises:
        ConfigError: there is no name, or one is neither a host name nor an address.
    """
    if not names:
        raise ConfigError("a server certificate needs at least one name that sites dial")
    return x509.SubjectAlternativeName([_general_name(name) for name in names])


def other_issuer(shown: bytes, authority: bytes) -> str:
    """Return the name of a certificate's (DER) issuer if an authority's (PEM) is another; empty: it is the same.

    Raises:
        ValueError: what is shown is no certificate.
    """
    issuer = x509.load_der_x509_certificate(shown).issuer
    return "" if issuer == read_certificate(authority, "the authority").subject else issuer.rfc4514_string()


def read_certificate(pem: bytes, whose: str) -> x509.Certificate:
    """Return the certificate in ``pem``.

    Raises:
        DataError: it is not one.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise DataError(f"the certificate of {whose} is not in PEM form: copy the file again") from error


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the host names and addresses that a certificate holds for; empty if it names none."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def days_left(certificate: x509.Certificate) -> float:
    """Return the days until a certificate expires; negative: it has expired."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def belongs_to(certificate: x509.Certificate, key_pem: bytes) -> bool:
    """Whether the private key in ``key_pem`` is the certificate's.

    Raises:
        DataError: it is not an elliptic-curve key in PEM form.
    """
    return _read_key(key_pem).public_key() == certificate.public_key()


def lacks(certificate: x509.Certificate) -> list[str]:
    """Return the names of what Python 3.13's default context asks of a certificate and this one has not."""
    wanted = {
        "subject key identifier": x509.SubjectKeyIdentifier,
        "authority key identifier": x509.AuthorityKeyIdentifier,
        "key usage": x509.KeyUsage,
    }
    present = {type(extension.value) for extension in certificate.extensions}
    return [name for name, kind in wanted.items() if kind not in present]


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 as people read it to each other: ``AB:CD:...``."""
    return as_fingerprint(certificate.fingerprint(hashes.SHA256()))


def as_fingerprint(digest: bytes) -> str:
    """Return a digest in the form of ``fingerprint``."""
    return digest.hex(":").upper()


def _identifier_of(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Return how a certificate names its issuer's key: as the issuer does itself."""
    try:
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        own = x509.SubjectKeyIdentifier.from_public_key(issuer.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _usage(**allowed: bool) -> x509.KeyUsage:
    uses = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    return x509.KeyUsage(
        **dict.fromkeys((*uses, "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False) | allowed
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey,
    days: int,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_ALLOWANCE)
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not HOST_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is neither a host name nor an IP address") from None
    return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except ValueError as error:
        raise DataError("a private key is not in PEM form: restore it, or make a new pair") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError("a private key is not an elliptic-curve key: make a new pair")
    return key

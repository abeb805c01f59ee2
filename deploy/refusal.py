"""The reason why a server would not let a site in, in one line; Flower itself only says that it could not connect."""

from __future__ import annotations

import ssl

from fedveil.common.errors import DataError
from fedveil.deploy.certificates import other_issuer
from fedveil.deploy.files import read_bytes
from fedveil.deploy.fleet import ask_to_join
from fedveil.deploy.fleet_answers import PATIENCE, Answer
from fedveil.deploy.node_keys import read_node_key
from fedveil.deploy.road import ProxyRefusal, Road
from fedveil.deploy.site_folder import SiteFolder

NOT_YET_VALID, EXPIRED, NAMES = 9, 10, (62, 64)
"""OpenSSL's verification errors."""


def why_unreachable(folder: SiteFolder) -> str:
    """Return why no trusted connection to the server comes about; empty: it does.

    Raises:
        DataError: ``ca.crt`` cannot be read or is no certificate.
    """
    where, pem = f"the server at {folder.server}", read_bytes(folder.path / "ca.crt", "the authority's certificate")
    context, road = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), folder.road
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise DataError(f"{folder.path / 'ca.crt'} is no certificate: copy it from the coordinator again") from error
    try:
        _shown(folder, road, context)
    except ProxyRefusal as error:
        return str(error)
    except ssl.SSLCertVerificationError as error:
        if road.proxy and (issuer := _other_issuer(folder, road, pem)):
            return (
                f"the proxy {road.proxy} opens TLS: it shows a certificate of {issuer!r} in place of the server's; "
                f"have it pass {folder.server} on unopened"
            )
        return f"{where} is refused: {_certificate_words(error, folder)}"
    except ssl.SSLError as error:
        return f"{where} does not speak TLS ({error.reason}): is {folder.port} its Fleet port?"
    except OSError as error:
        return f"{where} does not answer ({error.strerror or error}): is it running, and is the port open?"
    return ""


def _shown(folder: SiteFolder, road: Road, context: ssl.SSLContext) -> bytes:
    """Return the certificate that ends TLS on the road to the server, DER."""
    with (
        road.connect(folder.host, folder.port, PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=folder.host) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def _other_issuer(folder: SiteFolder, road: Road, authority: bytes) -> str:
    """Return whose certificate is shown, if it is not of an authority of the pinned one's name; empty: it is."""
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    try:
        return other_issuer(_shown(folder, road, unchecked), authority)
    except (OSError, ValueError, ProxyRefusal):
        return ""


def _certificate_words(error: ssl.SSLCertVerificationError, folder: SiteFolder) -> str:
    if error.verify_code == EXPIRED:
        return "its certificate has expired: the coordinator renews it with 'fedveil server renew'"
    if error.verify_code == NOT_YET_VALID:
        return "its certificate is not valid yet: is this machine's clock right?"
    if error.verify_code in NAMES:
        return f"its certificate does not hold for the name {folder.host!r}: dial a name that it holds for"
    return f"its certificate is not of the authority in ca.crt ({error.verify_message}): copy ca.crt again"


def why_refused(folder: SiteFolder) -> str:
    """Return why the server would not let this site in; empty: it would.

    Raises:
        DataError: a file of the folder cannot be read.
    """
    reason = why_unreachable(folder)
    if reason:
        return reason
    key = read_node_key(read_bytes(folder.path / "node.key", "the site's private key"))
    authority = read_bytes(folder.path / "ca.crt", "the authority's certificate")
    reply = ask_to_join(folder.server, authority, key, folder.road)
    if reply.answer is Answer.REGISTERED:
        return ""
    advice = {
        Answer.UNKNOWN_KEY: "send node.pub to the coordinator, who registers it with 'fedveil server register'",
        Answer.CLOCK: "set this machine's clock by NTP (5 seconds ahead or 5 minutes behind are too much)",
    }.get(reply.answer, reply.words)
    return f"{reply.answer.value}: {advice}"

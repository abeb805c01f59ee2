"""The reason why a server would not let a site in, in one line; Flower itself only says that it could not connect."""

from __future__ import annotations

import socket
import ssl

from fedveil.common.errors import DataError
from fedveil.deploy.files import read_bytes
from fedveil.deploy.fleet import PATIENCE, Answer, ask_to_join
from fedveil.deploy.node_keys import read_node_key
from fedveil.deploy.site_folder import SiteFolder

NOT_YET_VALID, EXPIRED, NAMES = 9, 10, (62, 64)
"""OpenSSL's verification errors."""


def why_unreachable(folder: SiteFolder) -> str:
    """Return why no trusted connection to the server comes about; empty: it does.

    Raises:
        DataError: ``ca.crt`` cannot be read or is no certificate.
    """
    where, pem = f"the server at {folder.server}", read_bytes(folder.path / "ca.crt", "the authority's certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise DataError(f"{folder.path / 'ca.crt'} is no certificate: copy it from the coordinator again") from error
    try:
        with (
            socket.create_connection((folder.host, folder.port), timeout=PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=folder.host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"{where} is refused: {_certificate_words(error, folder)}"
    except ssl.SSLError as error:
        return f"{where} does not speak TLS ({error.reason}): is {folder.port} its Fleet port?"
    except OSError as error:
        return f"{where} does not answer ({error.strerror or error}): is it running, and is the port open?"


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
    reply = ask_to_join(folder.server, read_bytes(folder.path / "ca.crt", "the authority's certificate"), key)
    if reply.answer is Answer.REGISTERED:
        return ""
    advice = {
        Answer.UNKNOWN_KEY: "send node.pub to the coordinator, who registers it with 'fedveil server register'",
        Answer.CLOCK: "set this machine's clock by NTP (5 seconds ahead or 5 minutes behind are too much)",
    }.get(reply.answer, reply.words)
    return f"{reply.answer.value}: {advice}"

"""Connections of a run and its server's own check, in words: only what the server app could know.

The server app queried a port itself. That the sites dialled that port is the operator's word, and is reported so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedveil.common.server_file import CheckLine, ServerFile, ServerStart

NO_NETWORK = {
    "simulation": "Nothing went over a network: the sites were simulated on the server's machine. So there was no TLS, "
    "no certificate, and no site had a key.",
    "one process": "Nothing went over a network: server and sites were one process. So there was no TLS, no "
    "certificate, and no site had a key.",
}
"""By how sites are reached."""
NOT_KNOWN = "Not known to the server app:"
"""Before what only the operator can say."""
NOT_NAMED = (
    f"{NOT_KNOWN} whether connections were under TLS, by which certificate, and whether sites had to prove themselves "
    "by keys. The SuperLink was not started by 'fedveil server start', which says where they lie."
)
NEVER_KNOWN = (
    "which port the sites dialled, and whether anything stands between them and it: that it is the one which was asked "
    "is the operator's word",
    "against which authority each site checks the certificate: each steward's own ca.crt decides",
    "whether the server's clock is right: nothing here could be compared with it",
)
"""Of a run over a network."""
SITES_OWN = "What a site's own check finds stays at that site, and nothing of it is here."
NOT_RECORDED = f"{NOT_KNOWN} anything of its connections: the run's folder does not say."


@dataclass(frozen=True)
class ConnectionReport:
    """What the server knew at one start of the run, or at several that found the same."""

    began: list[str]
    """UTC, ISO 8601."""
    bundle: str
    """SHA-256 of the server's code."""
    said: list[str]
    """TLS, certificate and keys, a sentence each."""
    tls: bool | None
    """None: not known, or nothing went over a network."""
    certificate: str
    """SHA-256 fingerprint of what the port of the sites showed; empty: not known."""
    keys: bool | None
    unknown: list[str]
    """What the server app cannot know, a phrase each."""
    checks: list[CheckLine]
    """The server's own check; empty: none was made."""

    @property
    def failed(self) -> list[CheckLine]:
        """What was not well."""
        return [check for check in self.checks if not check.ok]


def connection_reports(file: ServerFile | None) -> list[ConnectionReport]:
    """Return what the server knew, starts that found the same together; empty: nothing is recorded."""
    found: list[ConnectionReport] = []
    for start in file.starts if file else []:
        report = _report(start)
        same = next((n for n, other in enumerate(found) if replace(other, began=[]) == replace(report, began=[])), None)
        if same is None:
            found.append(report)
        else:
            found[same] = replace(found[same], began=[*found[same].began, *report.began])
    return found


def connection_cares(reports: Sequence[ConnectionReport]) -> list[str]:
    """Return what of the connections, and of the server's own check, was not well: every form says it first."""
    cares = []
    for report in reports:
        when = f"when the server began at {report.began[0]}"
        if report.tls is False:
            cares.append(f"{when}, the port of the sites was NOT under TLS")
        if report.keys is False:
            cares.append(f"{when}, sites did NOT have to prove themselves by keys")
        cares += [f"{when}, its own check failed: {check.what}: {check.found}" for check in report.failed]
    return cares


def connection_sentences(reports: Sequence[ConnectionReport]) -> list[str]:
    """Return TLS, certificate and keys of all starts in sentences, for others than the report."""
    if not reports:
        return [NOT_RECORDED]
    return list(dict.fromkeys(text for report in reports for text in report.said))


def _report(start: ServerStart) -> ConnectionReport:
    network, check = start.reach == "network", start.check
    return ConnectionReport(
        began=[start.began],
        bundle=start.bundle,
        said=_said(start) if network else [NO_NETWORK[start.reach]],
        tls=check.tls,
        certificate=check.certificate,
        keys=check.keys,
        unknown=list(NEVER_KNOWN) if network else [],
        checks=check.checks,
    )


def _said(start: ServerStart) -> list[str]:
    check = start.check
    if not check.named:
        return [NOT_NAMED]
    tls = {
        True: "TLS: the port of the sites took a TLS handshake when the run began, asked by the server app itself.",
        False: "TLS: none. The port of the sites took no TLS handshake when the run began.",
        None: f"{NOT_KNOWN} whether connections were under TLS. The port of the sites could not be asked.",
    }[check.tls]
    shown = [f"Certificate: the port showed the one of SHA-256 {check.certificate}."] if check.certificate else []
    unsaid = (
        "The port was asked, and its answer does not tell."
        if check.tls
        else "The port of the sites could not be asked."
    )
    keys = {
        True: "Keys: this port turned away a key that nobody had registered.",
        False: "Keys: none. This port took a key that nobody had registered.",
        None: f"{NOT_KNOWN} whether sites had to prove themselves by keys. {unsaid}",
    }[check.keys]
    return [tls, *shown, keys]

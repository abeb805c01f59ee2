"""Connections of a run and its server's own check, in words: only what the server app could know.

The server app queried a port itself. That the sites dialled that port is the operator's word, and is reported so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedveil.common.server_file import CheckLine, ServerFile, ServerStart
from fedveil.common.words import pathless

NO_NETWORK = {
    "simulation": "Nothing went over a network: the sites were simulated on the server's machine. There was no TLS, no "
    "certificate, and no site had a key.",
    "one process": "Nothing went over a network: server and sites were one process. There was no TLS, no "
    "certificate, and no site had a key.",
}
"""By how sites are reached."""
NOT_KNOWN = "The server cannot know"
"""Before what only the operator can say."""
NOT_NAMED = (
    f"{NOT_KNOWN} whether connections used TLS, with which certificate, and whether sites had to authenticate by key. "
    "The SuperLink was not started by 'fedveil server start', which records them."
)
NEVER_KNOWN = (
    "whether the sites dialled the port that it checked, or a proxy in front of it",
    "which authority each site checks the certificate against: each steward's own ca.crt decides",
    "whether its clock is right: it had nothing to compare it with",
)
"""Of a run over a network."""
SITES_OWN = "A site's own check stays at that site and is not part of this report."
NOT_RECORDED = "The run's folder says nothing about the server's connections."


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
        when = f"when the server started at {report.began[0]}"
        if report.tls is False:
            cares.append(f"{when}, the sites' port did NOT use TLS")
        if report.keys is False:
            cares.append(f"{when}, sites did NOT have to authenticate by key")
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
        checks=[replace(line, found=pathless(line.found)) for line in check.checks],
    )


def _said(start: ServerStart) -> list[str]:
    check = start.check
    if not check.named:
        return [NOT_NAMED]
    tls = {
        True: "TLS: on. The server checked the sites' port when the run began.",
        False: "TLS: off. The sites' port took no TLS handshake when the run began.",
        None: f"{NOT_KNOWN} whether connections used TLS. The sites' port could not be checked.",
    }[check.tls]
    shown = [f"Certificate: SHA-256 {check.certificate}."] if check.certificate else []
    unsaid = (
        "The port was checked, and its answer does not say." if check.tls else "The sites' port could not be checked."
    )
    keys = {
        True: "Keys: required. The port turned away an unregistered key.",
        False: "Keys: not required. The port accepted an unregistered key.",
        None: f"{NOT_KNOWN} whether sites had to authenticate by key. {unsaid}",
    }[check.keys]
    return [tls, *shown, keys]

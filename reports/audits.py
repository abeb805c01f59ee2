"""The audits of a run's folder, as a report prints them: each passed or failed, when, and with which versions.

``make audit RUN=folder`` writes ``audit.json``. A report judges by the findings in it alone: a file
that says "passed" but holds a failed finding has failed, and one without findings says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedveil.common.findings import AuditFile, Finding
from fedveil.privacy.figures import epsilon_text, honest_text

COMPARED = ("fedveil", "torch", "opacus", "dp-accounting", "flwr")
"""Packages that carry the promise: an audit with other versions of them is not of the code that ran."""
NONE_RUN = "No audit was run: the run's folder holds no findings of one."

WHOSE = (
    "Findings are read from files in the run's folder. Only the signer of this report vouches for them: to be sure, "
    "run the audits yourself."
)


@dataclass(frozen=True)
class AuditReport:
    """One audit of one file."""

    file: str
    audit: str
    passed: bool
    """The code passed wherever it was looked at, and every fault that was built in was found."""
    checks: int
    """Times that the audit looked at the code as it is."""
    checks_failed: int
    faults: int
    """Faults that were built in."""
    faults_missed: int
    date: str
    """UTC, ISO 8601; of the whole file."""
    versions: dict[str, str]
    epsilon_claimed: float | None
    """The ε that the audited code claimed, in the case that the attack came nearest to; None: the audit bounds no ε."""
    epsilon_at_least: float | None
    """The lower bound on ε that the attack gave there."""
    honest_sites: int = 0
    """Of each sum, that the claimed ε counts on; 0: it counts on no other site."""


def audit_reports(contents: Mapping[str, AuditFile], problems: list[str]) -> list[AuditReport]:
    """Return what the files say, one entry per audit; a file without findings is named in ``problems``.

    Args:
        contents: by file name.
        problems: sentences are added.
    """
    reports = []
    for file, content in contents.items():
        if not content.findings:
            problems.append(f"{file} holds no findings: it does not say that any audit passed")
        for audit in dict.fromkeys(finding.audit for finding in content.findings):
            own = [finding for finding in content.findings if finding.audit == audit]
            faults = [finding.passed for finding in own if finding.built_in]
            checks = [finding.passed for finding in own if not finding.built_in]
            claimed, at_least = _bounds(own)
            reports.append(
                AuditReport(
                    file=file,
                    audit=audit,
                    # An audit that only ever looked at faults says nothing about the code.
                    passed=bool(checks) and all(checks) and all(faults),
                    checks=len(checks),
                    checks_failed=checks.count(False),
                    faults=len(faults),
                    faults_missed=faults.count(False),
                    date=content.date or "not recorded",
                    versions=content.versions,
                    epsilon_claimed=claimed,
                    epsilon_at_least=at_least,
                    honest_sites=max((int(finding.figures.get(HONEST, 0)) for finding in own), default=0),
                )
            )
    return reports


CLAIMED, AT_LEAST = "epsilon claimed", ("epsilon is at least", "is at least")
"""What audits call the figures of an attack that bounds ε."""
HONEST = "honest sites that it counts on"
"""What they call those of a sum."""


def _bounds(findings: Sequence[Finding]) -> tuple[float | None, float | None]:
    """Return claim and lower bound of the case that comes nearest to its claim, of the code as it is; else None."""
    found = [
        (float(claimed), float(least))
        for finding in findings
        for name in AT_LEAST
        if not finding.built_in
        and isinstance(claimed := finding.figures.get(CLAIMED), int | float)
        and isinstance(least := finding.figures.get(name), int | float)
    ]
    return max(found, key=lambda pair: pair[1] - pair[0]) if found else (None, None)


def bound_sentences(reports: Sequence[AuditReport]) -> list[str]:
    """Return what attacks of the audits found of ε, beside what was claimed, a sentence each."""
    return [
        f"{report.audit}: the attack shows ε to be at least {epsilon_text(report.epsilon_at_least)} where "
        f"{_claimed(report)} was claimed ({report.file}, a small run made for the audit)"
        for report in reports
        if report.epsilon_claimed is not None and report.epsilon_at_least is not None
    ]


def bound_note(reports: Sequence[AuditReport]) -> str:
    """Return the nearest that an attack came to what was claimed, to be read beside ε; empty: none bounds it."""
    found = [
        (report.epsilon_at_least - report.epsilon_claimed, report)
        for report in reports
        if report.epsilon_claimed is not None and report.epsilon_at_least is not None
    ]
    if not found:
        return ""
    _, nearest = max(found, key=lambda pair: pair[0])
    return (
        f"An audit's attack shows ε to be at least {epsilon_text(nearest.epsilon_at_least)} where {_claimed(nearest)} "
        "was claimed, in a small run made for the audit."
    )


def _claimed(report: AuditReport) -> str:
    return epsilon_text(report.epsilon_claimed) + honest_text(report.honest_sites)


def audit_alarms(reports: Sequence[AuditReport]) -> list[str]:
    """Return a sentence for every audit that failed: nothing in a report may be read past it."""
    return [
        f"{report.audit} ({report.file}, {report.date}): {report.checks_failed} of {report.checks} checks of the code "
        f"failed, {report.faults_missed} of {report.faults} planted faults were missed. Do not rely on the claim."
        for report in reports
        if not report.passed
    ]


def audit_cares(reports: Sequence[AuditReport], versions: Mapping[str, str]) -> list[str]:
    """Return a sentence for every file whose audits ran with other versions than the run did."""
    cares = []
    for report in {report.file: report for report in reports}.values():
        other = [
            f"{name} {report.versions[name]} (the run: {versions[name]})"
            for name in COMPARED
            if name in report.versions and name in versions and report.versions[name] != versions[name]
        ]
        if other:
            cares.append(f"the audits in {report.file} ran with {', '.join(other)}")
    return cares


def audit_words(report: AuditReport) -> tuple[str, str, str, str]:
    """Return outcome, checks, faults and versions in words."""
    versions = ", ".join(f"{name} {report.versions[name]}" for name in COMPARED if name in report.versions)
    return (
        "passed" if report.passed else "FAILED",
        f"{report.checks - report.checks_failed} of {report.checks} passed",
        f"{report.faults - report.faults_missed} of {report.faults} found",
        versions or "not recorded",
    )

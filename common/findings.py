"""The findings of audits and of tests with faults, and the file of them in a run's folder."""

from __future__ import annotations

from dataclasses import dataclass

AUDITS = "audit*"
"""Names of the files in which audits leave their findings, each an ``AuditFile``."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one audit, or of one fault that was built in to see whether the audit sees it."""

    audit: str
    case: str
    """What ran, in words; for a fault that was built in, its name."""
    built_in: bool
    """Whether the case is a fault that was built in on purpose."""
    passed: bool
    """The code as it is: no violation. A built-in fault: it was found."""
    figures: dict[str, int | float | str]
    """Counts and epsilons by name."""


@dataclass(frozen=True)
class AuditFile:
    """What audits of a run's code found."""

    passed: bool
    """Whether all did."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    findings: list[Finding]

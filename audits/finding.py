"""The finding of an audit, for people and as JSON."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedveil.common.findings import AuditFile, Finding

SOUND = "as it is"
"""The case of a finding about the code, with nothing built in."""
FAULT = "fault built in"


def judged(audit: str, fault: str, alarm: bool, figures: dict[str, int | float | str]) -> Finding:
    """Return the finding of an audit that gave the ``alarm``, or did not, while ``fault`` (or none) was built in.

    Args:
        audit: its name.
        fault: name of what was built in; empty: nothing.
        alarm: whether the audit objects.
        figures: what it measured.
    """
    return Finding(audit, fault or SOUND, bool(fault), alarm == bool(fault), figures)


def quiet() -> None:
    """Keep what libraries and sites say out of the table; a fault is a finding, never a line of a log."""
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def show(console: Console, findings: Sequence[Finding]) -> None:
    """Print one table of all findings, and one of which audit found which fault."""
    table = Table(title="Audit of the privacy budget", title_justify="left")
    for name in ("audit", "case", "outcome", "figures"):
        table.add_column(name)
    for finding in findings:
        figures = "\n".join(f"{name}: {_spoken(value)}" for name, value in finding.figures.items())
        case = f"{FAULT}: {finding.case}" if finding.built_in else finding.case
        table.add_row(finding.audit, case, _outcome(finding), figures, end_section=True)
    console.print(table)
    faults = list(dict.fromkeys(finding.case for finding in findings if finding.built_in))
    if not faults:
        return
    grid = Table(title="Which audit found which fault", title_justify="left")
    for name in (FAULT, "found by", "missed by"):
        grid.add_column(name)
    for fault in faults:
        own = [finding for finding in findings if finding.built_in and finding.case == fault]
        # Of several runs of one audit with one fault the worst counts.
        missed = dict.fromkeys(finding.audit for finding in own if not finding.passed)
        found = dict.fromkeys(finding.audit for finding in own if finding.audit not in missed)
        grid.add_row(fault, ", ".join(found), f"[bold red]{', '.join(missed)}[/]" if missed else "", end_section=True)
    console.print(grid)


def audit_file(findings: Sequence[Finding], when: str, versions: dict[str, str]) -> AuditFile:
    """Return the content of ``audit.json``: whether all passed, when, with which versions, and every finding."""
    return AuditFile(all(finding.passed for finding in findings), when, versions, list(findings))


def _outcome(finding: Finding) -> str:
    good, bad = ("found", "MISSED") if finding.built_in else ("passed", "FAILED")
    return f"[green]{good}[/]" if finding.passed else f"[bold red]{bad}[/]"


def _spoken(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

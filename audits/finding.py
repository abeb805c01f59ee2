"""What an audit found, for people and as JSON."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

SOUND = "as it is"
FAULT = "fault built in: "
"""How a case begins in which something was broken on purpose."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one audit, or of one fault that was built in to see whether the audit sees it."""

    audit: str
    case: str
    """What ran: the code as it is, or the fault that was built in."""
    passed: bool
    """The code as it is: no violation. A built-in fault: it was found."""
    figures: dict[str, int | float | str]
    """Counts and epsilons by name."""

    @property
    def fault(self) -> str:
        """The fault's name; empty for the code as it is."""
        return self.case.removeprefix(FAULT) if self.case.startswith(FAULT) else ""


def judged(audit: str, fault: str, alarm: bool, figures: dict[str, int | float | str]) -> Finding:
    """Return the finding of an audit that gave the ``alarm``, or did not, while ``fault`` (or none) was built in.

    Args:
        audit: its name.
        fault: name of what was built in; empty: nothing.
        alarm: whether the audit objects.
        figures: what it measured.
    """
    return Finding(audit, f"{FAULT}{fault}" if fault else SOUND, alarm == bool(fault), figures)


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
        table.add_row(finding.audit, finding.case, _outcome(finding), figures, end_section=True)
    console.print(table)
    faults = list(dict.fromkeys(finding.fault for finding in findings if finding.fault))
    if not faults:
        return
    grid = Table(title="Which audit found which fault", title_justify="left")
    for name in ("fault built in", "found by", "missed by"):
        grid.add_column(name)
    for fault in faults:
        own = [finding for finding in findings if finding.fault == fault]
        # Of several runs of one audit with one fault the worst counts.
        missed = dict.fromkeys(finding.audit for finding in own if not finding.passed)
        found = dict.fromkeys(finding.audit for finding in own if finding.audit not in missed)
        grid.add_row(fault, ", ".join(found), f"[bold red]{', '.join(missed)}[/]" if missed else "", end_section=True)
    console.print(grid)


def as_json(findings: Sequence[Finding], when: str, versions: dict[str, str]) -> dict[str, Any]:
    """Return the content of ``audit.json``: whether all passed, when, with which versions, and every finding."""
    return {
        "passed": all(finding.passed for finding in findings),
        "date": when,
        "versions": versions,
        "findings": [asdict(finding) for finding in findings],
    }


def _outcome(finding: Finding) -> str:
    good, bad = ("found", "MISSED") if finding.fault else ("passed", "FAILED")
    return f"[green]{good}[/]" if finding.passed else f"[bold red]{bad}[/]"


def _spoken(value: int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""What an audit found, for people and as JSON."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

FAULT = "fault built in"
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


def quiet() -> None:
    """Keep what libraries and sites say out of the table; a fault is a finding, never a line of a log."""
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def show(console: Console, findings: Sequence[Finding]) -> None:
    """Print one table of all findings."""
    table = Table(title="Audit of the privacy budget", title_justify="left")
    for name in ("audit", "case", "outcome", "figures"):
        table.add_column(name)
    for finding in findings:
        figures = "\n".join(f"{name}: {_spoken(value)}" for name, value in finding.figures.items())
        good, bad = ("found", "MISSED") if finding.case.startswith(FAULT) else ("passed", "FAILED")
        outcome = f"[green]{good}[/]" if finding.passed else f"[bold red]{bad}[/]"
        table.add_row(finding.audit, finding.case, outcome, figures, end_section=True)
    console.print(table)


def as_json(findings: Sequence[Finding], when: str, versions: dict[str, str]) -> dict[str, Any]:
    """Return the content of ``audit.json``: whether all passed, when, with which versions, and every finding."""
    return {
        "passed": all(finding.passed for finding in findings),
        "date": when,
        "versions": versions,
        "findings": [asdict(finding) for finding in findings],
    }


def _spoken(value: int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

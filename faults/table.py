"""The table that ``make faults`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedveil.common.findings import Finding

COLUMNS = ("took part", "told", "charged", "adapter")
"""Figures that every round's finding has; others stand under "besides"."""


def show(console: Console, findings: Sequence[Finding], seconds: float) -> None:
    """Print all findings: the fault, who took part, what rounds.jsonl tells, the ledgers, the adapter."""
    table = Table(title="Faults on a real federation", title_justify="left")
    for name in ("fault", "outcome", "took part", "rounds.jsonl tells", "charged", "adapter", "besides"):
        table.add_column(name)
    group = ""
    for finding in findings:
        if finding.audit != group:
            group = finding.audit
            table.add_section()
        outcome = "[green]passed[/]" if finding.passed else "[bold red]FAILED[/]"
        besides = "\n".join(
            f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in finding.figures.items()
            if name not in COLUMNS
        )
        cells = [str(finding.figures.get(name, "")).replace("[", r"\[") for name in COLUMNS]
        table.add_row(f"{group}: {finding.case}", outcome, *cells, besides.replace("[", r"\["))
    console.print(table)
    failed = sum(not finding.passed for finding in findings)
    console.print(f"{len(findings)} rounds, {failed} failed, {seconds:.0f} s")

"""A report in all its forms, and the command line, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.findings import AuditFile, Finding
from fedveil.reports import write_reports


def forms(folder: Path) -> dict[str, str]:
    """Return the report in its three forms."""
    write_reports(folder)
    return {name: (folder / f"report.{name}").read_text(encoding="utf-8") for name in ("md", "html", "json")}


def fedveil(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def audit_file(*findings: Finding, torch: str = "2.13.0") -> AuditFile:
    """Return a file that says "passed", which is never believed: the findings are what counts."""
    return AuditFile(True, "2026-11-25T08:00:00+00:00", {"fedveil": "0.1.0", "torch": torch}, list(findings))


def found(audit: str, fault: str = "", passed: bool = True) -> Finding:
    return Finding(audit, fault or "as it is", bool(fault), passed, {})

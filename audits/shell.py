"""Run one audit with every fault, or alone from a shell; ``python -m audits`` runs them all."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from audits.faults import SOUND, Fault
from audits.finding import quiet, show
from fedveil.common.findings import Finding


def with_each(faults: Sequence[Fault], folder: Path, audit: Callable[[Path, Fault], Finding]) -> list[Finding]:
    """Audit the code as it is, then with each fault; every time in a new folder inside ``folder``."""
    findings = []
    for number, fault in enumerate((SOUND, *faults)):
        own = folder / str(number)
        own.mkdir()
        findings.append(audit(own, fault))
    return findings


def each_of(cases: Mapping[Callable[[Path, Fault], Finding], Sequence[Fault]], folder: Path) -> list[Finding]:
    """Run audits, each as ``with_each`` does with the faults that it must find, in a folder of its own."""
    found: list[Finding] = []
    for audit, faults in cases.items():
        own = folder / audit.__name__
        own.mkdir()
        found += with_each(faults, own, audit)
    return found


def run_alone(about: str | None, count: str, default: int, audit: Callable[[Path, int], Sequence[Finding]]) -> None:
    """Run ``audit`` in an empty folder, print what it found, and exit with 1 if anything failed.

    Args:
        about: what ``--help`` says.
        count: name of the option that says how many.
        default: how many without it.
        audit: takes the folder and how many.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{count}", type=int, default=default)
    wanted = vars(parser.parse_args())[count]
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        findings = audit(Path(folder), wanted)
    show(Console(highlight=False, emoji=False), findings)
    sys.exit(not all(finding.passed for finding in findings))

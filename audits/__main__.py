"""All audits, one table, and ``audit.json`` in a run's folder, where its report looks for it.

make audit
make audit RUN=runs/my-run
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from audits.canary import probe_all
from audits.concurrent import charge_at_once
from audits.finding import as_json, quiet, show
from audits.kills import kill_rounds
from server.files import replace_file
from server.records import package_versions


def main() -> None:
    """Run from a shell; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--bouts", type=int, default=20)
    parser.add_argument("--run", type=Path, help="folder of a run: audit.json goes there")
    wanted = parser.parse_args()
    if wanted.run and not (wanted.run / "config.json").is_file():
        parser.error(f"{wanted.run} is not the folder of a run: it has no config.json")
    console = Console(highlight=False)
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / audit for audit in ("kills", "concurrent", "canaries")]
        for folder in folders:
            folder.mkdir()
        findings = [
            kill_rounds(folders[0], wanted.kills),
            charge_at_once(folders[1], wanted.bouts),
            *probe_all(folders[2]),
        ]
    show(console, findings)
    if wanted.run:
        content = as_json(findings, datetime.now(UTC).isoformat(timespec="seconds"), package_versions())
        path = wanted.run / "audit.json"
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
        console.print(f"written to {path}; 'fedveil report' names it from now on", markup=False, soft_wrap=True)
    sys.exit(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    main()

"""Write pages of a rich run and of one of a thousand sites, for ``make browser``: report_pages.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from rich_run import rich, unlike

from fedveil.reports.files import write_reports

if __name__ == "__main__":
    for name, made in (("rich", rich), ("thousand", unlike)):
        run = made(Path(sys.argv[1]) / name)
        print(*(path for path in write_reports(run.folder) if path.suffix == ".html"))

"""Write the pages of a made run, for ``make browser``: python tests/report_pages.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from made_run import MadeRun

from reports.files import write_reports

if __name__ == "__main__":
    run = MadeRun(Path(sys.argv[1])).start()
    for number in range(1, 7):
        run.round(number, 0.7 + 0.01 * number)
    run.end()
    print(*(path for path in write_reports(run.folder) if path.suffix == ".html"))

"""The three forms of a report, written beside the run that they are about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from common.errors import DataError
from server.files import finite, replace_file
from server.report.data import ReportData, report_of
from server.report.markdown import to_markdown
from server.report.page import to_html
from server.report.signature import sign

REPORT_JSON = "report.json"
SIGNATURE = "report.json.sig"


def to_json(data: ReportData) -> bytes:
    """Return the report in its one canonical form: sorted keys, no spaces, ASCII, one line.

    Figures that are not finite have no JSON; they are written as the text ``inf``, ``-inf`` or ``nan``.
    """
    value = finite(dataclasses.asdict(data))
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def markdown_report(folder: Path) -> str:
    """Return the report of a run's folder as Markdown, from its files alone; errors as in report_of."""
    return to_markdown(report_of(folder))


def write_reports(folder: Path, key: Path | None = None) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``report.json`` into a run's folder, and return their paths.

    With ``key``, also ``report.json.sig``. Without one, a signature that is there stays if it is
    still of the same bytes, and goes if it is not.

    Raises:
        DataError: ``folder`` is not the folder of a run, cannot be written, or the key is no key.
    """
    data = report_of(folder)
    contents = {
        "report.md": to_markdown(data).encode(),
        "report.html": to_html(data).encode(),
        REPORT_JSON: to_json(data),
    }
    signature, report = folder / SIGNATURE, folder / REPORT_JSON
    try:
        stale = not report.is_file() or report.read_bytes() != contents[REPORT_JSON]
        if key is not None:
            contents[SIGNATURE] = sign(contents[REPORT_JSON], key)
        elif stale:
            signature.unlink(missing_ok=True)
        for name, content in contents.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise DataError(
            f"the report cannot be written to {folder} ({error.strerror}): check rights and space"
        ) from error
    return [folder / name for name in contents]

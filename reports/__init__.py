"""The privacy report as people read it: a line a round, and at the end a page, Markdown and signed JSON.

``folder``, ``sites``, ``claim`` and ``data`` read a run's folder and compute every figure;
``result`` and ``sections`` say them, ``markdown``, ``page`` and ``files`` only write them down.
"""

from __future__ import annotations

from fedveil.reports.data import ReportData, federation_epsilon, report_of
from fedveil.reports.files import REPORT_JSON, markdown_report, read_report, to_json, write_reports

__all__ = [
    "REPORT_JSON",
    "ReportData",
    "federation_epsilon",
    "markdown_report",
    "read_report",
    "report_of",
    "to_json",
    "write_reports",
]

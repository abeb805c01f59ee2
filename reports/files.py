"""The three forms of a report, written beside the run that they are about."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fedveil.common.check import plain_names
from fedveil.common.errors import DataError
from fedveil.common.files import drop_leftovers, finite, replace_file
from fedveil.common.run_lines import ResultFile
from fedveil.common.strict_json import from_json, json_of
from fedveil.reports.card import NAME as CARD
from fedveil.reports.card import adapter_form, card_of
from fedveil.reports.data import ReportData, report_of, setting_of
from fedveil.reports.declared import read_declared
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html
from fedveil.reports.signature import ADAPTER, SIGNATURE, STATEMENT, Run, covers, evidence, members, sign, statement

REPORT_JSON = "report.json"
SPARSE = ("figures", "parts")
"""Fields of the report that its JSON has only where they are not empty."""


def to_json(data: ReportData) -> bytes:
    """Return the report in its one canonical form: sorted keys, no spaces, ASCII, one line.

    Figures that are not finite have no JSON; they are written as the text ``inf``, ``-inf`` or ``nan``.
    """
    value = finite(dataclasses.asdict(data))
    for name in SPARSE:
        if not value[name]:
            del value[name]
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def markdown_report(folder: Path) -> str:
    """Return the report of a run's folder as Markdown, from its files alone; errors as in report_of."""
    return to_markdown(report_of(folder))


def read_report(folder: Path) -> ReportData | None:
    """Return the report that the server wrote at a run's end, without pricing it again, which takes seconds.

    None: it is not there, is older than the end, or has figures that JSON has not.
    """
    report, result = folder / REPORT_JSON, folder / ResultFile.NAME
    if not (report.is_file() and result.is_file() and report.stat().st_mtime_ns >= result.stat().st_mtime_ns):
        return None
    try:
        return from_json(ReportData, json_of(report.read_bytes()), REPORT_JSON)
    except (DataError, ValueError):
        return None


def write_reports(folder: Path, key: Path | None = None) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``report.json`` into a run's folder; return their paths.

    A saved adapter's model card is written as well. With ``key``, so is the signed statement on everything that is
    given to others. Without one, an earlier statement is removed unless it still covers the same bytes.

    Raises:
        DataError: ``folder`` is not the folder of a run, cannot be written, or the key is no key.
        ConfigError: what is declared about the run cannot be read.
    """
    before = _evidence_of(folder)
    data, card = report_of(folder), f"adapter/{CARD}"
    contents = {
        "report.md": to_markdown(data).encode(),
        "report.html": to_html(data).encode(),
        REPORT_JSON: to_json(data),
    }
    if data.origin is not None:
        contents[card] = card_of(data, read_declared(folder), adapter_form(data), contents[REPORT_JSON]).encode()
    try:
        others = {name: (folder / name).read_bytes() for name in members(folder) if name not in contents}
        signable = contents | others
        if key is not None:
            _unchanged(data, others)
            _as_before(before, evidence(folder))
            signed = statement(_signed_run(data), signable, before)
            contents |= {STATEMENT: signed, SIGNATURE: sign(signed, key)}
        elif not (folder / STATEMENT).is_file() or not covers((folder / STATEMENT).read_bytes(), signable, before):
            for name in (SIGNATURE, STATEMENT):
                (folder / name).unlink(missing_ok=True)
        for name, content in contents.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise DataError(
            f"the report cannot be written to {folder} ({error.strerror}): check permissions and space"
        ) from error
    return [folder / name for name in contents if name != card]


def _evidence_of(folder: Path) -> dict[str, bytes]:
    """Return what a report is computed from, once what interrupted writes have left is gone."""
    try:
        for place in (folder, folder / ADAPTER):
            drop_leftovers(place)
        return evidence(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check permissions and files") from error


def _signed_run(data: ReportData) -> Run:
    head = data.headline
    return Run(
        run=data.run,
        method=data.method,
        status=data.status,
        rounds_done=head.rounds_done,
        rounds_planned=head.rounds_planned,
        epsilon=head.epsilon,
        delta=head.delta,
        project=str(setting_of(data, "project")),
        named_sites=list(plain_names(str(setting_of(data, "named-sites")))),
        honest_sites=data.sharing.honest_sites if data.sharing else 0,
        epsilon_alone=data.sharing.epsilon_alone if data.sharing else None,
        trials=data.tuning.trials if data.tuning else None,
        epsilon_trials=data.tuning.epsilon if data.tuning else None,
        delta_trials=data.tuning.delta if data.tuning else None,
    )


def _unchanged(data: ReportData, read: Mapping[str, bytes]) -> None:
    """Raise DataError unless what is about to be signed is what the report states."""
    stated = {**data.audits, **(data.origin.files if data.origin else {})}
    for name, digest in stated.items():
        if hashlib.sha256(read.get(name, b"")).hexdigest() != digest:
            raise DataError(f"{name} changed while the report was made: report again when nothing writes to the folder")


def _as_before(before: Mapping[str, bytes], now: Mapping[str, bytes]) -> None:
    """Raise DataError if what the report was computed from is no longer there as it was."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise DataError(f"{name} changed while the report was made: sign it when the run has ended")

"""The log says what, where and when, in two forms, and nothing that was computed from records."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_python import Run

from audits.tiny_site import clinic, pins
from fedveil.client.app import answer
from fedveil.client.outgoing import UNTOLD, refused
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.log import JsonLines, about, set_up
from fedveil.common.messages.round import Refusal
from fedveil.common.messages.wire import encode_task
from fedveil.experiments.in_process import run_in_process

pytestmark = pytest.mark.rough_prices

CANARY = "zyzzyva"


def marked(path: Path) -> Path:
    """Put a canary into a record's text, in place."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["text"] = f"{CANARY} {row['text']}"
        row["label"] = f"{CANARY}{row['label']}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_lines_name_run_round_and_site_and_nothing_private(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVEIL_LOG", "json")
    data, policy = marked(Path(toy_settings["data.name"])), tmp_path / "policy.toml"
    settings = {**toy_settings, "data.labels": f"{CANARY}bad,{CANARY}good"}
    # Pins name labels, as the job does; the log of a site that was asked for others would quote both.
    policy.write_text(to_toml(pins(settings)), encoding="utf-8")
    common = {"public-size": 250, "policy": str(policy)}
    sites: list[dict[str, Any]] = [
        {"site": name, "data": str(data), "ledger": str(tmp_path / f"{name}.db"), **common}
        for name in ("clinic", "practice")
    ]
    sites.append({"site": "broken", "data": str(tmp_path / "absent.csv"), **common})
    broken = tmp_path / "broken.csv"
    broken.write_text(f"text,label\n{CANARY},{CANARY}secret\n", encoding="utf-8")
    sites.append({**sites[0], "site": "odd", "data": str(broken), "ledger": str(tmp_path / "odd.db")})
    folder = run_in_process(settings, sites, "1")
    kept = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in kept] == [json.loads(line) for line in shown]
    lines = [json.loads(line) for line in kept]
    assert all(set(line) == {"time", "level", "run", "round", "site", "message"} for line in lines)
    told = {(line["run"], line["round"], line["site"]) for line in lines}
    assert {("1", r, s) for r in (1, 2) for s in ("clinic", "practice", "broken", "odd")} <= told
    for line in lines:
        assert CANARY not in json.dumps(line), f"a record's words are logged: {line}"
        if line["site"]:
            numbers = {float(n) for n in re.findall(r"\d+\.?\d*", line["message"])}
            assert not numbers & {240.0, 200.0, 1.0 / 240}, f"a count of records is logged: {line}"
            assert not re.search(r"\b(loss|norm)\b", line["message"]), f"a figure of records is logged: {line}"


def test_a_line_comes_once_whatever_handlers_the_root_has(fresh_python: Run) -> None:
    program = (
        "import logging, fedveil.client.app, fedveil.server.conduct\n"
        "logging.basicConfig(); from fedveil.common.log import set_up; set_up()\n"
        "set_up(); logging.getLogger('fedveil.server').info('before training'); logging.warning('of another')"
    )
    done = fresh_python(program)
    lines = [line for line in done.stderr.splitlines() if "before" in line or "another" in line]
    assert len(lines) == 2, "the root's handlers write what is others' alone"
    assert lines[0].endswith(" INFO fedveil: before training")


def test_an_unforeseen_error_is_logged_by_type_and_place_only() -> None:
    try:
        raise ValueError(f"could not read {CANARY}")
    except ValueError:
        record = logging.LogRecord("fedveil.site", logging.ERROR, "", 0, "failed", (), None)
        record.exc_info = sys.exc_info()
    record.__dict__.update(about("7", 2, "clinic"))
    line = json.loads(JsonLines().format(record))
    assert (line["run"], line["round"], line["site"]) == ("7", 2, "clinic")
    assert line["message"].startswith("failed [ValueError at test_log.py:")
    assert CANARY not in line["message"]


def test_a_task_that_fails_unforeseen_quotes_no_record_in_the_sites_own_log(caplog: pytest.LogCaptureFixture) -> None:
    for error in (ValueError("PRIVATE-WORDS"), DataError("row 3: PRIVATE-WORDS")):
        refusal = refused(error, {"site": "clinic"}, "1", 2)
        assert (refusal.kind, refusal.reason) == ("failed", UNTOLD)
    assert caplog.text.count("failed: ") == 2
    assert "PRIVATE-WORDS" not in caplog.text


def test_what_a_hostile_server_sends_writes_no_line_and_moves_no_cursor_in_a_sites_log(
    toy_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = clinic(toy_settings, tmp_path)
    sent = encode_task(replace(site.task(), run="2\x1b[2K\r\n12:00:00 INFO all is well \u202e\x9b2J"))
    refused = answer(sent, site.node, site.settings, "1", {})
    assert isinstance(refused, Refusal)
    assert "the task is of run 2" in refused.reason
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the task is of run" in line]
    assert line.endswith("the task is of run 2?[2K 12:00:00 INFO all is well ??2J, the message came in run 1")


def test_a_form_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_LOG", "jsn")
    with pytest.raises(ConfigError, match="did you mean 'json'"):
        set_up()

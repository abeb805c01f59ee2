"""Settings that came after runs of the present checkpoint format had begun: each says what such a run did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config.asked import RunSettings
from common.config.sections import defaults
from common.starts import STARTS
from server.checkpoint import BEFORE, FORMAT, MAY_CHANGE
from strategies import ROWS, STRATEGIES
from strategies.ffa_lora import FFALoRA
from strategies.job import declared_settings, known_settings
from strategies.rules import RULES

FIRST = json.loads(Path(__file__).with_name("settings-of-format.json").read_text(encoding="utf-8"))
"""Settings and rows that there were when runs of the present ``FORMAT`` began: a new format needs them anew."""


def settings_since() -> set[str]:
    """Return the settings that a run of a row of that time has now and had not then, and that must not change."""
    rows = {**ROWS, **RULES}
    own = {f"{name}.{key}" for name, row in rows.items() if name in FIRST["rows"] for key in defaults(row)}
    own |= {f"start.{key}" for name, row in STARTS.items() if name in FIRST["rows"] for key in defaults(row)}
    return {*defaults(RunSettings), *own} - {*FIRST["settings"], *MAY_CHANGE}


def test_every_setting_since_says_what_a_run_did_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FIRST["format"] == FORMAT, "store the settings and rows of today in tests/settings-of-format.json"
    since = settings_since()
    assert since - set(BEFORE) == set(), "runs that are under way could not be resumed: say in BEFORE what they did"
    assert set(BEFORE) - set(known_settings()) == set(), "BEFORE names what is no setting"

    @dataclass(frozen=True)
    class Later(FFALoRA):
        """Has an option that came later."""

        knob: float = 1.0

    monkeypatch.setitem(STRATEGIES, "ffa-lora", Later)
    assert settings_since() - set(BEFORE) == {"ffa-lora.knob"}, "an option of an old row would go unnoticed"


def test_what_a_setting_stands_for_before_it_fits_its_rules() -> None:
    for key, value in BEFORE.items():
        assert type(value) is type(declared_settings()[key]), f"{key} has another type in BEFORE"

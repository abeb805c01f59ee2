"""The page of published systems: every system that it lists can be run as it says, and no row is left out."""

from __future__ import annotations

from typing import ClassVar

import pytest

from cli.reference import systems_page
from cli.systems import AXES, SYSTEMS, System, named_rows, system_table, text_of, title_of, unnamed_rows
from common.errors import ConfigError
from strategies import STRATEGIES
from strategies.ffa_lora import FFALoRA
from strategies.job import configure
from strategies.renamed import REFUSED_STRATEGIES


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_system_is_a_run_a_command_or_refused_with_its_reason(system: System) -> None:
    assert bool(system.settings) != bool(system.instead)
    if not system.settings:
        return
    strategy = str(system.settings["strategy"])
    if strategy in REFUSED_STRATEGIES:
        with pytest.raises(ConfigError, match="cannot be run"):
            configure(system.settings)
        assert f"refused: {REFUSED_STRATEGIES[strategy]}" in system_table()
        return
    job = configure(system.settings)
    for key in AXES:
        if key in system.settings:
            assert job.settings()[key] == system.settings[key]


def test_every_row_of_every_axis_is_on_the_page_and_every_refused_strategy_is_a_system() -> None:
    page = systems_page()
    for key, rows in AXES.items():
        for name, row in rows.items():
            assert f"### `{name}`" in page
            assert text_of(row).count("\n") or title_of(row)
            assert ((key, name) in named_rows()) != ((key, name) in set(unnamed_rows()))
    assert set(REFUSED_STRATEGIES) <= {str(system.settings.get("strategy")) for system in SYSTEMS}


def test_a_row_that_comes_later_is_on_the_page_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(FFALoRA):
        """Sites train what nobody has written down yet."""

        name: ClassVar[str] = "later"

    monkeypatch.setitem(STRATEGIES, "later", Later)
    monkeypatch.setitem(dict(AXES)["strategy"], "later", Later)  # type: ignore[index]
    page = systems_page()
    assert '| `strategy = "later"` |' in page
    assert "### `later`" in page

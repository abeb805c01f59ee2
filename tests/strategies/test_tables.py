"""Tables of rows, and the options of rows beside the core: what exists, and how it travels through Flower."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.config import fuse_dicts

from fedveil.common import rows
from fedveil.common.errors import ConfigError
from fedveil.common.rows import Table
from fedveil.common.starts import STARTS
from fedveil.strategies.job import configure
from fedveil.strategies.options import for_flower, known_settings, with_options

PLANTED = {"starts": {"odd": "starts.shared:Shared", "shared": "starts.shared:Shared"}}
RUN = {"strategy": "ffa-lora", "adapter.start": "shards", "start.normalised": False}


def row(name: str) -> Any:
    return SimpleNamespace(name=name)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="there is a row 'shared' already"):
        Table("starts", [row("shared")])
    table = Table("starts", [row("mine")])
    for taken in ("mine", "shared"):
        with pytest.raises(ConfigError, match=f"there is a row '{taken}' already"):
            table[taken] = row(taken)
    table["new"] = row("new")
    assert next(iter(table)) == "mine"
    assert table.core.keys() == {"mine", "new"}


def test_a_row_that_is_named_otherwise_than_in_its_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "import_module", lambda name: SimpleNamespace(ROWS=PLANTED, Shared=STARTS["shared"]))
    table: Table[Any] = Table("starts", ())
    assert table["shared"] is STARTS["shared"]
    with pytest.raises(ConfigError, match=re.escape("contrib has starts.shared:Shared as 'odd'")):
        table["odd"]


def test_options_of_a_row_beside_the_core_pass_flower_and_make_the_same_job() -> None:
    sent = for_flower(RUN)
    assert sent == {**{k: v for k, v in RUN.items() if k != "start.normalised"}, "options": "start.normalised = false"}
    taken = fuse_dicts(known_settings(), sent)  # raises for a key that is not listed
    assert configure(taken) == configure(RUN)
    assert configure(RUN).settings()["start.normalised"] is False
    assert for_flower(taken) == taken
    with pytest.raises(ValueError, match=r"start\.normalised"):
        fuse_dicts(known_settings(), RUN)


def test_a_text_goes_through_options_as_it_is() -> None:
    given = {"strategy": "a", "a.text": 'two "quotes" and \\ and }, b = 1\nline', "a.number": 1e-05, "a.on": True}
    assert with_options(for_flower(given)) == given


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"start.normalised": False}, "unknown setting 'start.normalised'.*once adapter.start names it"),
        ({"adapter.start": "shards", "start.rows": 1}, "unknown setting 'start.rows'"),
        ({"lora-pro.signal": 0.4}, "lora-pro.signal cannot be set: .* set server.rule to 'lora-pro', or leave it out"),
        (
            {"server.rule": "lora-pro", "lora-pro.signals": 1.0},
            "unknown setting 'lora-pro.signals' .did you mean 'lora-p",
        ),
        ({"options": "rounds = 3"}, "options holds rounds, which is a setting beside it"),
        ({**RUN, "options": "start.normalised = true"}, "options holds start.normalised"),
        ({"options": "a = 1}\nb = {c = 2"}, "options must be a text such as"),
        ({"options": "start.normalised"}, "options must be a text such as"),
        ({"options": 3}, "options must be a text such as"),
    ],
)
def test_an_option_that_no_row_of_the_run_has_is_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure(values)

"""Rows of the demonstrations: core knows their names before one is imported, and none has another name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.common.data.named import DATASETS, NamedDataset
from fedveil.common.data.prose import prose
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.named import NAMED_MODELS, NamedModel
from fedveil.common.rows import Table

ROOT = Path(__file__).resolve().parents[2]


def test_core_knows_all_names_before_a_row_is_imported() -> None:
    code = (
        "import json, sys\n"
        "from fedveil.common.data.named import DATASETS\n"
        "from fedveil.common.model.named import NAMED_MODELS\n"
        "names = [*DATASETS, *NAMED_MODELS]\n"
        "assert 'imdb' in DATASETS and 'nobody' not in DATASETS and len(names) == len(DATASETS) + len(NAMED_MODELS)\n"
        "print(json.dumps([names, [name for name in sys.modules if name.startswith('fedveil.demo')]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, loaded = json.loads(done.stdout)
    assert (set(names), loaded) == ({*DATASETS, *NAMED_MODELS}, [])


@pytest.mark.parametrize("table", [DATASETS, NAMED_MODELS], ids=["data sets", "models"])
def test_every_place_has_the_row_of_its_name(table: Table[NamedDataset | NamedModel]) -> None:
    assert all(row.name == name for name, row in table.items())


def test_the_row_of_another_name_is_found_out() -> None:
    table = Table[NamedDataset]("data sets", (), {"mnist": "sets.asdiv:ASDIV"}, "fedveil.demo")
    with pytest.raises(ConfigError, match=r"demo has sets\.asdiv:ASDIV as 'mnist', and its own name is 'asdiv'"):
        table["mnist"]


def test_a_text_that_comes_with_fedveil_and_was_altered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(prose()) == 600
    monkeypatch.setattr("fedveil.common.data.prose.SHA256", "00" * 32)
    prose.cache_clear()
    with pytest.raises(DataError, match="is not the text that FedVeil knows"):
        prose()
    prose.cache_clear()

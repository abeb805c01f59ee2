"""The notebooks of ``examples`` run from their first cell to their last, on a tiny model, and hold no output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OWN = {
    "first-run": "data, sites = {data!r}, 2",
    "own-table": """
frame = pd.read_csv({data!r}).rename(columns={{"text": "review", "label": "opinion"}})
text, label, sites = "review", "opinion", 2""",
    "steward": "data = {data!r}",
}
"""What a user would change in the first cell of code, by notebook."""


def whole(data: str, settings: dict[str, Any]) -> nbformat.NotebookNode:
    """Return all notebooks as one, in which none sees what another has: so one kernel loads the libraries once."""
    book = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        place = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ()))
        given = nbformat.v4.new_code_cell(OWN[path.stem].format(data=data) + f"\nsettings = {settings!r}")
        book.cells += [*cells[: place + 1], given, *cells[place + 1 :], nbformat.v4.new_code_cell("%reset -f")]
    return book


@pytest.mark.slow
def test_the_notebooks_run(toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MPLBACKEND", "agg")
    kept = ("model.name", "model.max-length", "privacy.delta", "precision", "device")
    settings = {**{key: toy_settings[key] for key in kept}, "rounds": 2}
    book = whole(toy_settings["data.name"], settings)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(str(output) for cell in book.cells for output in cell.get("outputs", ()))
    for words in ("before training", "is spent", "valid: run", "probability"):
        assert words in shown, words
    assert "Traceback" not in shown
    (planned,) = (cell.outputs for cell in book.cells if cell.source.endswith("\nplan"))
    kinds = [output.output_type for output in planned if output.get("name") != "stderr"]
    assert kinds == ["execute_result"], "the plan's tables are shown twice"
    assert planned[-1].data["text/plain"].count("after round") == 1


def test_the_notebooks_hold_no_output_and_each_says_what_to_change() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(OWN)
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        assert not [cell for cell in code if cell.outputs or cell.execution_count]
        assert code[0].source.startswith("# To change: ")
        assert code[0].metadata["tags"] == ["parameters"]
        assert book.cells[0].source.startswith("# ")
        assert path.stat().st_size < 10_000

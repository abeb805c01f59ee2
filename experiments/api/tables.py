"""The rounds and the releases of a run as pandas frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.run_lines import (
    BaselineFile,
    ConfigFile,
    PrivacyLine,
    RoundLine,
    read_file,
    read_if_there,
    read_lines,
)
from fedveil.common.tasks import headline_of

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("loss", "epsilon", "sites", "seconds", "bytes_down", "bytes_up")
RELEASE = (
    *("round", "site", "purpose", "epsilon", "epsilon_round", "delta", "budget", "left", "unit", "mechanism", "steps"),
)


def history_of(folder: Path) -> pd.DataFrame:
    """Return a row for each round of a run, with 0 for the model before training."""
    import pandas as pd

    spent: dict[int, float] = {}
    judged_by = _column(headline_of(read_file(ConfigFile, folder).settings))
    for paid in read_lines(PrivacyLine, folder):
        if paid.spent:
            spent[paid.round_number] = max(spent.get(paid.round_number, 0.0), paid.spent.epsilon_total)
    rows: dict[int, dict[str, Any]] = {}
    if before := read_if_there(BaselineFile, folder):
        rows[0] = {judged_by: before.accuracy, "loss": before.loss, "complete": True, **_beside(before)}
    for line in read_lines(RoundLine, folder):
        number = line.round_number
        rows[number] = {
            judged_by: line.accuracy,
            "loss": line.loss,
            **(rows.get(0, {}) if not number else {}),  # of round 0 the score is the one before training
            "epsilon": max((epsilon for by, epsilon in spent.items() if by <= number), default=None),
            "sites": len(line.participants),
            "seconds": line.seconds,
            "bytes_down": line.bytes_down,
            "bytes_up": line.bytes_up,
            "complete": line.complete,
            **_beside(line),
        }
    known = [judged_by, *FIGURES, "complete"]
    columns = list(dict.fromkeys([*known, *(name for row in rows.values() for name in row)]))
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    figures = [name for name in columns if name != "complete"]
    return frame.rename_axis("round").astype(dict.fromkeys(figures, float)).sort_index()


def _beside(line: BaselineFile | RoundLine) -> dict[str, float]:
    slices = {f"accuracy_of_{score.label}": score.right / score.records for score in line.slices if score.records}
    return slices | {_column(figure.name): figure.value for figure in line.figures}


def _column(name: str) -> str:
    return name.lower().replace(" ", "_")


def privacy_of(folder: Path) -> pd.DataFrame:
    """Return a row for each release of a site that was charged."""
    import pandas as pd

    mechanism = str(read_file(ConfigFile, folder).settings.get("privacy.mode", ""))
    rows = [
        {
            "round": line.round_number,
            "site": line.site,
            "purpose": line.spent.purpose,
            "epsilon": line.spent.epsilon_total,
            "epsilon_round": line.spent.epsilon_round,
            "delta": line.spent.delta,
            "budget": line.spent.epsilon_budget,
            "left": line.spent.epsilon_remaining,
            "unit": line.unit,
            "mechanism": mechanism,
            "steps": line.spent.steps_total,
        }
        for line in read_lines(PrivacyLine, folder)
        if line.spent
    ]
    return pd.DataFrame(rows, columns=[*RELEASE])

"""The runs in a folder, as a list: when each began, what it has come to, and what it has spent.

The list reads the JSON itself: the classes of ``common.run_lines`` would take it seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.common.files import ABOUT_RUN, PROCESS, whole_lines
from fedveil.common.paths import runs_in
from fedveil.server.lock import is_locked, is_written

STARTING, UNDER_WAY, CUT_OFF = "starting", "under way", "cut off"


@dataclass(frozen=True)
class ListedRun:
    """One run of the list."""

    folder: Path
    began: str
    """UTC, ISO 8601; of one that was resumed, the last time."""
    state: str
    """``starting``, ``under way``; ``cut off``: it ended without a word; else as ``ResultFile.status``."""
    rounds: int
    """That are complete."""
    planned: int
    accuracy: float | None
    """On public data, as it was scored last, or what the run is judged by in its place; None: not yet."""
    epsilon: float | None
    """The largest of a site's, by what the sites said; None: no claim is made, or nothing is spent yet."""
    judged_by: str = "accuracy"
    """The name of that figure."""


def listed_runs(output: Path) -> list[ListedRun]:
    """Return the runs in a folder, the one that began last at the end; a folder that cannot be read is left out."""
    found = []
    for folder in runs_in(output):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.append(_listed(folder))
    return found


def _listed(folder: Path) -> ListedRun:
    if not (folder / ABOUT_RUN).is_file():
        return ListedRun(folder, "", STARTING if is_locked(folder / PROCESS) else CUT_OFF, 0, 0, None, None)
    config = json.loads((folder / ABOUT_RUN).read_bytes())
    result, beside = _json(folder / "result.json"), _json(folder / "baseline.json").get("figures", [])
    reached = _so_far(folder) if result.get("rounds") is None else result
    live = is_written(folder) or is_locked(folder / PROCESS)
    return ListedRun(
        folder,
        str([config["started"], *config.get("resumed", [])][-1]),
        UNDER_WAY if live else str(result.get("status", CUT_OFF)),
        int(reached["rounds"]),
        int(config["settings"]["rounds"]),
        _number(reached["accuracy"]),
        _number(reached["epsilon"]),
        next((str(figure["name"]) for figure in beside), ListedRun.judged_by),
    )


def _so_far(folder: Path) -> Mapping[str, Any]:
    """Return what a run without a result has come to, by its lines."""
    rounds = [json.loads(line) for line in whole_lines(folder / "rounds.jsonl")]
    accuracies = [line["accuracy"] for line in rounds if line["accuracy"] is not None]
    complete = [line["round"] for line in rounds if line["complete"]]
    spent = [json.loads(line).get("epsilon_total") for line in whole_lines(folder / "privacy.jsonl")]
    return {
        "rounds": max(complete, default=0),
        "accuracy": accuracies[-1] if accuracies else _json(folder / "baseline.json").get("accuracy"),
        "epsilon": max((float(one) for one in spent if one is not None), default=None),
    }


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

"""The files of a run's folder about other runs on the same records: those beside it, and the trials of a tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.run_lines import RunFile
from fedveil.common.strict_json import Delta, Epsilon


@dataclass(frozen=True)
class BesideRow:
    """Runs of a sweep on the same base model and data as this run, of one variant, arm and ε."""

    variant: str
    arm: str
    """``federated``, ``local-only`` (each site alone), ``pooled`` (all records at one site) or ``fitted-head`` (on the
    frozen encoder, without privacy)."""
    epsilon_asked: float | None
    """The budget; None: no privacy."""
    accuracy_before: float
    accuracy: float
    """Mean over the runs."""
    half: float | None
    """Half of its 95 % interval (Student's t); None of a single run."""
    runs: int
    honest: int = 0
    """How many honest sites its ε counts on; 0: on none, as each site adds all of its noise itself."""


@dataclass(frozen=True)
class BesideFile(RunFile):
    """What other runs came to, to be read beside this one (``fedveil report --beside``)."""

    NAME: ClassVar[str] = "beside.json"
    rows: list[BesideRow]


@dataclass(frozen=True)
class TuningFile(RunFile):
    """That a run is one of several trials on the same records, and what all of them cost (``fedveil tune``)."""

    NAME: ClassVar[str] = "tuning.json"
    trials: int
    chosen: bool | None
    """Whether this one was chosen; None: not all have ended."""
    epsilon: Epsilon
    """Of all trials together, in a site that joins every round, or by a ledger where that holds more."""
    delta: Delta

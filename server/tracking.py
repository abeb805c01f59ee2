"""Pass the rounds of a run's folder to the tracker that its settings name.

Whatever goes wrong with a tracker is logged once and the run continues: its rounds have been paid for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedveil.common.log import place_of
from fedveil.common.model.score import Score
from fedveil.common.model.score import f1 as f1_of
from fedveil.common.run_lines import (
    COHORT,
    BaselineFile,
    ConfigFile,
    PrivacyLine,
    RoundLine,
    read_file,
    read_if_there,
    read_lines,
)
from fedveil.common.tasks import headline_of
from fedveil.common.trackers import NO_TRACKER, TRACKERS, Tracker
from fedveil.reports.course import epsilon_course
from fedveil.reports.folder import read_run
from fedveil.server.members import Member
from fedveil.server.observers import Observer, RoundOutcome, Update
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")


class Tracking(Observer):
    """Passes each round of the folder to the job's tracker once; with ``none`` it does nothing."""

    def __init__(self, job: Job, folder: Path, run: str) -> None:
        self._folder, self._logged = folder, -1
        self._tracker: Tracker | None = None
        if job.config.tracker != NO_TRACKER:
            with self._without_harm():
                self._tracker = TRACKERS[job.config.tracker](folder, run, job.settings())

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Log the score before training."""
        self.update()

    def finished(self, outcome: RoundOutcome, update: Update, members: Mapping[str, Member]) -> None:
        """Log a round."""
        self.update()

    def update(self) -> None:
        """Log every round of the folder that has not been logged."""
        with self._without_harm():
            for number, figures in rounds_of(self._folder).items() if self._tracker else ():
                if self._tracker and number > self._logged:
                    self._tracker.log(number, figures)
                    self._logged = number

    def close(self) -> None:
        """Log what is left, and the end of the run."""
        self.update()
        if self._tracker:
            with self._without_harm():
                self._tracker.close()

    @contextmanager
    def _without_harm(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another's package, which no run may end by
            log.warning("the tracker fails, and the run goes on without it: %s", place_of(error))
            self._tracker = None


def rounds_of(folder: Path) -> dict[int, dict[str, float]]:
    """Return the figures of each complete round of a run, by its number; 0 is before training.

    ``epsilon`` is the report's by the end of that round. Where sites share the noise of a secure sum its name gives the
    number of honest sites that it counts on: ``epsilon/h-3``. Figures that are missing or not finite are left out; a
    trusted server's run has neither the number of sites nor the seconds.

    Raises:
        DataError: a file of the folder is invalid.
    """
    rounds: dict[int, dict[str, float]] = {}
    judged_by = headline_of(read_file(ConfigFile, folder).settings)
    before = read_if_there(BaselineFile, folder)
    if before is not None:
        rounds[0] = _finite({judged_by: before.accuracy, "loss": before.loss, **_beside(before)})
    spent = [(line.round_number, line.spent) for line in read_lines(PrivacyLine, folder) if line.spent]
    course = epsilon_course(read_run(folder)) if spent else {}
    for line in read_lines(RoundLine, folder):
        if line.complete and line.round_number:
            paid = [spending for number, spending in spent if number <= line.round_number]
            honest = int(max((spending.event.figures.get("honest_sites", 0) for spending in paid), default=0))
            labels = {f"accuracy/{score.label}": score.right / max(1, score.records) for score in line.labels}
            figures = {
                judged_by: line.accuracy,
                "loss": line.loss,
                f"epsilon/h-{honest}" if honest else "epsilon": course.get(line.round_number),
                "sites": None if line.participants == [COHORT] else float(len(line.participants)),
                "bytes_down": float(line.bytes_down),
                "bytes_up": float(line.bytes_up),
                "seconds": line.seconds,
                **labels,
                **_beside(line),
            }
            rounds[line.round_number] = _finite(figures)
    return rounds


def _beside(line: BaselineFile | RoundLine) -> dict[str, float | None]:
    beside: dict[str, float | None] = {figure.name: figure.value for figure in line.figures}
    return beside | {f"F1/{one.label}": f1_of(one.right, one.records + (one.predicted or 0)) for one in line.parts}


def _finite(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}

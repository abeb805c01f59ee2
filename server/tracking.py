"""Tell an experiment tracker what a run's folder holds, a step a round.

A tracker is a looking glass: whatever goes wrong with it is logged once, and the run goes on, because what its rounds
have cost in privacy is spent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from fedveil.common.log import place_of
from fedveil.common.model.score import Score
from fedveil.common.run_lines import COHORT, BaselineFile, PrivacyLine, RoundLine, read_if_there, read_lines
from fedveil.common.trackers import NO_TRACKER, TRACKERS, Tracker
from fedveil.reports.folder import read_run
from fedveil.reports.sites import epsilon_course
from fedveil.server.members import Member
from fedveil.server.observers import Observer, RoundOutcome
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")


def check_tracker(name: str) -> None:
    """Raise ConfigError unless the tracker's package is installed on this machine."""
    if name != NO_TRACKER:
        TRACKERS[name].check()


class Tracking(Observer):
    """Tells the tracker that a job names what the run's folder holds; with ``none`` it tells nobody."""

    def __init__(self, job: Job, folder: Path, run: str) -> None:
        self._folder, self._told = folder, -1
        self._tracker: Tracker | None = None
        name = job.config.tracker
        if name != NO_TRACKER:
            self._try(lambda: self._open(TRACKERS[name], job, run))

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Tell of the score before training."""
        del baseline, state, members, begun
        self.tell()

    def finished(self, outcome: RoundOutcome, state: ServerState, members: Mapping[str, Member]) -> None:
        """Tell of a round."""
        del outcome, state, members
        self.tell()

    def tell(self) -> None:
        """Tell every round that the folder holds and that was not told yet."""
        self._try(self._tell)

    def close(self) -> None:
        """Tell what is left, and that the run has ended."""
        self.tell()
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _open(self, row: type[Tracker], job: Job, run: str) -> None:
        self._tracker = row(self._folder, run, job.settings())

    def _tell(self) -> None:
        if self._tracker is None:
            return
        for number, figures in rounds_of(self._folder).items():
            if number > self._told:
                self._tracker.log(number, figures)
                self._told = number

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # of another's package, which no run may end by
            log.warning("the tracker fails, and the run goes on without it: %s", place_of(error))
            self._tracker = None


def rounds_of(folder: Path) -> dict[int, dict[str, float]]:
    """Return the figures of each complete round of a run, by its number; 0 is before training.

    ``epsilon`` is the report's by then: no site's is below what its own lines cost. Where sites share the noise of a
    sum its name says on how many honest ones it counts: ``epsilon/h-3``. What is not there, or not finite, is left out;
    of a trusted server's run that is how many sites took part, and how long they took.

    Raises:
        DataError: a file of the folder is not as it is written.
    """
    found: dict[int, dict[str, float]] = {}
    before = read_if_there(BaselineFile, folder)
    if before is not None:
        found[0] = _finite({"accuracy": before.accuracy, "loss": before.loss})
    spent = [(line.round_number, line.spent) for line in read_lines(PrivacyLine, folder) if line.spent]
    course = epsilon_course(read_run(folder)) if spent else {}
    for line in read_lines(RoundLine, folder):
        if line.complete and line.round_number:
            paid = [spending for number, spending in spent if number <= line.round_number]
            honest = int(max((spending.event.figures.get("honest_sites", 0) for spending in paid), default=0))
            labels = {f"accuracy/{score.label}": score.right / max(1, score.records) for score in line.labels}
            figures = {
                "accuracy": line.accuracy,
                "loss": line.loss,
                f"epsilon/h-{honest}" if honest else "epsilon": course.get(line.round_number),
                "sites": None if line.participants == [COHORT] else float(len(line.participants)),
                "bytes_down": float(line.bytes_down),
                "bytes_up": float(line.bytes_up),
                "seconds": line.seconds,
                **labels,
            }
            found[line.round_number] = _finite(figures)
    return found


def _finite(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}

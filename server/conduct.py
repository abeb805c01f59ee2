"""One run from its first file to its last: load, run the rounds, save the result, say how it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.errors import FedVeilError
from common.messages import Refusal, TrainResult
from common.model import Score
from common.paths import run_folder
from server.evaluation import Evaluator
from server.records import RunFolder
from server.report import federation_epsilon, markdown_report, round_line
from server.rounds import RoundOutcome, Transport, run_rounds
from strategies import Job, ServerState


class _Observer:
    """Writes a run's folder and prints one line a round."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self.baseline = self.last = Score(accuracy=0.0, loss=0.0)
        self.stop_reason = ""

    def started(self, baseline: Score) -> None:
        self._folder.started(baseline)
        self.baseline = self.last = baseline
        self._folder.say(f"before training: accuracy {100 * baseline.accuracy:.1f} %")

    def initialised(self, results: list[TrainResult], refusals: list[Refusal]) -> None:
        self._folder.initialised(results)
        spent = max((r.spending.epsilon_total for r in results if r.spending), default=None)
        cost = "no record used" if not results else "no claim" if spent is None else f"ε {spent:.2f}, worst site"
        self._folder.say(f"initialisation from a full gradient: {len(results)} sites, {cost}")
        for refusal in refusals:
            self._folder.say(f"  {refusal.site} did not take part ({refusal.kind}): {refusal.reason}")

    def finished(self, outcome: RoundOutcome, state: ServerState) -> None:
        self._folder.finished(outcome, state)
        self.last = outcome.score
        self._folder.say(round_line(self._job, outcome))

    def stopped(self, reason: str) -> None:
        self.stop_reason = reason
        self._folder.say(f"run ends early: {reason}")


def conduct(job: Job, run: str, connect: Callable[[Evaluator, RunFolder], Transport]) -> Path:
    """Run a job and leave everything in its folder, whose path is returned.

    Args:
        job: the checked configuration.
        run: the run's id.
        connect: makes the transport once the server's model is there.

    Raises:
        RunFailed: the run could not go on; the folder's ``result.json`` has the same reason.
    """
    folder = RunFolder(run_folder(job.config, run), job, run)
    folder.progress(phase="loading model and data")
    try:
        evaluator, observer = Evaluator(job), _Observer(job, folder)
        state = run_rounds(job, run, connect(evaluator, folder), evaluator, observer)
        folder.save_adapter(evaluator.model, state.adapter, evaluator.label_names)
        (folder.path / "report.md").write_text(markdown_report(folder.path), encoding="utf-8")
        folder.result(
            "stopped" if observer.stop_reason else "completed",
            observer.stop_reason,
            accuracy_before=observer.baseline.accuracy,
            accuracy=observer.last.accuracy,
            epsilon=federation_epsilon(folder.path),
            rounds=state.round_number,
        )
    except Exception as error:
        folder.result("failed", str(error) if isinstance(error, FedVeilError) else f"{type(error).__name__}: {error}")
        raise
    return folder.path

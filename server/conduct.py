"""One run from its first file to its last: load, run the rounds, save the result, say how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from fedveil.common.data.notes import notes_on
from fedveil.common.data.sources import unprotected_test
from fedveil.common.derived import EarlierFile
from fedveil.common.errors import FedVeilError, RunFailed
from fedveil.common.files import full_disk
from fedveil.common.log import about, kept_in, place_of, set_up
from fedveil.common.model.score import Score, control_words
from fedveil.common.paths import REPLIES, run_folder, run_name
from fedveil.common.run_lines import ProgressFile, Reached, ResultFile, Status
from fedveil.common.server_file import ENGINES, ServerStart
from fedveil.common.strict_json import to_json
from fedveil.common.trackers import check_installed
from fedveil.common.words import counted
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import federation_epsilon, write_reports
from fedveil.reports.course import epsilon_by
from fedveil.reports.folder import read_run
from fedveil.server.admission import Admission
from fedveil.server.begin import begin, resume
from fedveil.server.checkpoint import Checkpoint, load_checkpoint
from fedveil.server.collect.door import collector_of
from fedveil.server.lock import GLANCE_SECONDS, only_writer
from fedveil.server.members import Member
from fedveil.server.model import ServerModel
from fedveil.server.observers import Observer, Observers, RoundOutcome, Update
from fedveil.server.own_check import began
from fedveil.server.records import RunFolder, write_json
from fedveil.server.rounds import run_rounds
from fedveil.server.sites import Transport
from fedveil.server.terminal import figures_words, round_line, score_words
from fedveil.server.tracking import Tracking
from fedveil.server.update import ServerUpdate
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")
DYING_SECONDS = 90.0
"""How long a resumed run waits for the server that began it: one that lost its SuperLink takes a while to give up."""


class Terminal(Observer):
    """Says what it hears in lines for people."""

    def __init__(self, job: Job, folder: RunFolder, server_model: ServerModel) -> None:
        self._job, self._folder, self._server_model = job, folder, server_model
        self.stop_reason = ""

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Say the score before training, and after round 0."""
        control = control_words(baseline.name, baseline.records, baseline.predicted)
        self._folder.say(f"before training: {figures_words(baseline)}{control and f' ({control})'}")
        if words := self._server_model.statistic_words:
            self._folder.say(f"  {words}", 0)
        if begun is not None:
            self._folder.say(f"after round 0: {figures_words(begun)}")

    def resumed(self, round_number: int, score: Score | None) -> None:
        """Say after which round the run goes on."""
        self._folder.say(f"goes on after round {round_number}: {score_words(score)}".rstrip(": "))

    def initialised(self, outcome: RoundOutcome) -> None:
        """Say what the start was made of, and who took no part in it."""
        results = outcome.got.results.values()
        spent = self._epsilon(0) if any(result.spending for result in results) else None
        cost = "no claim" if spent is None else f"ε {epsilon_text(spent)}, worst site"
        text = self._job.origin.fingerprint
        made = f" from public text of SHA-256 {text}" if text else ""
        of = f"{counted(len(results), 'site')}, {cost}" if results else "no private records used"
        self._folder.say(f"initialised by {self._job.origin.name}{made}: {of}", 0)
        if words := self._server_model.public_words:
            self._folder.say(words, 0)
        for absence in outcome.got.refusals.values():
            self._folder.say(f"  {absence.site} did not take part ({absence.kind}): {absence.reason}", 0)

    def finished(self, outcome: RoundOutcome, update: Update, members: Mapping[str, Member]) -> None:
        """Say the round's line."""
        number, shown = outcome.round_number, self._folder.shown
        own = shown.by_lines(lambda: self._epsilon(number))
        self._folder.say(round_line(shown, outcome, members, own), number)

    def stopped(self, reason: str) -> None:
        """Say why the run ends early."""
        self.stop_reason = reason
        self._folder.say(f"run ends early: {reason}")

    def _epsilon(self, round_number: int) -> float | None:
        """Return the federation's ε by the end of a round, by what the folder's lines say and cost."""
        return epsilon_by(read_run(self._folder.path), round_number)


def conduct(
    job: Job,
    flower_run: str,
    connect: Callable[[ServerModel, RunFolder], Transport],
    start: ServerStart | None = None,
) -> Path:
    """Run a job, or go on with the run that it resumes, and leave everything in its folder, whose path is returned.

    Args:
        job: the checked configuration.
        flower_run: the id that Flower gave this start.
        connect: makes the transport once the server's model is there.
        start: what the server knows of itself; None: server and sites are this one process.

    Raises:
        ConfigError, DataError: there is nothing to resume, or the tracker is not installed; nothing was touched.
        RunFailed: another server writes the run's folder, and nothing was touched; or the run could not go on:
            the folder's ``result.json`` has the same reason, and what was trained until then is saved as if
            it had ended there.
    """
    set_up()
    check_installed(job.config.tracker)
    run, path = run_name(job.config, flower_run), run_folder(job.config, flower_run)
    if job.config.resume:
        load_checkpoint(path, job, run)  # no folder is locked, or made, for a run that cannot go on
    else:
        path.mkdir(parents=True, exist_ok=True)
    with only_writer(path, DYING_SECONDS if job.config.resume else GLANCE_SECONDS):
        # Read once nobody else writes: the server that did may have finished a round, or the run, meanwhile.
        saved = load_checkpoint(path, job, run) if job.config.resume else None
        folder = RunFolder(path, job, run, saved)
        folder.begun(start or began("one process"))
        _logged(job, run, folder, connect)
    return path


def _logged(job: Job, run: str, folder: RunFolder, connect: Callable[[ServerModel, RunFolder], Transport]) -> None:
    """Conduct the run with its log and its tracker, and write its reports, also where it fails."""
    with kept_in(folder.path / "log.jsonl", folder.shown.hidden_log):
        if folder.shown.log_note:
            log.info(folder.shown.log_note, extra=about(run))
        tracking = Tracking(job, folder.path, run)
        try:
            _conduct(job, run, folder, connect, tracking)
        except BaseException:
            tracking.close()
            try:
                write_reports(folder.path)
            except FedVeilError as second:
                # A full disk, say: what ends the run matters more than that no report could be written.
                log.error("the run has no report: %s", second, extra=about(run))
            raise
        tracking.close()
        folder.progress(ProgressFile("writing the report"))
        write_reports(folder.path)


def _conduct(
    job: Job,
    run: str,
    folder: RunFolder,
    connect: Callable[[ServerModel, RunFolder], Transport],
    tracking: Tracking,
) -> None:
    server_model: ServerModel | None = None
    try:
        log.info("this run's files are in %s", folder.path, extra=about(run))
        folder.progress(ProgressFile("loading model and data"))
        _warn_of_test(job, folder)
        folder.say(f"engine: {ENGINES[folder.reach]}")
        server_model = ServerModel(job)
        if earlier := server_model.earlier:
            write_json(folder.path / EarlierFile.NAME, to_json(EarlierFile(earlier)))
        terminal = Terminal(job, folder, server_model)
        folder.label_names, folder.slice_names = server_model.label_names, server_model.slice_names
        observer, transport = Observers(folder, terminal, tracking), connect(server_model, folder)
        with _usable_once_interrupted(folder, server_model):
            run_all(job, run, transport, server_model, observer, folder.saved)
        _leave(folder, server_model, "stopped" if terminal.stop_reason else "completed", terminal.stop_reason)
    except Exception as error:
        full = full_disk(error, folder.path)
        known = full or (error if isinstance(error, FedVeilError) else None)
        reason = str(known or f"{type(error).__name__}: {error}")
        log.error("the run fails: %s", reason if known else place_of(error), extra=about(run))
        rounds = folder.saved.state.round_number if folder.saved else 0
        if server_model is None or not rounds:
            _say_failed(folder, reason, full)
            raise
        hint = f"rounds up to {rounds} are kept; go on from there with resume = {run!r}"
        try:
            _leave(folder, server_model, "failed", f"{reason}. {hint}")
        except Exception as second:
            # A full disk, say: the first reason matters more than that the adapter could not be exported.
            reason = f"{reason}. {hint}; the adapter could not be saved ({type(second).__name__})"
            _say_failed(folder, reason, full)
        raise


@contextmanager
def _usable_once_interrupted(folder: RunFolder, server_model: ServerModel) -> Iterator[None]:
    """Save the adapter of the last complete round where the block ends by Ctrl-C or a notebook's stop."""
    try:
        yield
    except KeyboardInterrupt:
        if folder.saved and folder.saved.state.round_number:
            with suppress(OSError, FedVeilError):
                folder.save_adapter(server_model.model, folder.saved.state.adapter, server_model.label_names)
        raise


def _warn_of_test(job: Job, folder: RunFolder) -> None:
    """Say in the run's log that test records which no ε covers are shown to whoever reads the scores."""
    data = job.config.data
    if warning := unprotected_test(data.name, data.test, data.test_size):
        folder.say(warning)
        for note in notes_on(data, job.config.model.task):
            folder.say(note)


def run_all(
    job: Job,
    run: str,
    transport: Transport,
    server_model: ServerModel,
    observer: Observer,
    saved: Checkpoint | None = None,
) -> ServerState:
    """Begin or resume a run, run its rounds, and return the last state; errors as for ``run_rounds``."""
    admission = Admission(job, saved.members if saved else {}, transport.registered, run)
    collector = collector_of(job, run, transport, server_model, admission, saved.resumes if saved else 0)
    start = resume(saved, observer) if saved else begin(job, collector, server_model, observer)
    server = ServerUpdate(
        job,
        server_model,
        lambda state: observer.renewed(state, collector.members),
        renewed=bool(saved and saved.renewed),
    )
    return run_rounds(job.config.rounds, start, collector, server, observer)


def _say_failed(folder: RunFolder, reason: str, full: RunFailed | None) -> None:
    """Save why a run failed; where there is no room for that either, raise it."""
    try:
        folder.ended(ResultFile("failed", reason, None))
    except OSError as error:
        raise full or error from error


def _leave(folder: RunFolder, server_model: ServerModel, status: Status, reason: str) -> None:
    """Save the adapter of the last complete round, the report and how the run ended."""
    saved = folder.saved
    if saved is None:
        return
    job = server_model.job
    folder.progress(ProgressFile("saving the adapter"))
    folder.save_adapter(server_model.model, saved.state.adapter, server_model.label_names)
    reached = Reached(
        accuracy_before=saved.baseline.accuracy,
        accuracy=(saved.score or server_model.score(saved.state.adapter)).accuracy,
        epsilon=federation_epsilon(folder.path),
        rounds=saved.state.round_number,
        honest_sites=job.config.privacy.honest_sites,
    )
    folder.ended(ResultFile(status, reason, reached))
    if status == "completed":  # of any other end the run may go on
        rmtree(folder.path / REPLIES, ignore_errors=True)

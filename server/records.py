"""The files of a run's folder, as the server writes them.

``config.json``     every setting, with versions of what computed it
``server.json``     what the server knew of its code, connections and machine at each start
``earlier.json``    the earlier runs whose releases it begins with, and what each claims, if there are any
``baseline.json``   the score before any record is used
``rounds.jsonl``    one line a round: scores on public data, bytes, seconds, who took part, what failed and why
``privacy.jsonl``   one line a charge of a site that has come, whether or not it counts: the privacy report
``checkpoint.safetensors``  what the run goes on from (see ``server.checkpoint``)
``run.log``         what the terminal shows
``log.jsonl``       the server's log
``progress.json``   what goes on right now, for ``watch``
``adapter/``        the final adapter in PEFT's format, with the head and what is needed to score it
``ranks/``          the same cut to every lower rank, without the head, of a strategy whose adapter may be cut
``result.json``     how the run ended

What the JSON files hold is defined in ``common.run_lines``.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedveil.common.bundle import own_digest
from fedveil.common.derived import VotesFile
from fedveil.common.files import (
    append_lines,
    check_room,
    cut_file,
    drop_leftovers,
    finite,
    length,
    replace_file,
    with_usual_mode,
)
from fedveil.common.log import about
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.score import Score
from fedveil.common.paths import local_name, without_paths
from fedveil.common.run_lines import (
    AdapterFile,
    BaselineFile,
    ConfigFile,
    CountLine,
    LabelScore,
    PrivacyLine,
    ProgressFile,
    ResultFile,
    RoundLine,
    RunFile,
    ShortenedLine,
    read_file,
    read_if_there,
)
from fedveil.common.server_file import ENGINES, Reach, ServerFile, ServerStart
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import TASKS
from fedveil.server.checkpoint import NAME, Checkpoint, save_checkpoint
from fedveil.server.collect.door import shown_of
from fedveil.server.members import Member
from fedveil.server.observers import Observer, RoundOutcome, Update
from fedveil.server.privacy_lines import head_words, keep_charges, privacy_line
from fedveil.strategies.base import mean
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")
LEAST_ROOM = 4_000_000
"""Bytes of disk that a run keeps for reports, lines and logs."""
OWN = ("output", "privacy.ledger", "resume")
"""Settings that name the machine's folders and make no difference to the adapter, which is given away."""
PACKAGES = ("fedveil", "flwr", "torch", "opacus", "transformers", "peft", "dp-accounting", "mpmath", "numpy")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    replace_file(path, (json.dumps(finite(value), indent=2) + "\n").encode())


class RunFolder(Observer):
    """The folder of one run: writes down what it hears.

    With ``saved`` it is the folder of a run that goes on: what was appended after the checkpoint is cut off, but for
    what sites had paid by then, which was released and stays released.
    """

    def __init__(self, path: Path, job: Job, run: str, saved: Checkpoint | None = None) -> None:
        self.path, self.job, self.run = path, job, run
        self.shown = shown_of(job)
        """What may be written of a round."""
        self.saved = saved
        """The last checkpoint."""
        self.label_names: tuple[str, ...] = ()
        """Of the public records; set before the first line is written, as the slices' names."""
        self.slice_names: tuple[str, ...] = ()
        self._progress: ProgressFile | None = None
        self.reach: Reach = "one process"
        """What conducts the run."""
        self._baseline = saved.baseline if saved else Score(accuracy=0.0, loss=0.0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        path.mkdir(parents=True, exist_ok=True)
        if saved:
            for name, size in saved.lengths.items():
                if name == PrivacyLine.NAME:
                    keep_charges(path / name, size)
                else:
                    cut_file(path / name, size)
            drop_leftovers(path)
            (path / ResultFile.NAME).unlink(missing_ok=True)
            config = read_file(ConfigFile, path)
            after = [*config.resumed_after, saved.state.round_number]
            self._write(replace(config, resumed=[*config.resumed, now], resumed_after=after))
            return
        versions = {"python": platform.python_version(), **package_versions(job.config.model.quantise)}
        self._write(ConfigFile(run, now, job.settings(), versions, job.chosen()))

    def begun(self, start: ServerStart) -> None:
        """Record what the server knows of itself, beside what it knew when the run began or last went on."""
        self.reach = start.reach
        before = read_if_there(ServerFile, self.path) if self.saved else None
        self._write(ServerFile([*(before.starts if before else []), start]))

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Record the score before any record was used, and that after round 0, if it used some."""
        self._write(
            BaselineFile(
                baseline.accuracy,
                baseline.loss,
                self._by_label(baseline),
                self._by_slice(baseline),
                begun_accuracy=begun.accuracy if begun else None,
                begun_loss=begun.loss if begun else None,
                figures=list(baseline.figures),
                parts=self._by_kind(baseline),
            )
        )
        self._baseline = baseline
        self._save(Checkpoint(self.run, self.job.settings(), state, dict(members), baseline, begun or baseline, {}))

    def finished(self, outcome: RoundOutcome, update: Update, members: Mapping[str, Member]) -> None:
        """Append the round's line and each site's privacy line, then make the round count by its checkpoint."""
        self._lines(outcome)
        settings, state = self.job.settings(), update.after
        self._save(Checkpoint(self.run, settings, state, dict(members), self._baseline, outcome.score, {}))

    def renewed(self, state: ServerState, members: Mapping[str, Member]) -> None:
        """Save what was made of the head beside the round that is saved, before a site is sent it."""
        if self.saved is None:
            raise ValueError("nothing is saved that could be renewed")
        self._save(replace(self.saved, state=state, members=dict(members), renewed=True))

    def missed(self, outcome: RoundOutcome) -> None:
        """Append the line of a round that does not count, and what the sites paid for it all the same."""
        self._lines(outcome)
        if self.saved:
            self._save(self.saved)

    def asks(self) -> None:
        """Check that the disk has room for another checkpoint, before sites pay for a round, and for all at its end."""
        check_room(self.path, LEAST_ROOM + 2 * length(self.path / NAME))

    def initialised(self, outcome: RoundOutcome) -> None:
        """Append round 0's line and what it cost each site, and write down what records voted for."""
        self._lines(outcome)
        if self.job.origin.votes and outcome.counts:
            (counts,) = (part["counts"] for part in mean(outcome.got.averaged).values())
            self._write(VotesFile(counts.tolist(), outcome.got.noise.exact()))

    def _lines(self, outcome: RoundOutcome) -> None:
        got, results = outcome.got, outcome.got.results.values()
        lines = [privacy_line(self.job, result) for result in results]
        # First what came of attempts that were thrown away, or does not count: a site's last line has its total.
        beside = [line for line in (privacy_line(self.job, paid) for paid in got.paid) if line not in lines]
        self._append(*beside, *lines)
        participants = list(got.participants) if outcome.counts else []
        counts = [(result.site, result.noised_correct) for result in results]
        self._append(
            RoundLine(
                round_number=outcome.round_number,
                complete=outcome.counts,
                strategy=self.job.strategy.name,
                participants=participants,
                accuracy=outcome.score.accuracy if outcome.score else None,
                loss=outcome.score.loss if outcome.score else None,
                bytes_down=got.bytes_down,
                bytes_up=got.bytes_up,
                seconds=self.shown.seconds(outcome.seconds),
                privacy=self.job.config.privacy.mode,
                head=head_words(self.job),
                noised_correct=[CountLine(site, c.value, c.noise_std) for site, c in counts if c],
                refusals=list(got.refusals.values()),
                attempts=got.attempts,
                failures=got.failures,
                labels=self._by_label(outcome.score) if outcome.score else [],
                slices=self._by_slice(outcome.score) if outcome.score else [],
                shortened=[ShortenedLine(one.site, one.factor) for one in got.averaged if one.factor < 1],
                figures=list(outcome.score.figures) if outcome.score else [],
                parts=self._by_kind(outcome.score) if outcome.score else [],
            )
        )

    def _by_label(self, score: Score) -> list[LabelScore]:
        known = range(min(len(self.label_names), len(score.right)))
        return [
            LabelScore(
                self.label_names[n],
                score.right[n],
                score.records[n],
                score.predicted[n] if score.predicted else None,
                list(score.confusion[n]) if score.confusion else [],
            )
            for n in known
        ]

    def _by_kind(self, score: Score) -> list[LabelScore]:
        kinds = TASKS[self.job.config.model.task].scored.kinds(self.label_names)
        return [LabelScore(kind, *counts) for kind, counts in zip(kinds, score.parts, strict=False)]

    def _by_slice(self, score: Score) -> list[LabelScore]:
        counts = zip(self.slice_names, score.slice_right, score.slice_records, strict=False)
        return [LabelScore(name, right, records) for name, right, records in counts]

    def _write(self, file: RunFile) -> None:
        write_json(self.path / file.NAME, to_json(file))

    def _append(self, *lines: RunFile) -> None:
        for name in dict.fromkeys(line.NAME for line in lines):
            append_lines(self.path / name, [to_json(line) for line in lines if name == line.NAME])

    def _save(self, checkpoint: Checkpoint) -> None:
        lengths = {name: length(self.path / name) for name in (RoundLine.NAME, PrivacyLine.NAME)}
        self.saved = replace(checkpoint, lengths=lengths)
        save_checkpoint(self.path, self.saved)

    def say(self, line: str, round_number: int | None = None) -> None:
        """Log a line for people, and keep it in ``run.log`` as it is."""
        for part in line.splitlines():
            log.info("%s", part, extra=about(self.run, round_number))
        with (self.path / "run.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def progress(self, progress: ProgressFile | None) -> None:
        """Say what goes on right now, where it is another thing than before; None: what was said last still does."""
        if progress is not None and progress != self._progress:
            self._progress = progress
            self._write(progress)

    def ended(self, result: ResultFile) -> None:
        """Say how the run ended."""
        self._write(replace(result, engine=ENGINES[self.reach]))

    def save_adapter(self, model: FederatedModel, adapter: AdapterState, label_names: tuple[str, ...]) -> Path:
        """Write the final adapter in PEFT's format, the head, and what scoring it needs."""
        folder, config = self.path / "adapter", self.job.config
        model.write(adapter)
        model.adapter.export(model.peft_model, adapter, folder, local_name(config.model.name))
        if model.head:
            head = {name: tensor.float().cpu().contiguous() for name, tensor in model.folded_head.items()}
            save_file(head, str(folder / "head.safetensors"), metadata={"labels": json.dumps(label_names)})
        about = AdapterFile(
            base_model=local_name(config.model.name),
            base_fingerprint=model.base.fingerprint,
            base_files=model.base.files,
            bundle=own_digest(),
            task=config.model.task,
            label_names=list(label_names),
            max_length=config.model.max_length,
            feature_scale=config.model.feature_scale,
            precision=str(model.precision).removeprefix("torch."),
            settings={key: value for key, value in without_paths(self.job.settings()).items() if key not in OWN},
        )
        write_json(folder / AdapterFile.NAME, to_json(about))
        for made in (folder, self.path / "ranks"):
            if made.is_dir():
                with_usual_mode(made)
        return folder


def package_versions(quantise: str = "none") -> dict[str, str]:
    """Return the installed version of everything that a run's figures rest on, given its ``model.quantise``."""
    found = {}
    for package in PACKAGES if quantise == "none" else (*PACKAGES, "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found

"""The spending of earlier runs, by their folders: a coordinator sees no ledger of a site's.

Each site's lines say what it released. The site that has spent most stands for all. What a ledger holds beside these
runs, no folder tells, but a site's own total does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.messages.round import SpendingFigures
from common.privacy.accounting import Release
from common.privacy.figures import epsilon_text
from common.privacy.privacy_filter import FRESH, History, commitment_to, price_after
from reports.folder import RunFiles, read_run
from reports.sites import TOLERANCE, releases_of_site
from strategies.job import Job, configure


@dataclass(frozen=True)
class Earlier:
    """What the site that has spent most released in earlier runs."""

    history: History
    note: str
    """What the folders cannot say; empty: nothing."""


def earlier_runs(folders: Sequence[Path], job: Job) -> Earlier:
    """Return what earlier runs have spent.

    Args:
        folders: of runs, in the order in which they ran.
        job: the run that comes after them.

    Raises:
        ConfigError: a run was without privacy, of another unit, named twice, damaged or of another version, or tells of
            no release.
        DataError: one is no folder of a run.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("--after: a folder is named twice, and would count twice: name each once")
    runs = [_read(folder, job.mechanism.claim.per) for folder in folders]
    if not runs:
        return Earlier(FRESH, "")
    names = sorted({line.site for files in runs for line in files.privacy if line.spent})
    return max((_of_site(name, runs) for name in names), key=lambda found: _price(found.history))


def _read(folder: Path, unit: str) -> RunFiles:
    files = read_run(folder)
    if files.problems:
        raise ConfigError(f"--after: {folder} is damaged, so what it spent is not known: {files.problems[0]}")
    try:
        mechanism = configure(files.config.settings).mechanism
    except ConfigError as error:
        raise ConfigError(f"--after: the run in {folder} is none of this version: {error}") from error
    if not mechanism.claims:
        raise ConfigError(f"--after: the run in {folder} was without privacy, so no ε holds for its records any more")
    if unit and mechanism.claim.per != unit:
        raise ConfigError(
            f"--after: the run in {folder} protects a {mechanism.claim.per} and this one a {unit}: no ε holds for both"
        )
    if not any(line.spent for line in files.privacy):
        raise ConfigError(f"--after: the run in {folder} tells of no release: leave it out")
    return files


def _of_site(name: str, runs: Sequence[RunFiles]) -> Earlier:
    released = [releases for releases in (releases_of_site(name, files) for files in runs) if releases]
    told = _told(name, runs)
    history = History(_joined(released), commitment_to([], released[0]), min(line.delta for line in told))
    total = max(line.epsilon_total for line in told)
    if total == math.inf:
        raise ConfigError(f"--after: records of {name} were released without privacy, so no ε holds for them any more")
    if total <= _price(history) + TOLERANCE:
        return Earlier(history, "")
    return Earlier(
        history,
        f"{name} says that its ledger held ε {epsilon_text(total)} in all, more than these runs cost: name the others "
        "too, or take more noise",
    )


def _told(name: str, runs: Sequence[RunFiles]) -> list[SpendingFigures]:
    return [line.spent for files in runs for line in files.privacy if line.site == name and line.spent]


def _joined(released: Sequence[Sequence[Release]]) -> tuple[Release, ...]:
    return tuple(release for run in released for release in run)


def _price(history: History) -> float:
    return price_after(history, (), history.delta)[0]

"""What earlier runs have spent, by their folders: a coordinator sees no ledger of a site's.

Each site's lines say what it released. The site that has spent most stands for all. What a ledger holds beside these
runs, no folder tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.privacy.accounting import Release
from common.privacy.privacy_filter import FRESH, History, commitment_to, price_after
from reports.folder import read_run
from reports.sites import releases_of_site
from strategies.job import Job, configure


def history_of(folders: Sequence[Path], job: Job) -> History:
    """Return what the site that has spent most released in earlier runs, the first folder's first.

    Args:
        folders: of runs, in the order in which they ran.
        job: the run that comes after them.

    Raises:
        ConfigError: a run was without privacy, of another unit, or released nothing; or it is none of this version.
        DataError: one is no folder of a run.
    """
    runs = [_released(folder, job.mechanism.claim.per) for folder in folders]
    histories = [_history([run[name] for run in runs if name in run]) for name in sorted(set().union(*runs))]
    return max(histories, key=lambda held: price_after(held, (), job.config.privacy.delta)[0], default=FRESH)


def _history(runs: Sequence[Sequence[Release]]) -> History:
    return History(tuple(release for run in runs for release in run), commitment_to([], runs[0]))


def _released(folder: Path, unit: str) -> dict[str, list[Release]]:
    files = read_run(folder)
    mechanism = configure(files.config.settings).mechanism
    if not mechanism.claims:
        raise ConfigError(f"--after: the run in {folder} was without privacy, so no ε holds for its records any more")
    if unit and mechanism.claim.per != unit:
        raise ConfigError(
            f"--after: the run in {folder} protects a {mechanism.claim.per} and this one a {unit}: no ε holds for both"
        )
    found = {line.site: releases_of_site(line.site, files) for line in files.privacy if line.spent}
    if not found:
        raise ConfigError(f"--after: the run in {folder} has released nothing: leave it out")
    return found

"""The spending of earlier runs, by their folders: a coordinator sees no ledger of a site's.

Each site's lines say what it released, and the site whose releases cost most is taken for all. A ledger may hold more
than these runs: each site that reported more than its releases cost is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.errors import ConfigError
from fedveil.common.words import natural
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import FRESH, History, commitment_to, price_after
from fedveil.reports.folder import RunFiles, read_run
from fedveil.reports.releases import releases_of_site
from fedveil.reports.sites import TOLERANCE
from fedveil.strategies.job import Job, configure


@dataclass(frozen=True)
class Earlier:
    """What the site whose releases cost most released in earlier runs."""

    history: History
    notes: tuple[str, ...] = ()
    """One for each site that reported more than it released in these runs, the largest total first."""


def earlier_runs(folders: Sequence[Path], job: Job) -> Earlier:
    """Return what earlier runs have spent.

    Args:
        folders: of runs, in the order in which they ran.
        job: the run that comes after them.

    Raises:
        ConfigError: a run was without privacy, of another unit, named twice, damaged, of another version or without
            releases.
        DataError: one is no folder of a run.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("--after: a folder is named twice, and would count twice: name each once")
    runs = [_read(folder, job.claim.per) for folder in folders]
    if not runs:
        return Earlier(FRESH)
    names = {line.site for files in runs for line in files.privacy if line.spent}
    sites = [_of_site(name, runs) for name in sorted(names, key=natural)]
    # By the known releases: a larger total has a price, but no releases that a plan could continue.
    dearest = max(sites, key=lambda site: site.priced)
    more = sorted((site for site in sites if site.total > site.priced + TOLERANCE), key=lambda site: -site.total)
    return Earlier(dearest.history, tuple(_note(site, dearest) for site in more))


@dataclass(frozen=True)
class _OfSite:
    """What one site released in earlier runs; ε at the smallest δ of its lines."""

    name: str
    history: History
    priced: float
    """ε of its releases in the named runs."""
    total: float
    """ε of all that its ledger held, by the largest total that it reported."""


def _note(site: _OfSite, counted: _OfSite) -> str:
    own, total, of_all = map(epsilon_text, (site.priced, site.total, counted.priced))
    return (
        f"{site.name} says that its ledger held ε {total} in all, more than these runs cost it, which is ε {own}: this "
        f"plan counts {of_all}, of {counted.name}. Name the other runs too, or take more noise"
    )


def _read(folder: Path, unit: str) -> RunFiles:
    files = read_run(folder)
    if files.problems:
        raise ConfigError(f"--after: {folder} is damaged, so what it spent is not known: {files.problems[0]}")
    try:
        claim = configure(files.config.settings).claim
    except ConfigError as error:
        raise ConfigError(f"--after: the run in {folder} is not of this version: {error}") from error
    if not claim.per:
        raise ConfigError(f"--after: the run in {folder} was without privacy, so no ε holds for its records any more")
    if unit and claim.per != unit:
        raise ConfigError(
            f"--after: the run in {folder} protects a {claim.per} and this one a {unit}: no ε holds for both"
        )
    if not any(line.spent for line in files.privacy):
        raise ConfigError(f"--after: the run in {folder} has no release: leave it out")
    return files


def _of_site(name: str, runs: Sequence[RunFiles]) -> _OfSite:
    released = [releases for releases in (releases_of_site(name, files) for files in runs) if releases]
    spent = [line.spent for files in runs for line in files.privacy if line.site == name and line.spent]
    releases = tuple(release for of_run in released for release in of_run)
    history = History(releases, commitment_to([], released[0]), min(one.delta for one in spent))
    total = max(one.epsilon_total for one in spent)
    if total == math.inf:
        raise ConfigError(f"--after: records of {name} were released without privacy, so no ε holds for them any more")
    return _OfSite(name, history, price_after(history, (), history.delta)[0], total)

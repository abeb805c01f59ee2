"""Releases of the sites in a run, by the lines that they sent, and those beside training as a report has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import SpendingFigures
from fedveil.privacy.accountant import EVALUATION, INITIALISATION, TRAINING
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.events import Event, sampled_gaussian
from fedveil.reports.folder import RunFiles, SiteLines
from fedveil.strategies.job import configure


@dataclass(frozen=True)
class ReleaseReport:
    """A release that is not a training step: an initialisation, a noised evaluation."""

    round_number: int
    site: str
    purpose: str
    event: Event
    """Of a count the clip is what one record can change."""
    epsilon_added: float | None
    """None: it was charged together with the training of its round."""
    value: float | None = None
    """What was released, where it is one figure."""
    count: int | None = 1
    """Number of releases of the event; an initialisation may take many steps. None: unknown to this version."""


def other_releases(files: RunFiles) -> list[ReleaseReport]:
    """Return what was released beside training steps: initialisations, then noised counts of right answers."""
    beside = [(line, line.spent) for line in files.privacy if line.spent and line.spent.purpose != TRAINING]
    try:
        start = _count_of_start(files) if beside else 1
    except ConfigError:  # of another version's settings; ε is not recomputed then, and the report says why
        start = None
    paid = [
        ReleaseReport(
            round_number=line.round_number,
            site=line.site,
            purpose=spent.purpose,
            event=spent.event,
            epsilon_added=spent.epsilon_round,
            count=start if spent.purpose == INITIALISATION else 1,
        )
        for line, spent in beside
    ]
    counts = [
        ReleaseReport(number, site, EVALUATION, sampled_gaussian(noise, 1.0), None, value)
        for number, site, noise, value in noised_counts(files)
    ]
    return paid + counts


def noised_counts(files: RunFiles) -> list[tuple[int, str, float, float]]:
    """Return each distinct (round, site, noise's standard deviation in records, count)."""
    counts = [
        (line.round_number, count.site, count.noise_std, count.value)
        for line in files.rounds
        for count in line.noised_correct
    ]
    return list(dict.fromkeys(counts))


def _count_of_start(files: RunFiles) -> int:
    """Return how many releases the run's initialisation is, by its settings: a probe is many steps.

    Raises:
        ConfigError: the settings are not of this version.
    """
    release = configure(files.config.settings).origin.release()
    return release.count if release else 1


def releases_of(paid: Iterable[SpendingFigures], files: RunFiles) -> list[Release]:
    """Return the releases of a site's spendings, in order.

    A spending for training counts as its steps, one for the initialisation as its releases, any other once.

    Raises:
        ConfigError: a spending has no price here, or the run's settings are not of this version.
    """
    spendings = list(paid)
    start = _count_of_start(files) if any(s.purpose == INITIALISATION for s in spendings) else 1
    counts = {INITIALISATION: start}
    return [
        Release(s.event, s.steps_round if s.purpose == TRAINING else counts.get(s.purpose, 1), s.purpose)
        for s in spendings
    ]


def releases_of_site(name: str, files: RunFiles) -> list[Release]:
    """Return everything that one site released in this run; raises as ``releases_of``."""
    lines = files.by_site.get(name, SiteLines())
    paid = [line.spent for line in lines.privacy if line.spent]
    return releases_of(paid, files) + [count_release(noise) for noise in lines.noised if paid]


def count_release(noise: float) -> Release:
    """Return a noised count as a release."""
    return gaussian_release(noise, 1.0, 1, EVALUATION)

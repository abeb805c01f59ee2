"""The meaning of ε in a report: attacks on the site that this run cost most, and people with several records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.privacy import mechanism_of
from common.privacy.figures import bound_text, epsilon_text
from common.privacy.meaning import Meaning, meaning_of
from reports.folder import RunFiles
from reports.sites import SiteReport, releases_of_site
from reports.trials import TRIAL_ALONE

RECORD = "record"
THIS_RUN = (
    "These figures are of this run's releases alone. The site's ledger holds more, which an attacker may use as well."
)


@dataclass(frozen=True)
class MeaningReport:
    """The figures of the site whose releases in this run cost most."""

    site: str
    per: str
    """The unit in one word."""
    epsilon: float
    """Of this run's releases, computed again."""
    delta: float
    bounds: Meaning
    caution: str
    """What the figures leave out; empty: nothing that this report knows of."""
    seen: str
    """What an attacker sees, in words."""


def meaning_report(files: RunFiles, sites: Sequence[SiteReport]) -> MeaningReport | None:
    """Return what the run's ε means; None where nothing is promised or nothing was computed."""
    mechanism = mechanism_of(files.config.settings)
    if mechanism is None or not mechanism.claims or any(site.agreement == "exposed" for site in sites):
        return None
    known = [site for site in sites if site.epsilon_recomputed is not None and site.delta is not None]
    if not known:
        return None
    worst = max(known, key=lambda site: site.epsilon_recomputed or 0.0)
    epsilon, delta = worst.epsilon_recomputed or 0.0, worst.delta or 0.0
    bounds = meaning_of(releases_of_site(worst.site, files), delta)
    if bounds is None:
        return None
    per = mechanism.claim.per
    if per != RECORD:
        # Of another unit a person may be one whole.
        bounds = replace(bounds, several=[])
    cautions = [THIS_RUN] * (worst.agreement == "larger") + [TRIAL_ALONE] * (files.tuning is not None)
    caution = " ".join(cautions)
    seen = "all that the server gave away" if mechanism.central else "all that was sent"
    return MeaningReport(worst.site, per, epsilon, delta, bounds, caution, seen)


def whose_sentence(meaning: MeaningReport, *, central: bool) -> str:
    """Return of which site the figures are; ``central``: whether a trusted server noised the sum of all."""
    return "Of every site of the cohort." if central else f"Of the site that this run cost most: {meaning.site}."


def attack_sentence(meaning: MeaningReport) -> str:
    """Return the bounds on attacks in one sentence."""
    rates = ", and ".join(
        f"at {100 * a.false_positives:g} % false alarms finds at most {bound_text(a.true_positives)} of members"
        for a in meaning.bounds.attacks
    )
    return (
        f"An attacker who sees {meaning.seen}, knows every other {meaning.per} and asks whether one {meaning.per} "
        f"was trained on, {rates}. Guessing finds as many members as it has false alarms; no attack finds more than "
        f"{bound_text(meaning.bounds.advantage)} beyond that."
    )


def several_sentence(meaning: MeaningReport) -> str:
    """Return the ε of people with several units in one sentence; empty where there are no figures."""
    if not meaning.bounds.several:
        return ""
    figures = ", ".join(
        f"{epsilon_text(several.epsilon, decimals=1)} with {several.units}" for several in meaning.bounds.several
    )
    return f"A person with several {meaning.per}s at one site has a larger ε at δ {meaning.delta:g}: {figures}."

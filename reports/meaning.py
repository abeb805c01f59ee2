"""The meaning of ε in a report: attacks on the sites, and people with several records.

Which site an attack finds most at need not be the one with the largest ε: each has its ε at its own δ. So every figure
is the largest of all sites'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedveil.common.words import names_text, natural
from fedveil.privacy import promise_of
from fedveil.privacy.accounting import Release, alone
from fedveil.privacy.events import Event
from fedveil.privacy.figures import bound_text, epsilon_text
from fedveil.privacy.meaning import Attack, Meaning, Several, meaning_of
from fedveil.reports.folder import RunFiles
from fedveil.reports.releases import releases_of_site
from fedveil.reports.sharing import NOT_ADDED, Sharing, rests_on, sharing_of
from fedveil.reports.sites import SiteReport
from fedveil.reports.trials import TRIAL_ALONE

RECORD = "record"
THIS_RUN = "These figures cover this run's releases alone. {} ledger holds more, which an attacker may use too."
LEFT_OUT = "They leave out sites whose ε could not be recomputed: {}."
SCALE = (
    "Any outcome is at most e^ε times as likely with the records of one unit as without them (1 at ε = 0, 2.7 at "
    "ε = 1, 20 at ε = 3), apart from a probability of δ."
)
NO_BOUND = (
    "No bound on attacks is known for this ε: it is infinite, or too large for one, or could not be computed again."
)


@dataclass(frozen=True)
class MeaningReport:
    """The largest figures of all sites."""

    site: str
    """Whose releases in this run have the largest ε."""
    per: str
    """The unit in one word."""
    epsilon: float
    """Of this run's releases, computed again: the largest of all sites."""
    delta: float
    """The largest of all sites'."""
    bounds: Meaning
    caution: str
    """What the figures leave out; empty: nothing that this report knows of."""
    seen: str
    """What an attacker sees, in words."""
    honest_sites: int
    """h: sites of each sum that ``epsilon`` and ``bounds`` count on; 0: no noise is shared."""
    alone: Meaning | None
    """The bounds if no other site adds its noise to a sum; None where none is counted on, or no bound is known."""
    summed: bool
    """Whether all sites' noise is that of one sum, in which units of one person at several sites count as several."""

    @property
    def counted(self) -> str:
        """What a person may have several of, each of which counts as a unit."""
        return f"{self.per}s" if self.per == RECORD else "sites"

    @property
    def whose(self) -> str:
        """Who has several of them."""
        if self.per != RECORD:
            return "A person at several sites of one sum"
        return f"A person with several {self.per}s at one site" + (" or at several of one sum" if self.summed else "")


def meaning_report(files: RunFiles, sites: Sequence[SiteReport]) -> MeaningReport | None:
    """Return what the run's ε means; None where nothing is promised or nothing was computed."""
    promise = promise_of(files.config.settings)
    if promise is None or any(site.agreement == "exposed" for site in sites):
        return None
    known = [site for site in sites if site.epsilon_recomputed is not None and site.delta is not None]
    if not known:
        return None
    worst = max(known, key=lambda site: site.epsilon_recomputed or 0.0)
    epsilon, delta = worst.epsilon_recomputed or 0.0, max(site.delta or 0.0 for site in known)
    released = _dearest([releases_of_site(site.site, files) for site in known])
    bounds = _largest(released, delta)
    if bounds is None:
        return None
    sharing, per = sharing_of(files, sites), promise.per
    honest = sharing.honest_sites if sharing else 0
    bare = _largest([alone(releases) for releases in released], delta) if honest > 1 else None
    if per != RECORD:
        # Of another unit a person may be one whole; in a sum it is one at each of its sites, alone each has its noise.
        bounds = bounds if sharing else replace(bounds, several=[])
        bare = bare and replace(bare, several=[])
    central = files.trusts_server
    ledger = "The server's" if central else "A site's"
    cautions = [THIS_RUN.format(ledger)] * any(site.agreement == "larger" for site in sites)
    priced = {site.site for site in known}
    lost = [site.site for site in sites if site.epsilon_worst is not None and site.site not in priced]
    cautions += [LEFT_OUT.format(names_text(sorted(lost, key=natural)))] * bool(lost)
    caution = " ".join([*cautions, *[TRIAL_ALONE] * (files.tuning is not None)])
    seen = "all that the server gave away" if central else "all that was sent"
    summed = sharing is not None
    return MeaningReport(worst.site, per, epsilon, delta, bounds, caution, seen, honest, bare, summed=summed)


def _largest(released: Sequence[Sequence[Release]], delta: float) -> Meaning | None:
    """Return the largest of each figure over lists of releases; None where one of them has none."""
    found = [meaning_of(releases, delta) for releases in released]
    each = [meaning for meaning in found if meaning is not None]
    if len(each) < len(found):
        return None
    attacks = [
        Attack(same[0].false_positives, max(attack.true_positives for attack in same))
        for same in zip(*(meaning.attacks for meaning in each), strict=True)
    ]
    several: dict[int, list[float]] = {}
    for meaning in each:
        for own in meaning.several:
            several.setdefault(own.units, []).append(own.epsilon)
    shared = [Several(units, max(figures)) for units, figures in several.items() if len(figures) == len(each)]
    return Meaning(attacks, max(meaning.advantage for meaning in each), shared)


def _dearest(released: Sequence[Sequence[Release]]) -> list[list[Release]]:
    """Return the lists that no other list dominates, since each takes a second to price.

    A list dominates another if it has each of its releases at least as often and with no more noise.
    """
    dearest: list[list[Release]] = []
    for releases in released:
        counts: Counter[Event] = Counter()
        for release in releases:
            counts[release.event] += release.count
        own = sorted((Release(event, count) for event, count in counts.items()), key=_order)
        if not any(_within(own, other) for other in dearest):
            dearest = [*(other for other in dearest if not _within(other, own)), own]
    return dearest


def _order(release: Release) -> tuple[str, str, float]:
    return release.event.kind, release.event.having(noise_multiplier=1.0).text(), release.event.noise_multiplier


def _within(own: Sequence[Release], other: Sequence[Release]) -> bool:
    """Whether each release of ``own`` is one of ``other``, which has it as often and with no more noise."""
    return len(own) == len(other) and all(
        _order(mine)[:2] == _order(its)[:2]
        and mine.event.noise_multiplier >= its.event.noise_multiplier
        and mine.count <= its.count
        for mine, its in zip(own, other, strict=True)
    )


def whose_sentence(*, central: bool) -> str:
    """Return of which sites the figures are; ``central``: whether a trusted server noised the sum of all."""
    whose = "Figures hold for every site of the cohort." if central else "Figures are the worst case over sites."
    return f"{whose} {SCALE}"


def condition(meaning: MeaningReport) -> str:
    """Return how many honest sites the figures count on; empty where sites share no noise."""
    return rests_on(Sharing(meaning.honest_sites, 0, None, [])) if meaning.honest_sites else ""


def attack_sentence(meaning: MeaningReport) -> str:
    """Return the bounds on attacks; where sites share the noise with their condition, and what is left without it."""
    rates = ", and ".join(
        f"at {100 * a.false_positives:g} % false alarms finds at most {bound_text(a.true_positives)} of members"
        for a in meaning.bounds.attacks
    )
    on = condition(meaning)
    who = f"{on[:1].upper()}{on[1:]}, an attacker" if on else "An attacker"
    text = (
        f"{who} who sees {meaning.seen}, knows every other {meaning.per} and asks whether one {meaning.per} "
        f"was trained on, {rates}. Guessing finds as many members as it raises false alarms; no attack "
        f"finds more than {bound_text(meaning.bounds.advantage)} beyond that."
    )
    if meaning.honest_sites > 1:
        bare = meaning.alone
        least = "no bound is known"
        if bare:
            finds = " and ".join(bound_text(a.true_positives) for a in bare.attacks)
            least = f"it finds at most {finds} of members, and {bound_text(bare.advantage)} beyond guessing"
        text += f" I{NOT_ADDED[1:]} (alone), {least}."
    return text


def several_sentence(meaning: MeaningReport) -> str:
    """Return the ε of people who count as several units in one sentence; empty where there are no figures."""
    if not meaning.bounds.several:
        return ""
    on = condition(meaning)
    bare = f"; alone, {_several(meaning.alone)}" if meaning.alone and meaning.alone.several else ""
    return f"{meaning.whose} has a larger ε at δ {meaning.delta:g}{on and f', {on}'}: {_several(meaning.bounds)}{bare}."


def _several(bounds: Meaning) -> str:
    return ", ".join(f"{epsilon_text(several.epsilon)} with {several.units}" for several in bounds.several)

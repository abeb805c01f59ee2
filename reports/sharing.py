"""The honest sites that a claim counts on where sites share the noise of a secure sum, and what holds with others.

No form of a report prints a figure of such a run without saying of how many honest sites it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.strict_json import Epsilon
from fedveil.privacy import promise_of, sharing_noise
from fedveil.privacy.figures import epsilon_text
from fedveil.reports.folder import RunFiles
from fedveil.reports.sites import SiteReport, colluders_of, distinct, fewest_summed

NOT_ADDED = "if no other site adds its noise, or the masks fail"
THIS_RUN = "of this run's sums that counted"


@dataclass(frozen=True)
class MoreHonest:
    """What a run's sums cost if more sites of each are honest than the claim counts on."""

    honest_sites: int
    epsilon: Epsilon


@dataclass(frozen=True)
class Sharing:
    """The honest sites of a claim. Epsilons are of this run's sums that counted, the largest of all sites."""

    honest_sites: int
    """h: sites of each sum whose noise the claim counts on; 1: each site's own."""
    summed: int
    """Sites of the sum of fewest sites that counted; 0: none did."""
    epsilon_alone: Epsilon | None
    """If no other site adds its noise, or the masks fail; None: it cannot be computed from the run's files."""
    more_honest: list[MoreHonest]
    """All but ``privacy.colluders``, and all; those that are more than h."""

    @property
    def on_others(self) -> bool:
        """Whether the claim counts on another site than a record's own, so that the price alone is another one."""
        return self.honest_sites > 1


def sharing_of(files: RunFiles, sites: Sequence[SiteReport]) -> Sharing | None:
    """Return the honest sites that a run's claim counts on; None where sites share no noise.

    Sites may count on different numbers: the largest is returned, since with fewer not all of their claims hold.
    """
    settings = files.config.settings
    if not sharing_noise([str(settings.get("privacy.mode", "none"))]) or promise_of(settings) is None:
        return None
    counted = [figure for site in sites for figure in distinct(site.events, "honest_sites")]
    setting = settings.get("privacy.honest-sites", 1)
    honest, summed = int(max(counted, default=setting if isinstance(setting, int) else 1)), fewest_summed(files)
    figures = {
        summed - colluders_of(files): [site.epsilon_without_colluders for site in sites],
        summed: [site.epsilon_all_honest for site in sites],
    }
    known = {number: [value for value in found if value is not None] for number, found in figures.items()}
    more = [MoreHonest(number, max(found)) for number, found in known.items() if number > honest and found]
    bare = [site.epsilon_alone for site in sites if site.epsilon_alone is not None]
    return Sharing(honest, summed, max(bare, default=None), more)


def at_h(sharing: Sharing | None) -> str:
    """Return the suffix of a column's or axis' name; empty where sites share no noise."""
    return f", h = {sharing.honest_sites}" if sharing else ""


def rests_on(sharing: Sharing | None) -> str:
    """Return how many honest sites a figure counts on; empty where sites share no noise.

    >>> rests_on(Sharing(3, 4, 6.74, []))
    'as long as 3 sites of each sum are honest (h = 3)'
    >>> rests_on(Sharing(1, 4, 3.0, []))
    'whatever other sites do (h = 1)'
    """
    if sharing is None:
        return ""
    if sharing.honest_sites == 1:
        return "whatever other sites do (h = 1)"
    return f"as long as {sharing.honest_sites} sites of each sum are honest (h = {sharing.honest_sites})"


def others_of(sharing: Sharing) -> list[str]:
    """Return the claims beside that of h, each a condition with its ε: alone where h is above 1, and with more honest.

    >>> print(*others_of(Sharing(2, 4, 4.94, [MoreHonest(3, 2.4), MoreHonest(4, 2.1)])), sep="\\n")
    if no other site adds its noise, or the masks fail (alone): ε 4.940
    if 3 sites of each sum are honest (h = 3): ε 2.400
    if all 4 sites of each sum are honest (h = 4): ε 2.100
    """
    bare = epsilon_text(sharing.epsilon_alone, "not known, since it cannot be computed from the run's files")
    claims = [f"{NOT_ADDED} (alone): ε {bare}"] if sharing.on_others else []
    for more in sharing.more_honest:
        which = "all " if more.honest_sites == sharing.summed else ""
        claims.append(
            f"if {which}{more.honest_sites} sites of each sum are honest (h = {more.honest_sites}): "
            f"ε {epsilon_text(more.epsilon)}"
        )
    return claims


def beside(sharing: Sharing | None) -> str:
    """Return the conditions of an ε, from a comma on, with the other claims; empty where sites share no noise.

    >>> beside(Sharing(1, 3, 4.94, [MoreHonest(2, 3.1)]))[:60]
    ", whatever other sites do (h = 1); of this run's sums that c"
    """
    if sharing is None:
        return ""
    others = "; ".join(others_of(sharing))
    return f", {rests_on(sharing)}" + (f"; {THIS_RUN}, {others}" if others else "")

"""The price of what a server chooses as it goes: a filter, by what a data set's first run had planned.

A server may choose the noise and the sample rate of the next release after it has seen the last answer.
Prices that add up releases as if all had been fixed beforehand then hold for some choices and not for
all (Rogers et al. 2016, arXiv 1605.08294). These hold for all adaptive choices. With the first charge of
a data set its run's whole plan is written down, before anything is released.

A plan of **whole batches** has sample rate 1 throughout. A later release below it is taken as one at rate
1, which it is with records left out at random. Gaussian releases compose the same under adaptive choices
(Koskela, Tobaben and Honkela 2023, arXiv 2209.15596), so the PLD's price is exact, at all of δ.

Under any other plan a history has the smaller of two prices, each for a share of δ of its own:

* **as planned**, at ``PLANNED_SHARE``: a row of lists, each of which holds the one before, is fixed with
  the plan. The k-th has k of the plan's steps, and its other releases once for every run of that length
  that was begun. What was released so far, in whatever order, is drawn from the smallest list that holds
  it, and the PLD of that is the price.
* **departed**, at the rest: the Renyi divergences of all releases at one of ``ORDERS``. An order that is
  fixed beforehand is a filter (Feldman and Zrnic 2021, arXiv 2008.11193); each has its part of the rest.

Every price grows with the history. So whatever stays within a budget did so by one of these prices all
along, and what they lose at most adds up: δ. Who departs pays more than who keeps to the plan; an honest
run does keep to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fedveil.common.check import in_range
from fedveil.privacy.accountant import AT_RATE_1, TRAINING, Accountant, Detour, Method
from fedveil.privacy.accounting import Release, divergence_at, epsilon_with_method
from fedveil.privacy.calibration import least_at, least_noise
from fedveil.privacy.events import Event, kind_of
from fedveil.privacy.meaning import epsilon_of_several

PLANNED_SHARE = 0.9
"""Part of δ for what keeps to a plan with sample rates below 1; the rest is for what departs from it."""
ORDERS = (3, 6, 12, 24, 48)
"""Of the Renyi divergence, for what departs: about the best for low rates and an ε of 8, 3.2, 1.5, 0.7 and 0.3."""
ORDER_SHARES = {order: 1 / (order - 1) / sum(1 / (each - 1) for each in ORDERS) for order in ORDERS}
"""Of the rest of δ: a lower order needs more, as its ε has log(1/δ) / (order - 1)."""


@dataclass(frozen=True)
class Commitment:
    """What a data set's first run planned: all of its releases; none where nothing is spent."""

    releases: tuple[Release, ...]

    def changed(self, change: Callable[[Iterable[Release]], list[Release]]) -> Commitment:
        """Return the plan with its releases changed, such as to what each costs alone."""
        return Commitment(tuple(change(self.releases)))

    @property
    def whole(self) -> bool:
        """Whether every release of the plan is Gaussian and takes whole batches."""
        return all(release.event.sample_rate == 1 and _is_gaussian(release) for release in self.releases)


@dataclass(frozen=True)
class History:
    """What a data set had spent before a run, and by which plan that is priced."""

    releases: tuple[Release, ...] = ()
    """Empty: the run is its first."""
    commitment: Commitment = Commitment(())
    """Of the data set's first run; without a release where ``releases`` is empty."""
    delta: float = math.inf
    """The smallest δ of any of it, at which all that comes after is composed as well; infinite where there is none."""

    def changed(self, change: Callable[[Iterable[Release]], list[Release]]) -> History:
        """Return it with its releases changed, such as to what each costs alone."""
        return replace(self, releases=tuple(change(self.releases)), commitment=self.commitment.changed(change))


FRESH = History()
"""Of a data set that has spent nothing."""


def commitment_to(planned: Iterable[Release], first: Iterable[Release]) -> Commitment:
    """Return what is written down before the first charge: the run's plan, with what is charged first in it.

    Args:
        planned: everything that the run is to release of the data set.
        first: what is about to be charged, or was before plans were written down.
    """
    most = _together(planned, lambda event: event)
    for event, release in _together(first, lambda event: event).items():
        if event not in most or release.count > most[event].count:
            most[event] = release
    return Commitment(tuple(most.values()))


def promised(releases: Sequence[Release], delta: float, *, method: Method = "pld") -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of a plan that is kept to, and what computed it; as ``epsilon_with_method``."""
    return epsilon_with_method(releases, planned_delta(releases, delta), method=method)


def promised_noise(event: Event, epsilon: float, delta: float, steps: int, before: Sequence[Release] = ()) -> float:
    """Return the least noise of a plan of ``before`` and ``steps`` releases of ``event``; as ``least_noise``."""
    at = planned_delta([*before, Release(event, steps)], delta)
    return least_noise(event, epsilon, at, steps, before)


def price_after(history: History, releases: Sequence[Release], delta: float) -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of a history and a run that keeps to its plan, and what computed it."""
    if not history.releases:
        return promised(releases, delta)
    return price([*history.releases, *releases], history.commitment, delta)


def noise_after(
    history: History,
    event: Event,
    steps: int,
    beside: Sequence[Release],
    epsilon: float,
    delta: float,
    *,
    least: float = 0.0,
) -> float | None:
    """Return the noise with which a run fits into what a history leaves of ``epsilon``; None where none does.

    It is the noise of ``event`` where that suffices, and else the least that does: a larger one, or that of a step of
    the first plan, which is cheap because it keeps to it. More noise than the first plan's departs from it, and may
    cost more.

    Args:
        history: of the data set before the run.
        event: a step of the run, at the noise that it has where nothing was spent.
        steps: of the run.
        beside: the run's other releases.
        epsilon, delta: the budget of all of it.
        least: the least that the site asks for.
    """

    def run(noise: float) -> list[Release]:
        return [*beside, Release(event.having(noise_multiplier=noise), steps)]

    def fits(noise: float) -> bool:
        return price_after(history, run(noise), delta)[0] <= epsilon

    def cost(noise: float) -> float:
        # What is no step of the first plan departs from it, and the price of what departs falls with the noise.
        if departs:
            return departed([*history.releases, *run(noise)], delta)[0]
        return price_after(history, run(noise), delta)[0]

    departs = bool(history.releases) and not history.commitment.whole
    if not epsilon > 0:
        return None
    usual = max(event.noise_multiplier, least)
    if fits(usual):
        return usual
    planned = _noises_like(event, history.commitment) if departs else set()
    noises = {max(noise, least) for noise in (least_at(cost, epsilon), *planned) if noise is not None}
    # More noise than the least that fits may depart, and then not fit.
    return min(filter(fits, noises), default=None)


def _noises_like(event: Event, commitment: Commitment) -> set[float]:
    """Return the noise multipliers of a plan's releases that are as ``event`` but for their noise."""
    like = event.having(noise_multiplier=1.0).priced()
    events = (release.event for release in commitment.releases)
    return {each.noise_multiplier for each in events if each.having(noise_multiplier=1.0).priced() == like}


def planned_delta(releases: Iterable[Release], delta: float) -> float:
    """Return the δ at which a plan is composed: all of it where every sample rate is 1.

    >>> from fedveil.privacy.accounting import gaussian_release
    >>> planned_delta([gaussian_release(1.0, 1.0, 3)], 0.5), planned_delta([gaussian_release(1.0, 0.1, 3)], 0.5)
    (0.5, 0.45)
    """
    return delta if all(release.event.sample_rate == 1 for release in releases) else PLANNED_SHARE * delta


def price(spent: Sequence[Release], commitment: Commitment, delta: float) -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of all that a data set has ``spent``, and what computed it.

    What a site never lets pass a budget costs at most that under any adaptive choice. A plan's other releases count
    before they are made.

    Raises:
        ConfigError: ``delta`` is not in (0, 1].
    """
    in_range(0, 1, delta=delta)
    if commitment.whole or not spent:
        value, accountant = epsilon_with_method(_at_rate_1(spent), delta)
        if planned_delta(spent, delta) != delta:
            accountant = replace(accountant, detour=replace(accountant.detour or Detour(), reason=AT_RATE_1))
        return (value if all(map(_is_gaussian, spent)) else math.inf), accountant
    otherwise, planned = departed(spent, delta), _as_planned(spent, commitment)
    if planned is None:
        return otherwise
    return min(epsilon_with_method(planned, PLANNED_SHARE * delta), otherwise, key=lambda found: found[0])


def departed(spent: Sequence[Release], delta: float) -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of releases that no plan with lower rates has, and what computed it."""
    rest = (1 - PLANNED_SHARE) * delta
    prices = [divergence_at(order, spent, share * rest) for order, share in ORDER_SHARES.items()]
    return min(prices, key=lambda found: found[0])


def price_of_several(spent: Sequence[Release], commitment: Commitment, units: int, delta: float) -> float:
    """Return the ε at ``delta`` of a person with several units; errors as ``epsilon_of_several``.

    What departs from the plan is taken as at rate 1, where it is known for adaptive choices.
    """
    if not all(map(_is_gaussian, spent)):
        return math.inf
    if commitment.whole or not spent:
        return epsilon_of_several(_at_rate_1(spent), units, delta)
    found = epsilon_of_several(_at_rate_1(spent), units, (1 - PLANNED_SHARE) * delta)
    planned = _as_planned(spent, commitment)
    return found if planned is None else min(found, epsilon_of_several(planned, units, PLANNED_SHARE * delta))


def _as_planned(spent: Iterable[Release], commitment: Commitment) -> list[Release] | None:
    """Return the smallest of the plan's lists that holds everything in ``spent``; None if none does."""
    have, plan = _together(spent, Event.priced), _together(commitment.releases, Event.priced)
    step = max(plan, key=lambda event: (plan[event].purpose == TRAINING, _weight(plan[event]), event.text()))
    if not have.keys() <= plan.keys():
        return None
    steps = have[step].count if step in have else 0
    others = {event: release for event, release in plan.items() if event != step}
    runs = max((math.ceil(have[event].count / others[event].count) for event in others if event in have), default=1)
    steps = max(steps, (runs - 1) * plan[step].count + (runs > 1))
    runs = max(runs, math.ceil(steps / plan[step].count))
    listed = [replace(release, count=runs * release.count) for release in others.values()]
    return [*listed, replace(plan[step], count=steps)] if steps else listed


def _is_gaussian(release: Release) -> bool:
    return kind_of(release.event.kind).gaussian


def _weight(release: Release) -> float:
    return release.count * (release.event.sample_rate / release.event.noise_multiplier) ** 2


def _together(releases: Iterable[Release], key: Callable[[Event], Event]) -> dict[Event, Release]:
    """Return releases by a key of their event, those of one key as one: as steps, if any of them are."""
    found: dict[Event, Release] = {}
    for release in releases:
        merged = found.get(event := key(release.event))
        purpose = TRAINING if merged and merged.purpose == TRAINING else release.purpose
        found[event] = replace(release, count=release.count + (merged.count if merged else 0), purpose=purpose)
    return found


def _at_rate_1(releases: Iterable[Release]) -> list[Release]:
    return [replace(release, event=release.event.having(sample_rate=1.0)) for release in releases]

"""The price of what a server chooses as it goes: a filter, by what a data set's first run had planned.

A server may choose the noise and the sample rate of the next release after it has seen the last answer.
Prices that add up releases as if all had been fixed beforehand then hold for some choices and not for
all (Rogers et al. 2016, arXiv 1605.08294). These hold for all, whoever chooses. With the first charge of
a data set its run's whole plan is written down, before anything is released. From then on there are

* **whole batches**: the plan has sample rate 1 throughout. A later release below it is taken as one at
  rate 1, which it is with records left out at random. Gaussian releases compose alike whoever chooses
  them (Koskela, Tobaben and Honkela 2023, arXiv 2209.15596), so the PLD's price is exact, at all of δ.
* **as planned**: what was released is in the plan, but of its steps there may be more.
  The plan's other releases count in full, released or not. In whatever order and however far, that is
  drawn from one fixed list, whose PLD at ``PLANNED_SHARE`` of δ is the price.
* **departed**: anything else. The Renyi divergences of all releases add up at one order, which the plan
  was written down with: fixed beforehand, it is a filter (Feldman and Zrnic 2021, arXiv 2008.11193). It
  is the price at the rest of δ.

A transcript is as planned or has departed, so what both lose at most adds up: δ. Who departs pays more
than who keeps to the plan; an honest run does keep to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from common.accountant import AT_RATE_1, TRAINING, Accountant, Detour, Method
from common.check import in_range
from common.privacy.accounting import Release, divergence_at, epsilon_with_method, least_noise
from common.privacy.events import Event
from common.privacy.meaning import epsilon_of_several

PLANNED_SHARE = 0.9
"""Part of δ for what keeps to a plan with sample rates below 1; the rest is for what departs from it."""
MOST_ORDER = 256


@dataclass(frozen=True)
class Commitment:
    """What a data set's first run planned, and the order at which what departs from it is priced."""

    releases: tuple[Release, ...]
    """All of the run's, at least one; of each event one."""
    order: int
    """Of the Renyi divergence, from 2."""

    def changed(self, change: Callable[[Iterable[Release]], list[Release]]) -> Commitment:
        """Return the plan with its releases changed, such as to what each costs alone."""
        return replace(self, releases=tuple(change(self.releases)))

    @property
    def whole(self) -> bool:
        """Whether every release of the plan takes whole batches."""
        return all(release.event.sample_rate == 1 for release in self.releases)


def order_for(epsilon: float) -> int:
    """Return the Renyi order that is about best for releases at rates below 1 which cost ``epsilon`` together.

    >>> order_for(8.0), order_for(1.0), order_for(float("inf"))
    (3, 17, 2)
    """
    return min(MOST_ORDER, max(2, math.ceil(1 + 16 / epsilon)))


def commitment_to(planned: Iterable[Release], first: Iterable[Release], epsilon: float) -> Commitment:
    """Return what is written down before the first charge: the run's plan, with what is charged first in it.

    Args:
        planned: everything that the run is to release of the data set.
        first: what is about to be charged, or was before plans were written down.
        epsilon: the steward's budget.
    """
    most = _together(planned, lambda event: event)
    for event, release in _together(first, lambda event: event).items():
        if event not in most or release.count > most[event].count:
            most[event] = release
    return Commitment(tuple(most.values()), order_for(epsilon))


def promised(releases: Sequence[Release], delta: float, *, method: Method = "pld") -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of a plan that is kept to, and what computed it; as ``epsilon_with_method``."""
    return epsilon_with_method(releases, planned_delta(releases, delta), method=method)


def promised_noise(event: Event, epsilon: float, delta: float, steps: int, before: Sequence[Release] = ()) -> float:
    """Return the least noise of a plan of ``before`` and ``steps`` releases of ``event``; as ``least_noise``."""
    at = planned_delta([*before, Release(event, steps)], delta)
    return least_noise(event, epsilon, at, steps, before)


def planned_delta(releases: Iterable[Release], delta: float) -> float:
    """Return the δ at which a plan is composed: all of it where every sample rate is 1.

    >>> from common.privacy.accounting import gaussian_release
    >>> planned_delta([gaussian_release(1.0, 1.0, 3)], 0.5), planned_delta([gaussian_release(1.0, 0.1, 3)], 0.5)
    (0.5, 0.45)
    """
    return delta if all(release.event.sample_rate == 1 for release in releases) else PLANNED_SHARE * delta


def price(spent: Sequence[Release], commitment: Commitment, delta: float) -> tuple[float, Accountant]:
    """Return the ε at ``delta`` of all that a data set has ``spent``, whoever chose it, and what computed it.

    Raises:
        ConfigError: ``delta`` is not in (0, 1].
    """
    in_range(0, 1, delta=delta)
    if commitment.whole or not spent:
        value, accountant = epsilon_with_method(_at_rate_1(spent), delta)
        if planned_delta(spent, delta) != delta:
            accountant = replace(accountant, detour=replace(accountant.detour or Detour(), reason=AT_RATE_1))
        return value, accountant
    planned = _as_planned(spent, commitment)
    if planned is not None:
        return epsilon_with_method(planned, PLANNED_SHARE * delta)
    return divergence_at(commitment.order, spent, (1 - PLANNED_SHARE) * delta)


def price_of_several(spent: Sequence[Release], commitment: Commitment, units: int, delta: float) -> float:
    """Return the ε at ``delta`` of somebody with so many units; errors as ``epsilon_of_several``.

    What departs from the plan is taken as at rate 1, where it is known whoever chooses.
    """
    if commitment.whole or not spent:
        return epsilon_of_several(_at_rate_1(spent), units, delta)
    planned = _as_planned(spent, commitment)
    if planned is not None:
        return epsilon_of_several(planned, units, PLANNED_SHARE * delta)
    return epsilon_of_several(_at_rate_1(spent), units, (1 - PLANNED_SHARE) * delta)


def _as_planned(spent: Iterable[Release], commitment: Commitment) -> list[Release] | None:
    """Return the list that everything in ``spent`` is drawn from, as far as it has to be; None if there is none.

    It is the plan, but of its steps there are as many as were released.
    """
    have, plan = _together(spent, Event.priced), _together(commitment.releases, Event.priced)
    main = max(plan, key=lambda event: (plan[event].purpose == TRAINING, _weight(plan[event]), event.text()))
    for event, release in have.items():
        if event not in plan or (event != main and release.count > plan[event].count):
            return None
    others = [release for event, release in plan.items() if event != main]
    return [*others, have[main]] if main in have else others


def _weight(release: Release) -> float:
    return release.count * (release.event.sample_rate / release.event.noise_multiplier) ** 2


def _together(releases: Iterable[Release], key: Callable[[Event], Event]) -> dict[Event, Release]:
    """Return releases by a key of their event, those of one key as one: as steps, if any of them are."""
    found: dict[Event, Release] = {}
    for release in releases:
        held = found.get(event := key(release.event))
        purpose = TRAINING if held and held.purpose == TRAINING else release.purpose
        found[event] = replace(release, count=release.count + (held.count if held else 0), purpose=purpose)
    return found


def _at_rate_1(releases: Iterable[Release]) -> list[Release]:
    return [replace(release, event=release.event.having(sample_rate=1.0)) for release in releases]

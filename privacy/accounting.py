"""Accounting as data: a list of releases goes in, the epsilon that they cost together comes out.

What a release costs is its kind's to say (``EVENTS``); here releases of any kinds are composed. The
unit is the mechanism's: neighbouring data sets differ by adding or removing one. The figures do not hold
for replace-one neighbours, and those of a Poisson sample not for shuffled or fixed-size batches.

The number of record is the privacy loss distribution (PLD; Doroshenko et al. 2022, "Connect the
Dots", arXiv 2207.04380), rounded against us on a grid of 1e-3. Renyi DP (RDP; Mironov, Talwar and
Zhang 2019, arXiv 1908.10530) is the cross-check and the fallback. Both are upper bounds, and RDP is
nearly always the larger one.

Which accountant answers depends on the releases and delta alone, all of them public. RDP answers when

* a noise multiplier is below ``PLD_NOISE_FLOOR``, or the Renyi divergences of order 2 of all steps
  add up to more than ``PLD_DIVERGENCE_LIMIT``: epsilon is then in the hundreds or more, and the grid
  of the PLD needs seconds or gigabytes (the kernel may kill the process, which no one can catch);
* the PLD raises, or has no finite answer, which happens for a delta below about 1e-14.

A price takes seconds, whatever was released (``MOST_WORK``): of a history with very many different
releases, noise is rounded down and rates up until few enough are left, which only raises epsilon, and
the accountant says so. ``check_terms`` refuses figures that no honest job has.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from fedveil.common.check import at_least, in_range, positive
from fedveil.common.errors import ConfigError
from fedveil.common.foreign_words import ABSL_UNCONVERGED
from fedveil.privacy.accountant import (
    BELOW_FLOOR,
    DEPARTED,
    ERRORS,
    FINEST_GRID,
    MOST_GRID,
    NOT_FINITE,
    PLD_INTERVAL,
    TOO_LARGE,
    TRAINING,
    Accountant,
    Detour,
    Method,
)
from fedveil.privacy.events import Event, kind_of, sampled_gaussian

if TYPE_CHECKING:
    from dp_accounting import PrivacyAccountant

Merged = tuple[tuple[Event, int], ...]
"""Distinct events, of priced figures alone, with their counts, sorted: the form that is priced and cached."""

PLD_DIVERGENCE_LIMIT = 1000.0
MOST_COUNT = 10**6
LEAST_DELTA = 1e-12
MOST_WORK = 150.0
"""Of one price, in units of some 8 ms: every distinct release takes 3, and 1/noise² more for the PLD's grid."""

_VERSION = version("dp-accounting")


@dataclass(frozen=True)
class Release:
    """``count`` releases of one event.

    Raises:
        ConfigError: the event has no price, or figures that no mechanism has; or the count is not a whole number >= 1.
    """

    event: Event
    count: int
    purpose: str = TRAINING
    """One of ``privacy.accountant.PURPOSES``, for the reader of a report; it does not change the price."""

    def __post_init__(self) -> None:
        self.event.check()
        positive(count=self.count)
        if not isinstance(self.count, int) or isinstance(self.count, bool):
            raise ConfigError(f"count must be a whole number, not {self.count!r}")


def alone(releases: Iterable[Release]) -> list[Release]:
    """Return what releases cost if no other site adds its noise to a sum."""
    return [replace(release, event=release.event.alone()) for release in releases]


def honest_sites(releases: Iterable[Release]) -> int:
    """Return on how many honest sites of a sum the price of releases counts, the most of all sums; 0 without a sum.

    >>> honest_sites([gaussian_release(1.0, 0.1, 3)])
    0
    """
    return int(max((release.event.figures.get("honest_sites", 0) for release in releases), default=0))


def gaussian_release(
    noise_multiplier: float, sample_rate: float, count: int, purpose: str = TRAINING, clip_norm: float = 1.0
) -> Release:
    """Return ``count`` releases of a ``sampled_gaussian`` event; errors as for Release."""
    return Release(sampled_gaussian(noise_multiplier, sample_rate, clip_norm), count, purpose)


def check_terms(releases: Sequence[Release], delta: float) -> None:
    """Raise ConfigError for figures that no honest job has and that would keep a site's processor busy."""
    at_least(LEAST_DELTA, delta=delta)
    for release in releases:
        kind_of(release.event.kind).check_terms(release.event)
        if release.count > MOST_COUNT:
            raise ConfigError(f"a charge is for at most {MOST_COUNT:,} steps, not {release.count:,}")


def epsilon(releases: Sequence[Release], delta: float, *, method: Method = "pld") -> float:
    """Return the epsilon, at ``delta``, of publishing all ``releases`` about one data set.

    Guarantees: an upper bound on the true epsilon, and at least 0; 0.0 for no releases; the order of
    the releases, their purposes, and how equal ones are split into entries make no difference, to the
    last bit. May be ``inf`` where no accountant has an answer.

    The grid makes ``"pld"`` loose, never wrong, where a step loses far less than 1e-3: with sampling
    rate 0.01 and noise multiplier 20, 2,000 steps are priced at 0.088, which RDP puts at 0.077.

    Raises:
        ConfigError: ``delta`` is not in (0, 1].
    """
    return epsilon_with_method(releases, delta, method=method)[0]


def epsilon_with_method(
    releases: Sequence[Release], delta: float, *, method: Method = "pld"
) -> tuple[float, Accountant]:
    """Return ``epsilon(releases, delta)`` and the accountant that gave it.

    >>> str(epsilon_with_method([gaussian_release(1.0, 1.0, count=1)], 1e-5, method="rdp")[1])[:3]
    'RDP'
    """
    in_range(0, 1, delta=delta)
    return _priced(merge(releases), delta, method)


def divergence_at(order: int, releases: Sequence[Release], delta: float) -> tuple[float, Accountant]:
    """Return the epsilon at ``delta`` that follows from the Renyi divergence of one order, and who computed it.

    For one order that is fixed beforehand it holds for releases chosen adaptively; see ``privacy_filter``. May be inf.
    """
    value, error = _rdp(merge(releases), delta, order)
    return value, Accountant("rdp", _VERSION, Detour(DEPARTED, order, error))


def composable(releases: Sequence[Release]) -> Merged | None:
    """Return releases as the PLD composes them, as few and as coarse as they are priced; None where RDP answers."""
    merged, _ = _affordable(merge(releases))
    return merged if merged and not _why_not_pld(merged).reason else None


def merge(releases: Sequence[Release]) -> Merged:
    """Return releases as they are priced: equal ones together, sorted."""
    counts: Counter[Event] = Counter()
    for release in releases:
        counts[release.event.priced()] += release.count
    return _sorted(counts)


def add(merged: Merged, event: Event, count: int) -> Merged:
    """Return ``merged`` with ``count`` releases of ``event`` more."""
    counts = Counter(dict(merged))
    counts[event.priced()] += count
    return _sorted(counts)


def price_of(merged: Merged, delta: float) -> float:
    """Return ``epsilon`` of merged releases."""
    return _priced(merged, delta, "pld")[0]


def _sorted(counts: Counter[Event]) -> Merged:
    def place(item: tuple[Event, int]) -> tuple[str, tuple[float, ...]]:
        event = item[0]
        return event.kind, tuple(event.figures[name] for name in kind_of(event.kind).priced)

    return tuple(sorted(counts.items(), key=place))


def _work(merged: Merged) -> float:
    return sum(kind_of(event.kind).work(event) for event, _ in merged)


def _affordable(merged: Merged) -> tuple[Merged, int]:
    """Return ``merged`` and 0, or fewer releases that together cost at least as much privacy, and their grid's number.

    The grids of figures are powers of two, each of which holds all of the next, so a longer history never costs less.
    """
    step, grid, rounded = FINEST_GRID, 0, merged
    while _work(rounded) > MOST_WORK and grid < MOST_GRID:
        coarse: Counter[Event] = Counter()
        for event, count in merged:
            coarse[kind_of(event.kind).coarser(event, step)] += count
        rounded = _sorted(coarse)
        step, grid = 2 * step, grid + 1
    return rounded, 0 if rounded == merged else grid


@lru_cache(maxsize=4096)
def _priced(merged: Merged, delta: float, method: Method) -> tuple[float, Accountant]:
    merged, grid = _affordable(merged)
    value, answered, detour = _answer(merged, delta, method)
    detour = replace(detour, grid=grid)
    return value, Accountant(answered, _VERSION, None if detour == Detour() else detour)


def _answer(merged: Merged, delta: float, method: Method) -> tuple[float, Method, Detour]:
    detour = Detour()
    if method == "pld":
        detour = _why_not_pld(merged)
        if not detour.reason:
            try:
                # The dearest last: what is composed after it would be convolved with its large grid.
                value = _compose(_accountant("pld"), tuple(sorted(merged, key=_divergence)), delta)
            except (ArithmeticError, ValueError, MemoryError) as error:
                detour = Detour(_error_name(error))
            else:
                if math.isfinite(value):
                    return max(0.0, value), "pld", detour
                detour = Detour(NOT_FINITE, delta)
    value, failed = _rdp(merged, delta)
    return value, "rdp", replace(detour, error=failed)


@lru_cache(maxsize=4096)
def _rdp(merged: Merged, delta: float, order: int = 0) -> tuple[float, str]:
    """Return epsilon by RDP at one order, or at the best one (0), and the error that it failed with or nothing."""
    try:
        with _without_order_warnings():
            value = _compose(_accountant("rdp", order), merged, delta)
    except (ArithmeticError, ValueError) as error:
        # Figures that another machine made up must not stop whoever prices them.
        return math.inf, _error_name(error)
    # Not a number must never read as free; below 0 is what RDP can make of nearly free releases.
    return math.inf if math.isnan(value) else max(0.0, value), ""


def _error_name(error: Exception) -> str:
    """Return the nearest of ERRORS that an error is a kind of."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS)


def _why_not_pld(merged: Merged) -> Detour:
    without = [event.noise_multiplier for event, _ in merged if not kind_of(event.kind).has_grid(event)]
    if without:
        return Detour(BELOW_FLOOR, min(without))
    if sum(map(_divergence, merged)) > PLD_DIVERGENCE_LIMIT:
        return Detour(TOO_LARGE)
    return Detour()


def _divergence(steps: tuple[Event, int]) -> float:
    """Return the Renyi divergence of order 2 of all releases of one event."""
    event, count = steps
    return count * kind_of(event.kind).divergence(event)


def _accountant(method: Method, order: int = 0) -> PrivacyAccountant:
    # Here and not above: the library brings SciPy, over a second that only who prices needs to spend.
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    if method == "pld":
        return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, PLD_INTERVAL)
    return RdpAccountant([order] if order else None, NeighboringRelation.ADD_OR_REMOVE_ONE)


def _compose(accountant: PrivacyAccountant, merged: Merged, delta: float) -> float:
    from dp_accounting import SelfComposedDpEvent

    for event, count in merged:
        accountant.compose(SelfComposedDpEvent(kind_of(event.kind).dp_event(event), count))
    return float(accountant.get_epsilon(delta)) if merged else 0.0


@contextmanager
def _without_order_warnings() -> Iterator[None]:
    """Silence one absl warning per Renyi order that does not converge: leaving an order out only raises the bound."""

    def keep(record: logging.LogRecord) -> bool:
        return ABSL_UNCONVERGED not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

"""Events: what a release is to a price, as data, and the table of kinds that the accountant composes.

A release is named by the kind of its event and by figures, each under its own name. So it is stored,
sent and printed without anybody knowing its kind but the table ``EVENTS``. Noise, rate and clip are
stated in an event and nowhere else: a plan, a ledger's row and a message hold one.

A kind that is in no row has no price: nothing of it can be charged, composed or counted as free.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from fedveil.common.check import at_least, in_range, positive
from fedveil.common.errors import ConfigError
from fedveil.privacy.accountant import PLD_NOISE_FLOOR

if TYPE_CHECKING:
    from dp_accounting import DpEvent

LEAST_NOISE, MOST_NOISE = 0.01, 1e5
"""Ends of the range that a search for noise goes over, and of what may be charged."""
LEAST_RATE = 1e-6


class Figures(dict[str, float]):
    """Figures by name, sorted, that never change: two of equal content are one key.

    >>> Figures({"b": 2, "a": 1}), hash(Figures({"a": 1})) == hash(Figures({"a": 1.0}))
    ({'a': 1.0, 'b': 2.0}, True)
    """

    def __init__(self, figures: Mapping[str, float] | Any) -> None:
        super().__init__(sorted((str(name), float(value)) for name, value in dict(figures).items()))

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[type[Figures], tuple[dict[str, float]]]:
        return Figures, (dict(self),)

    def _never(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("figures of an event never change: make another one")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = setdefault = clear = _never


@dataclass(frozen=True)
class Event:
    """One noised sum, as data. It may be of a kind, or hold figures, that cannot be priced here: see ``check``."""

    kind: str
    """A row of ``EVENTS``."""
    figures: dict[str, float]
    """By name; see the kind's row for names and units."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", Figures(self.figures))

    def check(self) -> None:
        """Raise ConfigError unless the kind is known, and has these figures, each in its range."""
        kind = kind_of(self.kind)
        if set(self.figures) != set(kind.figures):
            raise ConfigError(
                f"a release of kind {self.kind!r} has the figures {', '.join(kind.figures)}, not "
                f"{', '.join(self.figures) or 'none'}"
            )
        kind.check(self)

    def having(self, **figures: float) -> Event:
        """Return the event with some figures replaced."""
        return Event(self.kind, {**self.figures, **figures})

    def priced(self) -> Event:
        """Return the event with the figures that its price depends on, alone."""
        return Event(self.kind, {name: self.figures[name] for name in kind_of(self.kind).priced})

    def text(self) -> str:
        """Return the figures as canonical JSON, from which ``event_from`` makes the same event to the last bit.

        >>> Event("sampled-gaussian", {"sample_rate": 0.1, "noise_multiplier": 2}).text()
        '{"noise_multiplier":2.0,"sample_rate":0.1}'
        """
        return json.dumps(self.figures, sort_keys=True, separators=(",", ":"))

    def alone(self) -> Event:
        """Return what it costs if no other site adds noise: the event itself, where none does."""
        return kind_of(self.kind).alone(self)

    def of_honest(self, sites: int) -> Event:
        """Return what it costs if ``honest`` sites of a sum add their noise: the event itself, where none is shared."""
        return kind_of(self.kind).of_honest(self, sites)

    @property
    def noise_multiplier(self) -> float:
        """Scale of the noise over the clip norm (a ratio)."""
        return self.figures["noise_multiplier"]

    @property
    def sample_rate(self) -> float:
        """Chance of each unit to be in the sum."""
        return self.figures["sample_rate"]

    @property
    def clip_norm(self) -> float:
        """Bound of what one unit adds to the sum."""
        return self.figures["clip_norm"]


class EventKind(ABC):
    """One kind of event: its figures, and what the accountant must know to compose it.

    Every kind has at least the three figures that a site's terms are compared by.
    """

    name: ClassVar[str]
    figures: ClassVar[tuple[str, ...]] = ("noise_multiplier", "sample_rate", "clip_norm")
    """Names of all figures."""
    priced: ClassVar[tuple[str, ...]] = ("noise_multiplier", "sample_rate")
    """Names of those that the price depends on, in the order in which releases are sorted."""

    gaussian: ClassVar[bool] = False
    """Whether it is a Gaussian release at rate 1: those compose alike whoever chooses them."""

    def check(self, event: Event) -> None:
        """Raise ConfigError unless every figure is one that a mechanism can have."""
        positive(noise_multiplier=event.noise_multiplier)
        in_range(0, 1, sample_rate=event.sample_rate)
        positive(clip_norm=event.clip_norm)

    def check_terms(self, event: Event) -> None:
        """Raise ConfigError for figures that no honest job has and that would take long to price."""
        at_least(LEAST_RATE, sample_rate=event.sample_rate)
        if not LEAST_NOISE <= event.noise_multiplier <= MOST_NOISE:
            raise ConfigError(
                f"noise-multiplier must be from {LEAST_NOISE:g} to {MOST_NOISE:g}, not {event.noise_multiplier!r}"
            )

    def alone(self, event: Event) -> Event:
        """Return what the event costs if no other site adds its noise to it: the event itself, where none does."""
        return event

    def of_honest(self, event: Event, sites: int) -> Event:
        """Return what the event costs if ``sites`` of its sum add noise: the event itself, where none is shared."""
        del sites
        return event

    @abstractmethod
    def dp_event(self, event: Event) -> DpEvent:
        """Return the event as dp-accounting composes it, for adding or removing one unit."""

    def dp_event_of(self, event: Event, units: int) -> DpEvent | None:
        """Return the event as dp-accounting composes it, for adding or removing ``units`` of one person together.

        Each unit is sampled on its own. None: that has no price here.
        """
        return self.dp_event(event) if units == 1 else None

    @abstractmethod
    def divergence(self, event: Event) -> float:
        """Return the Renyi divergence of order 2, or a bound on it: how large a grid the PLD needs."""

    @abstractmethod
    def work(self, event: Event) -> float:
        """Return what a price of it takes, in the units of ``MOST_WORK``."""

    @abstractmethod
    def coarser(self, event: Event, step: float) -> Event:
        """Return an event that costs at least as much, on a grid of figures with ``step`` between powers of two.

        The grid of a step holds all of that of twice the step.
        """

    @abstractmethod
    def has_grid(self, event: Event) -> bool:
        """Return whether a PLD has a grid for it; else RDP answers."""


class SampledGaussian(EventKind):
    """A sum over a Poisson sample, each unit clipped in L2, plus Gaussian noise (Abadi et al. 2016, algorithm 1).

    ``noise_multiplier``: the noise's standard deviation over the clip norm. ``sample_rate``: chance of each unit to be
    in the sample, on its own; at 1 it is the plain Gaussian mechanism. ``clip_norm``: L2, in the units of what is
    summed; the price does not depend on it.
    """

    name: ClassVar[str] = "sampled-gaussian"
    gaussian: ClassVar[bool] = True

    def dp_event(self, event: Event) -> DpEvent:
        """Return a Gaussian event, Poisson-sampled below rate 1."""
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

        plain = GaussianDpEvent(event.noise_multiplier)
        return PoissonSampledDpEvent(event.sample_rate, plain) if event.sample_rate < 1 else plain

    def dp_event_of(self, event: Event, units: int) -> DpEvent | None:
        """Return a mixture of Gaussians: that many units are in the sample with the chance of Binomial(units, rate)."""
        from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

        if units == 1:
            return self.dp_event(event)
        rate, members = event.sample_rate, range(units + 1)
        shares = [math.comb(units, k) * rate**k * (1 - rate) ** (units - k) for k in members]
        mixture = [(float(k), share) for k, share in zip(members, shares, strict=True) if share > 0]
        return MixtureOfGaussiansDpEvent(
            event.noise_multiplier, [k for k, _ in mixture], [share for _, share in mixture]
        )

    def divergence(self, event: Event) -> float:
        """Return log(1 + q² (exp(1/sigma²) - 1))."""
        return math.log1p(event.sample_rate * event.sample_rate * math.expm1(event.noise_multiplier**-2))

    def work(self, event: Event) -> float:
        """Return 3, and 1/noise² more for the PLD's grid."""
        return 3 + (event.noise_multiplier**-2 if self.has_grid(event) else 0.0)

    def coarser(self, event: Event, step: float) -> Event:
        """Return it with noise rounded down and rate rounded up.

        Less noise on the same sample, or the same noise on a sample that more records are in, loses no less: a release
        is the other one with noise added, or with records left out at random first.
        """
        noise, rate = event.noise_multiplier, event.sample_rate
        return event.having(
            noise_multiplier=min(noise, 2.0 ** (step * math.floor(math.log2(noise) / step))),
            sample_rate=max(rate, 2.0 ** (step * math.ceil(math.log2(rate) / step))),
        )

    def has_grid(self, event: Event) -> bool:
        """Return whether the noise is above the PLD's floor."""
        return event.noise_multiplier >= PLD_NOISE_FLOOR


class SummedGaussian(SampledGaussian):
    """A sum over the Poisson samples of several sites whose parts stay hidden, each with a part of the noise.

    ``noise_multiplier``: that of the noise which ``honest_sites`` of the sum's sites draw together, over the clip norm.
    What one site draws is lower by √honest_sites: that is its price alone. The others as in ``SampledGaussian``.
    """

    name: ClassVar[str] = "summed-gaussian"
    figures: ClassVar[tuple[str, ...]] = (*SampledGaussian.figures, "honest_sites")

    def check(self, event: Event) -> None:
        """Raise ConfigError unless every figure is one that a mechanism can have."""
        super().check(event)
        at_least(1, honest_sites=event.figures["honest_sites"])
        if event.figures["honest_sites"] % 1:
            raise ConfigError(f"honest-sites must be a whole number, not {event.figures['honest_sites']!r}")

    def alone(self, event: Event) -> Event:
        """Return the sum over one site's sample with that site's noise."""
        noise = event.noise_multiplier / math.sqrt(event.figures["honest_sites"])
        # Rounded down: what is priced is never above what is drawn.
        return sampled_gaussian(math.nextafter(noise, 0.0), event.sample_rate, event.clip_norm)

    def of_honest(self, event: Event, sites: int) -> Event:
        """Return the sum with the noise of ``sites`` sites, each of which draws its part."""
        noise = event.noise_multiplier * math.sqrt(sites / event.figures["honest_sites"])
        return event.having(noise_multiplier=math.nextafter(noise, 0.0), honest_sites=sites)


EVENTS: dict[str, EventKind] = {kind.name: kind for kind in (SampledGaussian(), SummedGaussian())}
"""Every kind of event that has a price."""


def kind_of(name: str) -> EventKind:
    """Return the row of a kind of event; ConfigError if it is unknown."""
    if name not in EVENTS:
        raise ConfigError(
            f"a release of kind {name!r} has no price here, only {', '.join(EVENTS)}: install the FedVeil that made it"
        )
    return EVENTS[name]


def event_from(kind: str, text: str) -> Event:
    """Return the event of a kind with figures as ``Event.text`` gives them; ConfigError if they are none."""
    try:
        figures = json.loads(text)
        if not isinstance(figures, dict) or not all(type(value) in (int, float) for value in figures.values()):
            raise ValueError("they are no numbers by name")
        return Event(kind, figures)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"the figures of a release cannot be read: {error}") from error


def sampled_gaussian(noise_multiplier: float, sample_rate: float, clip_norm: float = 1.0) -> Event:
    """Return the event of one noised sum of clipped units on a Poisson sample; figures as in ``SampledGaussian``."""
    figures = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "clip_norm": clip_norm}
    return Event(SampledGaussian.name, figures)

"""The theorem in ``docs/concepts/secure-aggregation.md``.

A sum of sites' rounded vectors is, nearly exactly, one rounded Gaussian.

Everything is in steps of the grid: ρ is the standard deviation of each site's noise. The two sides of the theorem are
computed in two ways: the sum of rounded numbers by convolving their laws, the rounded Gaussian by its Fourier integral.
The grid that is used has ρ of 1024 and more, where nothing could be seen, so the laws are compared at ρ from ½ to 16,
and the sampler is run on such grids, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.special import ndtr

from fedveil.privacy import grid
from fedveil.privacy.accounting import epsilon, gaussian_release
from fedveil.privacy.secure_sum import (
    AttemptName,
    Identity,
    Roster,
    SiteAttempt,
    Task,
    Terms,
    noise_share,
    rounded,
    total,
)

Law = tuple[int, np.ndarray]
"""The first whole number, and the chances of it and of those after it."""


# --- the two sides ----------------------------------------------------------------------------------------------------


def of_one(place: float, rho: float) -> Law:
    """Return the law of round(place + N(0, ρ²))."""
    first, last = math.floor(place - 12 * rho) - 1, math.ceil(place + 12 * rho) + 1
    borders = (np.arange(first, last + 2) - 0.5 - place) / rho
    # From the nearer end, so that both tails are exact.
    low, high = borders[:-1], borders[1:]
    return first, np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def of_sum(places: Sequence[float], rho: float) -> Law:
    """Return the law of the sum of sites' rounded numbers, as it is sent."""
    first, chances = of_one(places[0], rho)
    for place in places[1:]:
        other, more = of_one(place, rho)
        first, chances = first + other, np.convolve(chances, more)
    return first, chances


def of_theorem(place: float, sites: int, rho: float, over: Law) -> np.ndarray:
    """Return the chances of round(place + N(0, Kρ²) + K - 1 uniforms on ±½) at the numbers of a law.

    That is the density of place + N(0, Kρ²) + K uniforms at whole numbers: an integral over its Fourier transform.
    """
    numbers = over[0] + np.arange(len(over[1]))
    most = 9.5 / (math.sqrt(sites) * rho)
    frequencies, width = np.linspace(0, most, 4 * math.ceil(most * (len(numbers) + 40)) + 3, retstep=True)
    transform = np.exp(-sites * rho**2 * frequencies**2 / 2) * np.sinc(frequencies / (2 * np.pi)) ** sites
    transform[0] /= 2
    return np.cos(np.outer(numbers - place, frequencies)) @ transform * width / np.pi


def variation(places: Sequence[float], rho: float) -> float:
    """Return the total variation between the two sides, within 12 standard deviations: beyond are chances of 1e-32."""
    (first, chances), middle = of_sum(places, rho), sum(places)
    far = len(places) + 12 * math.sqrt(len(places)) * rho
    low, high = max(0, math.floor(middle - far) - first), math.ceil(middle + far) - first + 1
    law = first + low, chances[low:high]
    return float(np.abs(law[1] - of_theorem(middle, len(places), rho, law)).sum() / 2)


def bound(sites: int, rho: float) -> float:
    """Return the τ(K, ρ) of the theorem."""
    u = math.exp(-((math.pi * rho) ** 2))
    spread = math.expm1(sites * (math.log1p(u) - math.log1p(-u)))
    numbers = sites + 1 + 2 * math.sqrt(2 * sites) * math.pi * rho**2
    return numbers / (2 * math.sqrt(2 * math.pi * sites) * rho) * spread + u


SEEN = 1e-12
"""What float64 shows of two laws that are equal."""


@cache
def worst_places(sites: int, rho: float) -> list[float]:
    """Return places at which the two sides differ most: a coarse search, then one site after another."""
    draw = np.random.default_rng(sites)
    starts = [[0.0] * sites, [0.5] * sites, [i % 2 / 2 for i in range(sites)], [i / sites for i in range(sites)]]
    starts += draw.uniform(size=(6, sites)).tolist()
    if sites <= 3:
        starts += [list(places) for places in itertools.product((0, 0.25, 0.5, 0.75), repeat=sites)]
    worst = max(starts, key=lambda places: variation(places, rho))
    for i in range(sites):
        options = [[*worst[:i], place, *worst[i + 1 :]] for place in np.linspace(0, 1, 9)]
        worst = max(options, key=lambda places: variation(places, rho))
    return worst


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 16.0])
@pytest.mark.parametrize("place", [0.0, 0.5, -7.3])
def test_for_one_site_both_sides_are_one_law(place: float, rho: float) -> None:
    assert variation([place], rho) < SEEN


@pytest.mark.parametrize("sites", range(2, 9))
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_a_sum_of_rounded_numbers_is_a_rounded_gaussian_within_the_bound(sites: int, rho: float) -> None:
    found = variation(worst_places(sites, rho), rho)
    assert found <= bound(sites, rho) + SEEN
    # No looser than is due: the rarest of the terms that are left out has this exponent.
    least = math.exp(-2 * (math.pi * rho) ** 2 * (1 - 1 / sites))
    assert found > least / 10 or least < 10 * SEEN


@pytest.mark.parametrize("sites", [2, 5, 8])
@pytest.mark.parametrize("rho", [4.0, 16.0])
def test_on_a_finer_grid_no_difference_is_seen(sites: int, rho: float) -> None:
    for places in ([0.5] * sites, np.random.default_rng(1).uniform(-3, 3, sites).tolist()):
        assert variation(places, rho) < SEEN


@pytest.mark.parametrize("sites", [2, 8])
def test_without_enough_noise_there_is_no_such_theorem(sites: int) -> None:
    assert variation(worst_places(sites, 0.25), 0.25) > 0.01, "the comparison sees nothing"


@pytest.mark.parametrize(
    "fault", [lambda k, rho: (k - 1, rho), lambda k, rho: (k, 0.99 * rho), lambda k, rho: (1, rho)]
)
def test_another_gaussian_than_that_of_the_theorem_is_found(fault: Callable[[int, float], tuple[int, float]]) -> None:
    law = of_sum([0.2] * 4, 4.0)
    sites, rho = fault(4, 4.0)
    assert np.abs(law[1] - of_theorem(0.8, sites, rho, law)).sum() / 2 > 1e-3


def test_the_bound_on_the_grid_that_is_used_is_nil() -> None:
    ratios = [std / grid.noise_grid(std) for std in (1e-9, 0.3, 1.0, 1.999999, 2.0, 7e8)]
    assert all(1024 <= rho < 2048 for rho in ratios)
    for sites, rho in itertools.product((2, 20, 1000), ratios):
        u = -((math.pi * rho) ** 2) / math.log(10)  # its decimal logarithm
        numbers = sites + 1 + 2 * math.sqrt(2 * sites) * math.pi * rho**2
        # Where K u is below 1/4, ((1 + u)/(1 - u))^K - 1 is at most 4 K u.
        tau = u + math.log10(numbers / (2 * math.sqrt(2 * math.pi * sites) * rho) * 4 * sites + 1)
        # A million rounds of a thousand million numbers, at an ε of 20.
        assert tau + math.log10(1e6 * 1e9 * (1 + math.exp(20))) < -4_000_000


# --- what it costs ----------------------------------------------------------------------------------------------------


def delta(absent: Law, present: Law, rate: float, eps: float) -> float:
    """Return the larger δ at ε, of the two directions, of a mixture of two laws against the one without the record."""
    first = min(absent[0], present[0])
    last = max(law[0] + len(law[1]) for law in (absent, present))
    out, in_it = (np.pad(c, (f - first, last - f - len(c))) for f, c in (absent, present))
    mixed = (1 - rate) * out + rate * in_it
    return max(float(np.maximum(a - math.exp(eps) * b, 0).sum()) for a, b in ((mixed, out), (out, mixed)))


def gaussian_delta(noise: float, rate: float, eps: float) -> float:
    """Return the same of a Poisson-sampled Gaussian with this noise over the record's length, in closed form."""

    def beyond(least: float) -> float:
        """Return where the ratio of the mixture to the noise passes ``least``, for a record of length 1/noise."""
        return noise * math.log((least - 1 + rate) / rate) + 1 / (2 * noise)

    place = beyond(math.exp(eps))
    above = (1 - rate) * ndtr(-place) + rate * ndtr(1 / noise - place) - math.exp(eps) * ndtr(-place)
    if math.exp(-eps) <= 1 - rate:
        return float(above)
    place = beyond(math.exp(-eps))
    return float(max(above, ndtr(place) - math.exp(eps) * ((1 - rate) * ndtr(place) + rate * ndtr(place - 1 / noise))))


def excess(sites: int, rho: float, length: float, rate: float, priced: float) -> float:
    """Return by how much the sum's δ passes a Gaussian's with ``priced`` noise, at the worst of some ε and places.

    Args:
        sites: of the sum; all draw noise.
        rho: of each.
        length: of the record that one site has or lacks, in steps.
        rate: of the sampling.
        priced: standard deviation that is paid for, in steps.
    """
    worst = -math.inf
    for places in (worst_places(sites, rho), [0.3 * i for i in range(sites)]):
        absent, present = of_sum(places, rho), of_sum([places[0] + length, *places[1:]], rho)
        for eps in (0.1, 0.5, 1.0, 2.0, 4.0):
            slack = (1 + math.exp(eps)) * bound(sites, rho)
            due = gaussian_delta(priced / length, rate, eps)
            worst = max(worst, delta(absent, present, rate, eps) - due - slack)
    return worst


@pytest.mark.parametrize("sites", range(1, 9))
@pytest.mark.parametrize("rate", [0.05, 0.33, 1.0])
def test_no_sum_costs_more_than_its_gaussian(sites: int, rate: float) -> None:
    for rho in (2.0, 3.3):
        for length in (0.5, 1.0, math.sqrt(sites) * rho / 2, math.sqrt(sites) * rho):
            assert excess(sites, rho, length, rate, math.sqrt(sites) * rho) <= SEEN


@pytest.mark.parametrize("sites", [2, 4, 8])
def test_a_sum_that_lacks_one_sites_noise_costs_more_than_is_priced(sites: int) -> None:
    """The planted fault: the price counts on one site more than draws noise."""
    assert excess(sites, 3.3, math.sqrt(sites) * 3.3, 0.33, math.sqrt(sites + 1) * 3.3) > 1e-4


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("sites", [2, 5])
def test_the_pld_of_a_sum_is_at_most_that_of_the_gaussian(sites: int, steps: int) -> None:
    """Composed by dp-accounting, from the two laws number by number."""
    rho, noise = 4.0, 3.0
    length = math.sqrt(sites) * rho / noise

    def composed(places: Sequence[float], lost: float) -> float:
        laws = [of_sum([places[0] + by, *places[1:]], lost * rho) for by in (0.0, length)]
        logs = [{first + i: math.log(c) for i, c in enumerate(law) if c > 0} for first, law in laws]
        one = pld.from_two_probability_mass_functions(*logs, value_discretization_interval=1e-4)
        return float(one.self_compose(steps).get_epsilon_for_delta(1e-5))

    priced = epsilon([gaussian_release(noise, 1.0, steps)], 1e-5)
    found = max(composed([0.5] * sites, 1.0), composed([0.3 * i for i in range(sites)], 1.0))
    # Both are rounded against us, on grids of 1e-4 and 1e-3 a step.
    assert found <= priced + 1e-4 * steps
    assert composed([0.5] * sites, 0.9) > priced + 1e-2 * math.sqrt(steps), "less noise went unnoticed"


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4])
def test_a_record_that_moves_two_coordinates_costs_what_its_length_says(angle: float) -> None:
    """The rounded law has no symmetry of rotation; the Gaussian behind it has."""
    sites, rho, length = 3, 2.0, 4.0
    moves = (length * math.cos(angle), length * math.sin(angle))
    laws = [[of_sum([0.25 + by, 0.5, 0.0], rho) for by in (0.0, move)] for move in moves]
    flat = []
    for side in (0, 1):
        padded = []
        for pair in laws:
            first, last = min(f for f, _ in pair), max(f + len(c) for f, c in pair)
            padded.append(np.pad(pair[side][1], (pair[side][0] - first, last - pair[side][0] - len(pair[side][1]))))
        flat.append((0, np.outer(*padded).ravel()))
    for eps in (0.1, 1.0, 3.0):
        due = gaussian_delta(math.sqrt(sites) * rho / length, 0.33, eps)
        assert delta(*flat, 0.33, eps) <= due + 2 * (1 + math.exp(eps)) * bound(sites, rho)


# --- the sampler that is built ----------------------------------------------------------------------------------------


def chi_square(sites: int, share: float, place: float, gaussian: Callable[[int], int], count: int = 200_000) -> float:
    """Return how far, in standard deviations, sums of real draws are off the theorem's law, on a coarse grid."""
    import torch

    step = grid.noise_grid(share)
    rho = share / step
    sums = torch.full((count,), place * step, dtype=torch.float64)
    drawn = (total([rounded(sums, share) for _ in range(sites)], share) / step).numpy().astype(int)
    law = of_sum([place] * sites, rho)
    chances = of_theorem(sites * place, gaussian(sites), rho, law)
    found = np.bincount(drawn - law[0], minlength=len(chances))
    often = count * chances > 10
    expected = count * chances[often]
    return float((((found[often] - expected) ** 2 / expected).sum() - often.sum()) / math.sqrt(2 * often.sum()))


@pytest.mark.parametrize("bits", [0, 1, 3])
@pytest.mark.parametrize("sites", [2, 5])
def test_sums_of_real_draws_have_the_law_of_the_theorem(sites: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "GRID_BITS", bits)
    for share, place in ((1.7, 0.31), (1.0, 0.5)):
        if bits or share > 1:
            assert abs(chi_square(sites, share, place, lambda k: k)) < 7
    assert chi_square(sites, 1.7, 0.31, lambda k: k + 1) > 50, "the law of one site more went unnoticed"


# --- an attacker's view of the masked sum -----------------------------------------------------------------------------


def told_by_a_sum(noise: float, lost: float, draw: Callable[[int], float] = lambda site: 1.0) -> float:
    """Return by how much an attacker beats what ``noise`` is priced at, in standard errors; trials are coordinates.

    Three sites send masked vectors; one of them has a record of one clip in every coordinate, or lacks it.

    Args:
        noise: noise multiplier that two of the three make up.
        lost: factor on each site's noise that nobody is told of.
        draw: factor on the noise of one site, by its number.
    """
    import torch

    trials, share = 200_000, noise_share(noise, 1.0, 2)

    def sums(record: float) -> np.ndarray:
        identities = {f"site-{i}": Identity.new() for i in range(3)}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        attempt = AttemptName("run", 1, 0, roster.digest)
        sites = [SiteAttempt(attempt, name, identity) for name, identity in identities.items()]
        terms = Terms(noise, 1.0, 1.0, 1, honest_sites=2, colluders=1)
        sent = []
        for number, site in enumerate(sites):
            site.agree([other.offer for other in sites], roster, terms, Task("", "", "", b"", b""))
            held = torch.full((trials,), 0.3 * number + (record if not number else 0.0))
            # The third site colludes: it draws nothing, and tells.
            own = rounded(held, share, lost * draw(number)) if number < 2 else rounded(held, share, 1e-9)
            sent.append(site.masked(own))
        return total(sent, share).numpy() - 0.9

    absent, present = sums(0.0), sums(1.0)
    worst = -math.inf
    for eps in (0.2, 0.5, 1.0):
        for least in (0.0, 0.5, 1.0, 2.0):
            hit, false = (present > least).mean(), (absent > least).mean()
            error = math.sqrt((hit * (1 - hit) + math.exp(2 * eps) * false * (1 - false)) / trials)
            worst = max(worst, (hit - math.exp(eps) * false - gaussian_delta(noise, 1.0, eps)) / error)
    return float(worst)


def test_an_attacker_who_holds_a_site_learns_no_more_of_a_sum_than_is_priced() -> None:
    assert told_by_a_sum(1.5, 1.0) < 5


@pytest.mark.parametrize(
    ("lost", "draw"),
    [(0.5, lambda site: 1.0), (1.0, lambda site: float(site > 0) or 1e-9), (2**-0.5, lambda site: 1.0)],
    ids=["noise halved", "one honest site draws none", "noise for a site too many"],
)
def test_noise_that_is_missing_from_a_sum_is_found_by_the_attacker(lost: float, draw: Callable[[int], float]) -> None:
    assert told_by_a_sum(1.5, lost, draw) > 10

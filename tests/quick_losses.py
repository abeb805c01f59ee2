"""The library's losses of Gaussians, of whole arrays where it takes points one by one.

A PLD has thousands of points, for each of which dp-accounting calls Python several times. ``test_quick_losses`` holds
these functions to the library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from dp_accounting.pld import common
from dp_accounting.pld.privacy_loss_mechanism import AdditiveNoisePrivacyLoss as Additive
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from dp_accounting.pld.privacy_loss_mechanism import MixtureGaussianPrivacyLoss as Mixture

ADD, REMOVE = AdjacencyType.ADD, AdjacencyType.REMOVE


def deltas(own: Any, epsilon: Any) -> Any:
    """Stand in for ``GaussianPrivacyLoss.get_delta_for_epsilon``, and leave to it what is at the edge of a sample."""
    points, sampled, added = np.asarray(epsilon), own.sampling_prob < 1.0, own.adjacency_type == ADD
    if points.ndim != 1 or own.adjacency_type not in {ADD, REMOVE}:
        return Additive.get_delta_for_epsilon(own, epsilon)
    found, inside, losses = np.zeros_like(points, dtype=float), np.full(points.shape, fill_value=True), points
    if sampled:
        least = math.log1p(-own.sampling_prob)
        inside = points < -least if added else points > least
        if not added:
            found[~inside] = -np.expm1(points[~inside])
        losses = -points[inside] if added else points[inside]
        edge = math.log(1 - own.sampling_prob)
        if (losses <= edge * (1 - 1e-8)).any():
            return Additive.get_delta_for_epsilon(own, epsilon)
        times, more = 1 / own.sampling_prob, 1 - 1 / own.sampling_prob
        high = losses + np.log(times)
        losses = np.where(losses == 0, np.log(times + more), high + np.log1p(-np.exp(np.log(-more) - high)))
        losses = -losses if added else losses
    name = "add" if added else "remove"
    ends = getattr(own, f"_inverse_privacy_loss_without_subsampling_{name}")(losses)
    found[inside] = own.mu_upper_cdf(ends) - np.exp(points[inside] + own.mu_lower_log_cdf(ends))
    return np.clip(found, 0, 1)


def ends(own: Any, losses: np.ndarray, bounds: tuple[float, float], precision: float = 1e-6) -> Any:
    """Stand in for the bisection of ``MixtureGaussianPrivacyLoss``: all losses go down one level at a time."""
    low, high = (np.full(len(losses), float(bound)) for bound in bounds)
    constants, sign = own._precompute_privacy_loss_constants, 1.0 if own.adjacency_type == ADD else -1.0
    while (wide := high - low > precision).any():
        middle = (low + high) / 2
        places, back = np.unique(middle, return_inverse=True)
        parts = own.sensitivities * places[:, None] / own._variance
        split = -sign * np.logaddexp.reduce(constants + sign * parts, axis=1)[back]
        lower = losses < split
        low, high = np.where(wide & lower, middle, low), np.where(wide & ~lower, middle, high)
    return np.floor(high / precision) * precision


def bounds(masses: Any, times: int, tail_mass_truncation: float = 0, orders: Any = None) -> tuple[int, int]:
    """Stand in for ``compute_self_convolve_bounds``, and leave to it what rounding might decide."""
    if tail_mass_truncation == 0 or orders is not None:
        return OWN[common, "compute_self_convolve_bounds"](masses, times, tail_mass_truncation, orders)  # type: ignore[no-any-return]
    held, size = np.asarray(masses), len(masses)
    order = np.arange(1, 21) / size
    found = []
    with np.errstate(all="ignore"):
        for sign in (-1, 1):
            base, powers = np.exp(sign * np.arange(size) / size), np.ones(size)
            sums = [float(held @ np.multiply(powers, base, out=powers)) for _ in order]
            logs = times * np.log(sums) / (sign * order)
            least = logs + math.log(2 / tail_mass_truncation) / (sign * order)
            known = np.isfinite(least)
            if (np.abs(least - np.round(least)) <= 1e-9 + 1e-12 * np.abs(logs))[known].any():
                return OWN[common, "compute_self_convolve_bounds"](masses, times, tail_mass_truncation)  # type: ignore[no-any-return]
            found.append(least[known])
    lower = max((math.floor(bound) for bound in found[0]), default=0)
    upper = min((math.ceil(bound) for bound in found[1]), default=(size - 1) * times)
    return max(0, lower), min((size - 1) * times, upper)


QUICK: dict[tuple[Any, str], Callable[..., Any]] = {
    (GaussianPrivacyLoss, "get_delta_for_epsilon"): deltas,
    (Mixture, "_inverse_privacy_losses_with_range"): ends,
    (common, "compute_self_convolve_bounds"): bounds,
}
"""Each in the place of the library's own."""
OWN = {(kind, name): getattr(kind, name) for kind, name in QUICK}

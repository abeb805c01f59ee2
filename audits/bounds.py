"""Lower bounds on epsilon from guesses at who was in the data, with what they assume."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

THRESHOLD = 0.5
"""Where a score, 1 on average for a record that was in and 0 for one that was not, becomes the guess "in". Fixed
before any score is seen."""
CONFIDENCE = 0.99
GUESSED = 0.25
"""Share of the canaries, those with the most extreme scores, on which the assumption-free bound guesses."""


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon at ``delta`` of telling N(0, 1) from N(mu, 1) (Balle and Wang 2018, theorem 8)."""
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - delta

    return float(brentq(excess, 0.0, 500.0)) if excess(0.0) > 0 else 0.0


def gaussian_bound(scores: np.ndarray, present: np.ndarray, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon that holds if all scores carry independent Gaussian noise of one size.

    That is what the code claims of its noise, so this tests the code; it is no bound for any mechanism whatever.
    Clopper-Pearson bounds of both error rates at ``THRESHOLD`` give a bound on the distance of the two
    Gaussians, and that one on epsilon.

    Args:
        scores: shape (canaries,).
        present: bool, shape (canaries,): which records were in.
        delta: the delta of the answer.
        confidence: that both error rates lie below their bounds.
    """
    guessed_in = scores > THRESHOLD
    false_positive = _upper(int((guessed_in & ~present).sum()), int((~present).sum()), confidence)
    false_negative = _upper(int((~guessed_in & present).sum()), int(present.sum()), confidence)
    return gaussian_epsilon(float(norm.ppf(1 - false_positive) - norm.ppf(false_negative)), delta)


def free_bound(scores: np.ndarray, present: np.ndarray, delta: float) -> float:
    """Return a lower bound on epsilon that holds for any mechanism, from one run (Steinke et al. 2023, theorem 5.2).

    Arguments as of ``gaussian_bound``. It comes to about half of the truth, so it rarely finds a fault.
    """
    guesses = int(GUESSED * len(scores))
    sure = np.argsort(-np.abs(scores - THRESHOLD))[:guesses]
    right = int(((scores[sure] > THRESHOLD) == present[sure]).sum())

    def doubt(epsilon: float) -> float:
        """Return how likely so many right guesses are, at most, under (epsilon, delta)."""
        chance = 1 / (1 + np.exp(-epsilon))
        lucky = binom.sf(right - 1, guesses, chance)
        short = np.arange(1, right + 1)
        nearly = np.cumsum(binom.pmf(right - short, guesses, chance)) / short
        return float(lucky + 2 * len(scores) * delta * nearly.max(initial=0.0)) - (1 - CONFIDENCE)

    return float(brentq(doubt, 0.0, 50.0)) if doubt(0.0) < 0 else 0.0


def _upper(errors: int, tries: int, confidence: float) -> float:
    """Return the Clopper-Pearson upper bound of an error rate; two of them hold together at ``confidence``."""
    return 1.0 if errors >= tries else float(beta.ppf(1 - (1 - confidence) / 2, errors + 1, tries - errors))

"""The one place that holds sampling, clip, noise and budget: the mechanism and the accountant read the same fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.check import clip_norm, in_range, positive
from common.config.sections import PrivacyConfig, TrainingConfig
from common.errors import ConfigError, PrivacyError
from common.privacy.accounting import Release, check_terms, noise_multiplier_for


@dataclass(frozen=True)
class PrivacyPlan:
    """What one site does to its records in a run: public, fixed before a record reaches the model.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    clip_norm: float
    """L2 bound of one record's gradient over all trained tensors together."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum of clipped gradients, over ``clip_norm``."""
    sample_rate: float
    """Probability of each record to be in a step's batch (Poisson)."""
    expected_batch_size: float
    """Divisor of the noised sum, in records. A constant made of public figures (``sample_rate`` times the
    declared size), never the realised batch and never the exact number of records."""
    delta: float
    max_epsilon: float
    """Budget of the data set: record level, add/remove one record."""

    def __post_init__(self) -> None:
        clip_norm(clip_norm=self.clip_norm)
        positive(
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
            max_epsilon=self.max_epsilon,
        )
        in_range(0, 1, sample_rate=self.sample_rate)
        in_range(0, 0.5, delta=self.delta)

    @classmethod
    def for_run(
        cls,
        privacy: PrivacyConfig,
        training: TrainingConfig,
        total_steps: int,
        public_size: int,
        before: Sequence[Release] = (),
    ) -> PrivacyPlan:
        """Return the plan of a site that may take part in every one of the run's ``total_steps``.

        A noise multiplier of 0 in the configuration asks for the least one that keeps all ``total_steps``
        within the budget, on a data set that has spent nothing but ``before`` (releases that the run itself
        makes ahead of its first step, such as an initialisation); any other is used as it is, even if the
        budget then ends before the run does (the ledger stops it). ``public_size`` is the number of
        records that the site declares, not the one that it counts.

        Raises:
            ConfigError: privacy is off, or a figure is out of range, or none that an honest job has (``check_terms``).
            PrivacyError: delta is above one over the declared size, so that publishing a whole record
                at random would satisfy it.
        """
        if not privacy.on:
            raise ConfigError("privacy.mode is 'none': there is nothing to plan; set it to 'dp-sgd' for a private run")
        positive(total_steps=total_steps, public_size=public_size)
        if privacy.delta > 1 / public_size:
            raise PrivacyError(
                f"privacy.delta is {privacy.delta:g}, above 1/{public_size} = {1 / public_size:.3g} of the declared "
                f"size {public_size}: set privacy.delta to {1 / public_size:.1g} or less"
            )
        steps = Release(privacy.noise_multiplier or 1.0, training.sample_rate, total_steps)
        check_terms([steps, *before], privacy.delta)
        return cls(
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier
            or noise_multiplier_for(privacy.epsilon, privacy.delta, training.sample_rate, total_steps, tuple(before)),
            sample_rate=training.sample_rate,
            expected_batch_size=training.sample_rate * public_size,
            delta=privacy.delta,
            max_epsilon=privacy.epsilon,
        )

    @property
    def gradient_noise_std(self) -> float:
        """Standard deviation of the noise on one coordinate of the averaged gradient."""
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size

    def release(self, steps: int) -> Release:
        """Return what the ledger must be charged before ``steps`` (>= 1) optimiser steps."""
        return Release(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, count=steps)

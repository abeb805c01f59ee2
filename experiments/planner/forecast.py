"""The forecast of a run, in one object: privacy, traffic, time, memory, signal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import chosen_factors
from fedveil.common.messages.state import HEAD
from fedveil.common.model.device import worker_count
from fedveil.experiments.planner.ahead import warnings_of_plans
from fedveil.experiments.planner.calibration import Calibration, calibrate, feature_seconds, round_seconds
from fedveil.experiments.planner.payers import payer_of
from fedveil.experiments.planner.price import (
    LEAST_SIGNAL,
    MOST_ROUNDS,
    PricedRound,
    SignalToNoise,
    ThrownAway,
    priced_rounds,
    round_numbers,
    rounds_within,
    signal_to_noise,
    site_plans,
    thrown_away,
)
from fedveil.experiments.planner.traffic import Traffic, payload_by_strategy, traffic
from fedveil.privacy.accounting import Release, alone
from fedveil.privacy.plan import PrivacyPlan, rounding_margin
from fedveil.privacy.privacy_filter import FRESH, History, price_after
from fedveil.server.model import ServerModel
from fedveil.strategies.job import Job


@dataclass(frozen=True)
class Forecast:
    """What ``fedveil plan`` says. The parts about privacy are empty or None where nothing is charged."""

    job: Job
    sizes: tuple[int, ...]
    """Public sizes, one per site."""
    plans: list[PrivacyPlan]
    rounds_within: int | None
    """Rounds that the budget lasts at this noise."""
    thrown_away: list[ThrownAway]
    """What attempts at a sum cost that bring none."""
    traffic: Traffic
    payloads: dict[str, tuple[int, int]]
    """Bytes down and up of one site and round, by strategy."""
    workers: int
    calibration: Calibration | None
    """None when nothing was measured."""
    signal: SignalToNoise | None
    history: History = FRESH
    """What earlier runs have spent of the records."""
    names: Sequence[str] = ()
    """Of the sites; empty: the usual ones."""

    @property
    def site_names(self) -> Sequence[str]:
        """A name for each site."""
        return self.names or [f"site-{k}" for k in range(len(self.sizes))]

    @cached_property
    def rounds(self) -> list[PricedRound]:
        """What a site has spent after each round that is priced; as ``priced``."""
        return self.priced(round_numbers(self.job))

    def priced(self, numbers: Sequence[int]) -> list[PricedRound]:
        """Return what a site has spent after these rounds.

        Noise, rate and budget are the run's: they do not depend on a site's size, so one account serves all.
        """
        return [one for plan in self.plans[:1] for one in priced_rounds(self.job, plan, self.history, numbers)]

    @property
    def spent(self) -> float:
        """ε of earlier runs, at the run's δ; 0 without one."""
        return price_after(self.history, (), min(self.job.config.privacy.delta, self.history.delta))[0]

    @property
    def epsilon_alone(self) -> float | None:
        """What the run costs a site if no other one adds its noise to a sum; None where none is counted on."""
        if self.job.config.privacy.honest_sites < 2:
            return None
        plan = self.plans[0]
        own = alone([plan.release(self.job.config.total_steps)])
        return price_after(self.history.changed(alone), own, plan.delta)[0]

    @property
    def more_honest(self) -> dict[int, float]:
        """What the run costs if more sites of each sum are honest than are counted on: all but the colluders, and all.

        By their number, if all of the forecast's sites are in each sum; empty where no noise is shared.
        """
        if not self.job.config.privacy.honest_sites:
            return {}
        plan, privacy, sites = self.plans[0], self.job.config.privacy, len(self.sizes)
        release = plan.release(self.job.config.total_steps)

        def with_so_many(honest: int) -> float:
            def change(releases: Iterable[Release]) -> list[Release]:
                return [dataclasses.replace(one, event=one.event.of_honest(honest)) for one in releases]

            return price_after(self.history.changed(change), change([release]), plan.delta)[0]

        return {
            honest: with_so_many(honest)
            for honest in sorted({sites - privacy.colluders, sites})
            if honest > privacy.honest_sites
        }

    @property
    def noises(self) -> list[float | None]:
        """Each site's noise multiplier; None where nothing is charged, or a trusted server adds it."""
        return payer_of(self.job).noises(self.plans, len(self.sizes))

    @property
    def expected_batches(self) -> list[float]:
        """Records that a step of each site has on average."""
        return [self.job.config.training.sample_rate * size for size in self.sizes]

    @property
    def round_seconds(self) -> tuple[float, float] | None:
        """The mean round simulated on this machine, and with a machine like it for each site."""
        if self.calibration is None:
            return None
        config = self.job.config
        scored = math.ceil(config.rounds / config.evaluate_every) / config.rounds  # the last round always is
        return round_seconds(self.calibration, config.training.local_steps, self.expected_batches, self.workers, scored)

    @property
    def feature_seconds(self) -> tuple[float, float] | None:
        """Of what is computed of all records ahead of their steps: features, or derivatives as often as it takes.

        Here, and with a machine like this for each site.
        """
        if self.calibration is None:
            return None
        return feature_seconds(self.calibration, self.job.config.timeline, self.sizes, self.workers)

    @property
    def noise_of_shares(self) -> float:
        """How many times the noise of the average is what it would be by size alone; 1 where no site adds its own."""
        return payer_of(self.job).noise_of_shares(self.job, self.sizes, self.plans)

    @property
    def warnings(self) -> list[str]:
        """What a person should know before starting, in plain words."""
        found = warnings_of_plans(self.job, self.sizes, self.plans, self.rounds_within)
        if self.signal and self.signal.too_low:
            found.append(
                "this job will hardly train: over the whole run the noise outweighs what the records say "
                f"(signal-to-noise below {LEAST_SIGNAL:g}); take more records or sites, more ε, fewer trained numbers "
                "(another strategy, a smaller rank), or another start"
            )
        if self.job.claim.per and self.job.unit.grouped and self.calibration is not None:
            found.append(
                f"times and signal are of persons with one record each: with up to "
                f"{self.job.config.privacy.records_per_person}, a step takes up to that many times as long"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as plain values."""
        config, seconds, features = self.job.config, self.round_seconds, self.feature_seconds
        down, up = self.traffic.run(len(self.sizes))
        return {
            "settings": self.job.settings(),
            "private": bool(self.job.claim.per),
            "sites": [
                {
                    "site": self.site_names[k],
                    "public_size": size,
                    "sample_rate": config.training.sample_rate,
                    "expected_batch": self.expected_batches[k],
                    "steps": config.total_steps,
                    "noise_multiplier": self.noises[k],
                }
                for k, size in enumerate(self.sizes)
            ],
            "rounds": [{**dataclasses.asdict(one), "accountant": str(one.accountant)} for one in self.rounds],
            "epsilon_alone": self.epsilon_alone,
            "epsilon_of_more_honest_sites": {str(sites): spent for sites, spent in self.more_honest.items()},
            "thrown_away": [dataclasses.asdict(one) for one in self.thrown_away],
            "epsilon_of_earlier_runs": self.spent,
            "rounds_within_budget": self.rounds_within,
            "rounds_within_budget_searched_to": MOST_ROUNDS,
            "bytes_per_site_and_round": dataclasses.asdict(self.traffic),
            "bytes_down_total": down,
            "bytes_up_total": up,
            "payload_per_site_and_round": {name: list(pair) for name, pair in self.payloads.items()},
            "workers": self.workers,
            "calibration": dataclasses.asdict(self.calibration) if self.calibration else None,
            "round_seconds_simulated": seconds[0] if seconds else None,
            "round_seconds_deployed": seconds[1] if seconds else None,
            "feature_seconds_simulated": features[0] if features else None,
            "feature_seconds_deployed": features[1] if features else None,
            "signal_to_noise": self.signal.as_json() if self.signal else None,
            "warnings": self.warnings,
        }


def forecast(
    job: Job, sizes: Sequence[int], *, workers: int = 0, calibrated: bool = True, history: History = FRESH
) -> Forecast:
    """Return what a run of ``job`` over sites of these public sizes will cost.

    Args:
        job, sizes, history: the run, its sites' public sizes, and the spending of earlier runs.
        workers: processes that train at once on this machine; 0: as many as ``fedveil run`` takes.
        calibrated: take a few steps on public test records, for time, memory and alignment.

    Raises:
        PrivacyError: delta does not fit a size, or the budget cannot pay for a step.
        DataError, ModelError: the public data or the model cannot be loaded.
        ConfigError: the run has no rounds.
    """
    if not job.config.rounds:
        raise ConfigError("rounds is 0, a vote alone: set rounds to 1 to plan it, and read the line 'initialisation'")
    plans = site_plans(job, sizes, history)
    server_model = ServerModel(job, scores=calibrated)
    workers = worker_count(len(sizes), workers, keeps=job.config.timeline.computes_ahead)
    calibration = calibrate(server_model, job.config, workers) if calibrated else None
    started = chosen_factors(server_model.trained_start(), job.trained_columns(job.start(server_model.start)))
    still = {HEAD} if job.config.timeline.with_inputs("jacobians") else set[str]()
    trained = sum(t.numel() for layer, factors in started.items() if layer not in still for t in factors.values())
    return Forecast(
        job=job,
        sizes=tuple(sizes),
        plans=plans,
        rounds_within=next((rounds_within(job, plan, history) for plan in plans[:1]), None),
        thrown_away=[one for plan in plans[:1] for one in thrown_away(job, plan, history)],
        traffic=traffic(job, server_model, plans),
        payloads=payload_by_strategy(server_model),
        workers=workers,
        calibration=calibration,
        signal=_signal(job, sizes, plans, trained, calibration, rounding_margin(server_model.model.device)),
        history=history,
    )


def _signal(
    job: Job,
    sizes: Sequence[int],
    plans: Sequence[PrivacyPlan],
    trained: int,
    calibration: Calibration | None,
    margin: float,
) -> SignalToNoise | None:
    """Return the run's signal-to-noise; of a trusted server, of updates as long as the clip; None without noise."""
    if not job.claim.per:
        return None
    payer = payer_of(job)
    if (noise := payer.bare_signal(trained, plans)) is not None:
        return SignalToNoise(trained, job.config.rounds, noise, None)
    alignment = calibration.alignment if calibration else None
    return signal_to_noise(
        plans, payer.weights(job, sizes), job.config.total_steps, trained, margin=margin, alignment=alignment
    )

"""The configuration of a run: what all its sections hold, its phases and its learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

from fedveil.common.check import NOT_NEGATIVE, POSITIVE, Interval, OneOf, PlainNames, plain_names
from fedveil.common.config.fields import OPEN, RATIO, Section, Unit
from fedveil.common.config.phases import ADAPTER, HEAD, Phase, Schedule, parse_phases
from fedveil.common.config.sections import (
    NO_ADAPTER,
    PRECISIONS,
    SCHEDULES,
    AdapterConfig,
    DataConfig,
    HeadConfig,
    ModelConfig,
    PrivacyConfig,
    ServerConfig,
    TrainingConfig,
)
from fedveil.common.config.wire import WireConfig
from fedveil.common.errors import ConfigError
from fedveil.common.trackers import NO_TRACKER, TRACKERS

MOST_SITES = 1000
"""That a run may name."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything that defines a run; ``None`` where a value is open (``strategies.resolve`` fills it in).

    Of a resolved run four figures have no one value: ``device``, ``precision`` and ``batch-tokens`` are each machine's,
    a noise multiplier and a largest norm of 0 each site's. An alpha of 0 is measured at the server before round 1.
    Which layers ``adapter.targets = "auto"`` names, the base model says.
    """

    recipe: str = OPEN
    """Settings that go together: a file of ``strategies/recipes``. Open: the one that suits the run. It fills
    in what is left open. A strategy, or a setting of adapter, head, training or server, that is written out says that
    the method is your own, also where its value is the one that it has by default."""
    strategy: str = "fedavg-lora"
    """The rule of aggregation: a row of ``strategies.STRATEGIES``, whose options are set under its name. One that is
    written out has its own adapter, unless ``adapter.name`` or ``recipe`` says otherwise."""
    rounds: Annotated[
        int, Interval(0, 100_000, low_too=True, why="all of which a site examines before it pays"), Unit("rounds")
    ] = 6
    """The length of the run."""
    phases: str = ""
    """What the rounds train, in their order: such as ``12 head on features, 20 adapter on jacobians, 5 head on
    features``, whose rounds add up to ``rounds``. ``adapter+head on examples`` (``adapter on examples`` where
    ``head.policy`` is frozen) trains the model as it is. ``head on features`` trains the head alone, on features that
    each record has once (``client.head_alone``). ``adapter on jacobians`` trains the model to first order around where
    the phase began, by one pass over all records and then steps that cost next to nothing; ``every 10`` makes that pass
    again after ten rounds (``client.linearised``). Each phase has the whole ``schedule``. Empty: one phase of all
    rounds, which trains all that is trained."""
    seed: Annotated[int, RATIO] = 1
    """Public seed of the adapter's and the head's start and of non-private batch order."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``. Each machine finds its own."""
    precision: Annotated[str, OneOf(PRECISIONS)] = "auto"
    """Of the forward pass: ``auto`` (bfloat16 where the device is fast at it), ``float32``, ``bfloat16``."""
    output: str = "runs"
    """Folder that run folders are made in; relative to where the program was started."""
    named_sites: Annotated[str, PlainNames(MOST_SITES)] = ""
    """The sites that the run is for, by their registered names; others get no task. A list, or commas between them;
    ``fedveil server submit`` takes groups of the server's ``groups.toml`` too. Empty: all sites."""
    project: Annotated[str, PlainNames(1)] = ""
    """Whose run it is, in one name, by the server's word. Policies may let in certain projects alone (``projects``)."""
    tracker: Annotated[str, OneOf((NO_TRACKER, *TRACKERS))] = NO_TRACKER
    """The server's experiment tracker, which gets the figures of the run's folder."""
    min_sites: Annotated[int, POSITIVE, Unit("sites")] = 1
    """Replies that a round needs to count. With ``client-level`` every round counts that begins, and so many sites must
    be connected for that."""
    round_timeout: Annotated[float, POSITIVE, Unit("seconds")] = 3600.0
    """How long an attempt at a round waits for sites, and then for their replies."""
    round_retries: Annotated[int, NOT_NEGATIVE, Unit("attempts")] = 1
    """How often a round is tried again when fewer than ``min-sites`` sites succeeded. Then the run stops."""
    evaluate_every: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """From one scoring of the global model to the next. The last round is always scored."""
    max_update_norm: Annotated[float, NOT_NEGATIVE, Unit("L2 norm")] = 0.0
    """The largest change of a site to what it received. 0: what the run's own settings make plausible."""
    max_size_ratio: Annotated[float, POSITIVE, RATIO] = 100.0
    """Largest public size that a site may declare, over the median of the round's (three sites or more)."""
    max_share: Annotated[float, Interval(0, 1), RATIO] = 0.5
    """Largest part of a round's average that one of three sites or more may be, whatever size it declares; of two sites
    ``(1 + max-share) / 2``."""
    shorten_updates: bool = True
    """Whether an update that is much longer than the round's others is scaled down. ``false``, without privacy alone,
    averages updates as they are sent; with ``max-share = 1.0`` that is the plain average by public sizes."""
    resume: str = ""
    """Id or folder of a run to go on with after its last complete round. Empty: a new run."""
    schedule: Annotated[str, OneOf(SCHEDULES)] = "linear"
    """Course of the learning rate over the run. ``slanted`` rises in the first tenth of more than ten steps, and
    falls from there on as ``linear`` does. The server's optimiser follows it if there is one, else the sites' do;
    beside a server's optimiser the sites' rate is constant."""
    head_rate: Annotated[float, POSITIVE, RATIO] = OPEN
    """The head's learning rate over that of the other tensors, applied once, by whichever optimiser follows
    ``schedule``. Open: 4 in a private run, else 5."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    wire: WireConfig = field(default_factory=WireConfig)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of a site that joins every round."""
        return self.rounds * self.training.local_steps

    @property
    def method(self) -> str:
        """What a run trains, in one name, as its folder and its card have it."""
        return method_of(self.strategy, self.adapter.name)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites that the run names; empty: it is for all."""
        return plain_names(self.named_sites)

    @property
    def timeline(self) -> Schedule:
        """The run's phases."""
        return _schedule(
            self.phases, self.rounds, adapter=self.adapter.name != NO_ADAPTER, head=self.head.policy == "trained"
        )

    def site_rate(self, round_number: int, step: int) -> float:
        """Return a site's learning rate of a round's step (from 0 on)."""
        training = self.training
        course = self.schedule if self.moved_at_sites else "constant"
        return self.timeline.rate(course, training.learning_rate, round_number, step, training.local_steps)

    def server_rate(self, round_number: int) -> float:
        """Return the learning rate of the server's optimiser after a round."""
        return self.timeline.rate(self.schedule, self.server.learning_rate, round_number)

    @property
    def moved_at_sites(self) -> bool:
        """Whether the sites' optimiser moves the model by ``schedule`` and ``head-rate``; else the server's does."""
        return self.server.optimizer == "none"

    @property
    def site_head_rate(self) -> float:
        """The head's learning rate at a site over that of the other tensors."""
        return self.head_rate if self.moved_at_sites else 1.0


@lru_cache(maxsize=256)
def _schedule(phases: str, rounds: int, *, adapter: bool, head: bool) -> Schedule:
    """Return the phases that settings ask for; one of all rounds where none are listed."""
    if not phases:
        if not adapter:
            return Schedule((Phase(rounds, (HEAD,), "features"),))
        return Schedule((Phase(rounds, (ADAPTER, HEAD) if head else (ADAPTER,)),))
    schedule = Schedule(parse_phases(phases))
    if schedule.rounds != rounds:
        raise ConfigError(
            f"phases has {schedule.rounds} rounds, and rounds is {rounds}: set rounds to {schedule.rounds}"
        )
    return schedule


HEAD_ONLY = "head-only"
"""The method of a run without an adapter."""


def method_of(strategy: str, adapter: str) -> str:
    """Return the strategy's name, or ``head-only`` where there is no adapter for it to average.

    >>> method_of("ffa-lora", "lora-frozen-a"), method_of("fedavg-lora", "none")
    ('ffa-lora', 'head-only')
    """
    return HEAD_ONLY if adapter == NO_ADAPTER else strategy

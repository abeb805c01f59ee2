"""The needs of a run's phases: of its strategy, of its adapter and of its other settings."""

from __future__ import annotations

from fedveil.common.adapters import Adapter
from fedveil.common.config.phases import Schedule
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.tasks import TASKS
from fedveil.strategies.base import Strategy, chooses


def check_phases(config: RunConfig, strategy: Strategy, adapter: type[Adapter]) -> None:
    """Raise ConfigError, saying what to do, if a run cannot have its phases.

    Args:
        config: the run's.
        strategy: the run's.
        adapter: the run's, which ``config`` may still call ``auto``.
    """
    if not config.phases:
        return
    schedule = config.timeline
    _check_trained(config, schedule, adapter)
    if not (schedule.with_inputs("features") or schedule.with_inputs("jacobians")):
        return
    if not TASKS[config.model.task].labelled:
        raise ConfigError(
            f"phases has features or jacobians, which are for labels, and model.task {config.model.task!r} has none: "
            "leave phases empty"
        )
    if chooses(type(strategy)):
        raise ConfigError(
            f"strategy {strategy.name!r} chooses what is trained in a round by a rule of its own, which steps on "
            "features and jacobians have not: leave phases empty"
        )
    if schedule.with_inputs("jacobians"):
        _check_jacobians(config, schedule, strategy)


def _check_trained(config: RunConfig, schedule: Schedule, adapter: type[Adapter]) -> None:
    """Check that there is what the phases train, and that they train what there is."""
    if not adapter.trained and schedule.has_adapter:
        raise ConfigError(
            f"phases trains an adapter, and adapter.name {adapter.name!r} trains the head alone: leave phases empty"
        )
    if adapter.trained and not schedule.has_adapter:
        raise ConfigError("phases never trains the adapter: add a phase that does, or set adapter.name to 'none'")
    trained = config.head.policy == "trained"
    if not trained and any("head" in phase.trains for phase in schedule.phases):
        raise ConfigError(
            f"phases trains the head, and head.policy {config.head.policy!r} sends none: set head.policy to 'trained', "
            "or let phases train the adapter alone"
        )
    if trained and any(phase.trains == ("adapter",) for phase in schedule.with_inputs("examples")):
        raise ConfigError(
            "phases has 'adapter on examples', and head.policy is 'trained': write 'adapter+head on examples', or set "
            "head.policy to 'frozen'"
        )


def _check_jacobians(config: RunConfig, schedule: Schedule, strategy: Strategy) -> None:
    if strategy.facts.moves_frozen and any((p.every or p.rounds) > 1 for p in schedule.with_inputs("jacobians")):
        raise ConfigError(
            f"strategy {strategy.name!r} turns frozen factors between rounds, and jacobians are of those of one round: "
            "write 'every 1' behind them in phases"
        )
    if config.training.weight_decay:
        raise ConfigError(
            "training.weight-decay would draw an adapter that is trained on jacobians to where each process began, and "
            "not to 0: set it to 0, or change phases"
        )

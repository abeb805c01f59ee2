"""Requirements of a run: its strategy, adapter, initialisation, rule and settings need things of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.config.flat import to_mapping
from fedveil.common.config.phases import Schedule
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import NO_ADAPTER
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import METRIC
from fedveil.common.requirements import Requirement, Value, check_requirements
from fedveil.common.starts import Start, check_directions
from fedveil.common.tasks import TASKS, Task
from fedveil.common.tasks.base import unfolds
from fedveil.common.trackers import NO_TRACKER
from fedveil.common.words import counted
from fedveil.strategies.average import Average
from fedveil.strategies.base import Strategy, check_adapter, chooses
from fedveil.strategies.rules import ServerRule

_PACKED = (
    "packing puts several records into one sequence, so that they share a gradient and no clip bounds what one of them "
    "changes; every record is a sequence of its own here, and those of like length are batched together"
)
REFUSED: Mapping[str, str] = dict.fromkeys(("packing", "neat-packing", "sample-packing"), _PACKED)
"""Last part of a setting's name in TRL, LLaMA-Factory or axolotl, and why no run here can have it."""

REFUSED_STRATEGIES: Mapping[str, str] = {
    "fedsa-lora": "FedSA-LoRA leaves B at each site, where training without noise lets one record move it and with it "
    "the gradient of every other record in A, so that no clip bounds what a record changes; and it ends in a model for "
    "each site, where a run here ends in one: freeze one factor for all ('ffa-lora', or 'fedavg-lora' with "
    "adapter.name 'lora-frozen-b'), or train them in turn ('rolora')",
}
"""Published strategies that are no row, and why a run cannot have them."""

OF_SETTINGS: Mapping[str, tuple[Callable[[Value], bool], tuple[Requirement, ...]]] = {
    "adapter.name": (
        lambda name: name == NO_ADAPTER,
        (
            Requirement("head.policy", "trained", "nothing else is trained"),
            Requirement("model.checkpointing", False, "no gradient passes the layers"),
        ),
    ),
    "head.metric": (
        lambda metric: metric == "public",
        (Requirement("head.policy", "trained", "the head begins elsewhere behind the metric"),),
    ),
    "server.most-noise": (
        bool,
        (
            Requirement("server.optimizer", "momentum", "it bounds what plain steps pass on"),
            Requirement("training.optimizer", "sgd", "it bounds what plain steps pass on"),
            Requirement("training.weight-decay", 0.0, "it bounds what plain steps pass on"),
        ),
    ),
    "tracker": (
        lambda tracker: tracker != NO_TRACKER,
        (Requirement("privacy.site-rate", 1.0, "a tracker notes when rounds ended, which may show who was drawn"),),
    ),
}
"""Settings that require others at some of their values: which values, and what they require."""


def check_run(config: RunConfig, strategy: Strategy, origin: Start, rule: ServerRule, task: Task) -> None:
    """Raise ConfigError, saying what to do, unless rows and settings of a run fit together.

    Args:
        config: the run's, with nothing open.
        strategy: the run's.
        origin: the initialisation of the run's adapter.
        rule: the rule around the server's optimiser.
        task: the run's.
    """
    settings, mechanism, adapter = to_mapping(config), config.privacy.mechanism, ADAPTERS[config.adapter.name]
    task.check(config)
    mechanism.check_row()
    if mechanism.unit.grouped and not config.data.person:
        raise ConfigError(
            f"privacy.unit is {mechanism.unit.name!r}, and data.person names no column: name the one that says whose a "
            "record is, or set privacy.unit to 'record'"
        )
    check_requirements("privacy.mode", mechanism.requirements, settings)
    check_requirements("strategy", strategy.facts.requires, settings)
    check_requirements("server.rule", rule.requires, settings)
    for key, (applies, requirements) in OF_SETTINGS.items():
        check_requirements(key, requirements if applies(settings[key]) else (), settings)
    mechanism.check(config)
    strategy.check(config)
    check_adapter(type(strategy), adapter)
    check_directions(origin, adapter)
    origin.check(config, adapter)
    if not config.rounds and not origin.votes:
        raise ConfigError("rounds is 0, and nothing is asked of the sites: only a start by their votes has no rounds")
    if config.head.metric == "public" and METRIC not in origin.gives:
        raise ConfigError(
            f"head.metric is 'public', which adapter.start {origin.name!r} does not make: set adapter.start to "
            "'public-metric', or head.metric to 'none'"
        )
    check_phases(config, strategy, adapter)
    _check_unfolding(config, origin, task)
    if 0 < len(config.site_names) < config.min_sites:
        named = counted(len(config.site_names), "site")
        raise ConfigError(f"min-sites is {config.min_sites}, and named-sites names {named}: lower it, or name more")
    _check_wire(config, strategy)


def _check_unfolding(config: RunConfig, origin: Start, task: Task) -> None:
    """Raise ConfigError if records that a task unfolds would be used as they are, on features or by a start."""
    if not unfolds(task):
        return
    if any(phase.inputs != "examples" for phase in config.timeline.phases):
        raise ConfigError(
            f"model.task {task.name!r} makes rows of a record at each step, and features and jacobians are made once: "
            "leave phases empty, and set adapter.name to an adapter"
        )
    if origin.asked == "sites" or origin.opens_weights:
        raise ConfigError(
            f"adapter.start {origin.name!r} takes records as they are, sites' or public ones, and model.task "
            f"{task.name!r} makes rows of them first: choose another start, such as 'orthonormal'"
        )


def _check_wire(config: RunConfig, strategy: Strategy) -> None:
    """Raise ConfigError if the run's strategy combines what a format of messages rounds."""
    if config.wire.precision != "float32" and not isinstance(strategy, Average):
        raise ConfigError(
            f"wire.precision {config.wire.precision!r} rounds a site's change, and strategy {strategy.name!r} combines "
            "what each site trained: set it to 'float32', or choose a strategy that averages, such as 'ffa-lora'"
        )


def check_composed(config: RunConfig, strategy: Strategy, origin: Start, rule: ServerRule, adapter: Adapter) -> None:
    """Raise ConfigError, saying what to do, unless the run's adapter can be made and moved as it asks.

    Args:
        config, strategy, origin, rule: as in ``check_run``.
        adapter: the run's.
    """
    rule.check(config, strategy, adapter)
    if config.model.quantise != "none":
        _check_quantise(config, origin, adapter)
    if not config.adapter.alpha:
        _check_calibration(config, strategy, origin)
    if config.server.rule != "none" and chooses(type(strategy)):
        raise ConfigError(
            f"strategy {strategy.name!r} chooses what is trained in a round, and server.rule {rule.name!r} would move "
            "what rests: set server.rule to 'none'"
        )
    if config.server.most_noise and rule.lengthens:
        raise ConfigError(
            f"server.most-noise bounds what noise does through a plain step, which server.rule {rule.name!r} makes "
            "another: set server.most-noise to 0, or server.rule to 'none'"
        )


def _check_quantise(config: RunConfig, origin: Start, adapter: Adapter) -> None:
    """Raise ConfigError if the start needs a gradient of weights that are held in low bits: sites pay before it."""
    held = f"of the adapted layers' weights, which model.quantise {config.model.quantise!r} holds in low bits"
    if origin.opens_weights and adapter.directions:
        raise ConfigError(
            f"adapter.start {origin.name!r} needs gradients {held}: set adapter.start to one that needs none, such as "
            "'orthonormal', or model.quantise to 'none'"
        )
    if not config.adapter.alpha:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated by gradients {held}: give it a number, or set model.quantise to "
            "'none'"
        )


def _check_calibration(config: RunConfig, strategy: Strategy, origin: Start) -> None:
    """Raise ConfigError unless a factor can be calibrated on public phrases, and stays as long as it was made."""
    if getattr(origin, "step", 0.0) or METRIC in origin.gives:
        does = "has a length of its own" if METRIC in origin.gives else "moves the weights by start.step"
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated, but adapter.start {origin.name!r} {does}: give it a number"
        )
    if strategy.facts.moves_frozen:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated, but {strategy.name!r} gives A another length: give it a number"
        )
    task = TASKS[config.model.task]
    if not task.wording:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated on public phrases, but model.task {task.name!r} holds no words: "
            "give it a number"
        )


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
    if TASKS[config.model.task].by_token and schedule.with_inputs("jacobians"):
        raise ConfigError(
            f"phases has jacobians, which are for one label a record, and model.task {config.model.task!r} has one for "
            "each word: let phases train on examples or features"
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

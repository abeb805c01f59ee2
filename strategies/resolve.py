"""The resolving of settings: what a run's recipe, strategy and mechanism put where people leave a value open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedveil.common.adapters import ALIASES
from fedveil.common.check import OneOf
from fedveil.common.config.flat import Scalar, from_section, prefix_of
from fedveil.common.config.phases import parse_phases, phases_text, rounds_of
from fedveil.common.config.run import RunConfig
from fedveil.common.data.sources import known_labels
from fedveil.common.tasks import TASKS
from fedveil.strategies import ROWS
from fedveil.strategies.options import START, is_open
from fedveil.strategies.recipes import AUTO, RECIPES, Choice, choose, recipe_settings
from fedveil.strategies.rules import RULES

LEARNING_RATES: Mapping[str, Scalar] = {"sgd": 1.0, "momentum": 1.0, "adam": 0.01, "adamw": 0.01}


@dataclass(frozen=True)
class Resolved:
    """A run's settings with nothing left open."""

    config: RunConfig
    settings: Mapping[str, Scalar]
    """Flat, with the options of the run's rows."""
    written: Mapping[str, Scalar]
    """Those that people have written out."""
    choice: Choice


def resolve(values: Mapping[str, Scalar], labels: int = 0, sites: int = 0) -> Resolved:
    """Return the configuration that flat settings give; equal settings give equal configurations.

    >>> resolve({"privacy.mode": "none", "recipe": "plain"}).config.training.optimizer
    'adam'

    Args:
        values: the settings; ``auto`` leaves one open.
        labels: how many labels there are; 0: as many as ``values`` name.
        sites: how many sites the run has; 0: not known.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range.
    """
    written = {key: value for key, value in values.items() if not (is_open(key) and value == AUTO)}
    if isinstance(name := written.get("adapter.name"), str):
        written["adapter.name"] = ALIASES.get(name, name)
    run = config_of(written)
    choice = Choice(run.recipe) if run.recipe else choose(run, written, labels or len(known_labels(run.data)), sites)
    OneOf(RECIPES).check("recipe", choice.recipe)
    required = ROWS[run.strategy].facts.requires if run.strategy in ROWS else ()
    settings: dict[str, Scalar] = {one.key: one.value for one in required}
    settings |= recipe_settings(choice.recipe, run)
    settings |= {one.key: one.value for one in run.privacy.mechanism.requires}
    settings |= {**written, "recipe": choice.recipe}
    pace = run.privacy.mechanism.pace
    settings.setdefault("server.optimizer", pace.server_optimizer)
    alone = settings["server.optimizer"] == "none"
    settings.setdefault("training.optimizer", "adam" if alone else "sgd")
    settings.setdefault("training.learning-rate", LEARNING_RATES[str(settings["training.optimizer"])])
    settings.setdefault("training.local-steps", pace.local_steps)
    settings.setdefault("training.sample-rate", pace.sample_rate)
    settings.setdefault("head-rate", pace.head_rate)
    if text := str(settings.get("phases", "")):
        settings["rounds"] = written.get("rounds") or rounds_of(text) or settings.get("rounds", run.rounds)
        settings["phases"] = phases_text(parse_phases(text, int(settings["rounds"])))
    if run.strategy in ROWS:
        settings.setdefault("adapter.name", ROWS[run.strategy].adapters.default)
    return Resolved(config_of(settings), settings, written, choice)


def config_of(settings: Mapping[str, Scalar]) -> RunConfig:
    """Return the configuration of flat settings, without the options of rows; what is not given has its default."""
    named = settings.get("model.task")
    of_task = prefix_of(TASKS[named]) if isinstance(named, str) and named in TASKS else ""
    options = (START, *(f"{name}." for name in (*ROWS, *RULES)), *([of_task] if of_task else ()))
    return from_section(RunConfig, {key: value for key, value in settings.items() if not key.startswith(options)}, "")

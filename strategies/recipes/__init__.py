"""Recipes: files of settings that were found together, each a TOML file that ``-c`` takes, and the choice among them.

A recipe fills in what people leave open. ``NAME+CONDITION.toml`` is laid over ``NAME.toml`` in runs of which the
condition holds. A new recipe is one file and its name in ``RECIPES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedveil.common.config.flat import Scalar, task_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import read_settings_file
from fedveil.common.tasks import TASKS
from fedveil.common.words import counted

RECIPES = ("metric", "head-only", "long-steps", "open", "plain")
AUTO = "auto"
"""How people write that a setting is left open."""
CONDITIONS: Mapping[str, Callable[[RunConfig], bool]] = {
    "unlabelled": lambda run: not TASKS[run.model.task].labelled,
    "images": lambda run: not TASKS[run.model.task].wording,
    "images-paid": lambda run: not TASKS[run.model.task].wording and "paid release" in run.privacy.mechanism.starts,
    "unclipped": lambda run: not (run.privacy.mechanism.charged or run.privacy.mechanism.central),
    "templated": lambda run: bool(run.data.columns["template"]),
    "several": lambda run: TASKS[run.model.task].scored.several,
    "private": lambda run: run.privacy.mechanism.claims,
}
"""What a recipe may differ by, in the order in which its files are laid over each other."""
METHOD = ("strategy", "adapter.name", "adapter.start")
"""Settings that name a method: whoever writes one out has none chosen."""
DECIDED = ("adapter.", "head.", "server.", "training.", "start.", "schedule", "head-rate", "phases")
"""What a recipe decides as a whole: whoever writes one of these out has a method of their own."""
FREE = (
    *("adapter.rank", "adapter.targets", "head.phrases", "training.batch-tokens"),
    *("start.text", "start.text-sha256", "start.records"),
)
"""Among them what may be set beside a recipe."""
STEPS = ("server.", "training.optimizer", "training.learning-rate", "training.weight-decay")
"""What ``long-steps`` decides as a whole, or what has no say beside it."""
LONG_STEPS = {"strategy": ("ffa-lora", "fed-svd"), "adapter.name": ("lora-frozen-a",)}
"""What may be named beside ``long-steps``, which freezes A: where A is trained beside B, the noise of one is multiplied
by the other's, and steps as long as these lead astray."""
MOST_LABELS = 3
"""Of ``metric``: every label costs a pass over the records more, and memory for as many derivatives."""
LEAST_EPSILON, TRIED_SITES, TRIED_RECORDS = 1.0, 4, 7500
"""The smallest budget at which ``metric`` was tried and was not below the head alone, and the sites and records it was
tried with, each site with noise of its own."""
FEWEST_ROUNDS = {"metric": 10, "open": 24}
"""Rounds below which a recipe's rates would not carry it far."""


@dataclass(frozen=True)
class Choice:
    """The recipe that a run has, and why."""

    recipe: str
    reason: str = ""
    """Public facts, as the end of a sentence; empty: the run names its recipe."""
    instead: str = ""
    """The recipe that runs of this kind have otherwise; empty: this one."""
    written: bool = False
    """Whether one setting that is written out keeps ``instead`` from being chosen."""
    by_figures: bool = False
    """Whether the numbers of labels, records and sites decide."""

    @property
    def note(self) -> str:
        """One line on the choice for the people who wrote the settings; empty: they made it themselves."""
        if not self.reason:
            return ""
        keep = f": write recipe = {self.instead!r} to keep that" if self.written else ""
        if self.recipe == "head-only":
            trains = "Training the classification head only, no LoRA adapter"
            return f"{trains} (recipe {self.recipe!r}): {self.reason}{keep}"
        rather = f", not {self.instead!r}" if self.instead else ""
        return f"Settings left open follow recipe {self.recipe!r}{rather}: {self.reason}{keep}"


def choose(run: RunConfig, written: Mapping[str, Scalar], labels: int = 0, sites: int = 0) -> Choice:
    """Return the recipe of a run that names none, and why.

    Args:
        run: its settings; what is open has its default.
        written: the settings that are written out, with the task's options.
        labels: how many there are; 0: not known.
        sites: how many sites the run has; 0: not known.
    """
    labelled, claims = TASKS[run.model.task].labelled, run.privacy.mechanism.claims
    usual = "long-steps" if not labelled else "metric" if claims else "open"
    if key := next((key for key in METHOD if key in written and not _fits_beside(run, key, usual)), ""):
        return Choice("plain", f"{key} is {_value(run, key)!r}")
    if reason := _unfit(run, task_of(written).too_long, usual):
        return Choice("plain", reason, usual)
    if key := _decided(run, written, usual):
        return Choice("plain", f"{key} is set", usual, written=True)
    reason = _limit(run, written, labels, sites, usual)
    figures = usual == "metric" and bool(TASKS[run.model.task].wording)
    if not reason:
        kind = f"{labels} labels" if figures else f"model.task {run.model.task!r}"
        return Choice(usual, f"it suits {kind} and privacy.mode {run.privacy.mode!r}", by_figures=figures)
    alone = usual == "metric" and not {"adapter.rank", "adapter.targets"} & set(written)
    return Choice("head-only" if alone else "plain", reason, usual, by_figures=figures)


def _fits_beside(run: RunConfig, key: str, usual: str) -> bool:
    return usual == "long-steps" and _value(run, key) in LONG_STEPS.get(key, (_value(run, key),))


def _value(run: RunConfig, key: str) -> Scalar:
    section, _, name = key.rpartition(".")
    value: Scalar = getattr(getattr(run, section) if section else run, name)
    return value


def _unfit(run: RunConfig, too_long: str, usual: str) -> str:
    """Return the setting that rules the usual recipe out whatever else is set; empty: none."""
    mechanism, task = run.privacy.mechanism, TASKS[run.model.task]
    promises = mechanism.claims and not mechanism.central and "public records" in mechanism.starts
    if not promises and usual != "open":
        return f"privacy.mode is {run.privacy.mode!r}"
    if task.labelled and (run.model.quantise != "none" or run.model.checkpointing):
        return "model.quantise or model.checkpointing is set"
    return f"model.task is {run.model.task!r}, and {too_long}" if usual == "long-steps" and too_long else ""


def _decided(run: RunConfig, written: Mapping[str, Scalar], usual: str) -> str:
    """Return a written setting that the usual recipe decides as a whole, or an empty text."""
    if usual == "long-steps":
        return min((key for key in written if key.startswith(STEPS)), default="")
    own = {key for key in written if is_method(key)}
    if not TASKS[run.model.task].wording and run.head.start == "zeros":
        own.discard("head.start")  # of images there is no other but a random one
    return min(own, default="")


def _limit(run: RunConfig, written: Mapping[str, Scalar], labels: int, sites: int, usual: str) -> str:
    """Return which public figure is beyond what the usual recipe was tried at; empty: none is."""
    who = "the LoRA recipe ('metric')" if usual == "metric" else repr(usual)
    if usual == "long-steps":
        return ""
    if not TASKS[run.model.task].wording:
        return f"{f'{who} starts from words, and ' * (usual == 'metric')}model.task is {run.model.task!r}"
    if usual == "metric" and TASKS[run.model.task].scored.several:
        return f"records have several labels, and {who} is for one"
    if usual == "metric" and TASKS[run.model.task].by_token:
        return f"{who} takes one label a record, and model.task is {run.model.task!r}"
    if usual == "metric" and not labels:
        return "nothing here says how many labels there are: name a file that can be read, or data.labels"
    if usual == "metric" and labels > MOST_LABELS:
        return f"there are {labels} labels, and {who} handles up to {MOST_LABELS}"
    if usual == "metric" and run.privacy.epsilon < least_epsilon(run, sites) and not run.privacy.noise_multiplier:
        records, number = _records(run), _sites(run, sites)
        of = ([counted(records, "record")] if records else []) + (
            [counted(number, "site")] if number != TRIED_SITES else []
        )
        by = f"privacy.epsilon = {run.privacy.epsilon:g}{''.join(f' and {one}' for one in of)}"
        # A larger budget would do as well, which is nobody's advice.
        return f"with {by} the noise costs {who} more than it gains: more records would help"
    few = "rounds" in written and run.rounds < FEWEST_ROUNDS[usual]
    return f"rounds is {run.rounds}, and {who} needs {FEWEST_ROUNDS[usual]} or more" if few else ""


def least_epsilon(run: RunConfig, sites: int) -> float:
    """Return the budget from which on the mean has no more noise than ``metric`` was tried with.

    At one ε the noise of the mean over N records of K sites is as √K / N, and in a sum, of which h are honest, as
    √(K / h) / N.
    """
    least = LEAST_EPSILON * TRIED_RECORDS / (_records(run) or TRIED_RECORDS)
    return least * math.sqrt(_sites(run, sites) / ((run.privacy.honest_sites or 1) * TRIED_SITES))


def _records(run: RunConfig) -> int:
    """Return about how many records share the noise; 0: no setting says it, or the unit is another."""
    return run.data.records if run.privacy.unit == "record" else 0


def _sites(run: RunConfig, sites: int) -> int:
    """Return about how many sites share the noise: those that a sum must have, or as many as were tried at least."""
    privacy = run.privacy
    if privacy.honest_sites:
        return privacy.honest_sites + privacy.colluders + privacy.drop_outs
    return sites or max(TRIED_SITES, run.min_sites)


def is_method(key: str) -> bool:
    """Return whether a setting says, by being written out, that people have a method of their own."""
    return key in METHOD or (key.startswith(DECIDED) and key not in FREE)


def recipe_settings(name: str, run: RunConfig) -> dict[str, Scalar]:
    """Return what a recipe sets in a run, flat."""
    layers = [name, *(f"{name}+{condition}" for condition, holds in CONDITIONS.items() if holds(run))]
    return {key: value for layer in layers for key, value in _file(layer).items()}


@cache
def _file(name: str) -> Mapping[str, Scalar]:
    path = Path(__file__).with_name(f"{name}.toml")
    return read_settings_file(path) if path.is_file() else {}


@cache
def filled_keys() -> frozenset[str]:
    """Return the keys that some recipe fills in."""
    return frozenset(key for path in Path(__file__).parent.glob("*.toml") for key in _file(path.stem))

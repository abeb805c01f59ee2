"""The runs that suit the recipes for training with labels: those whose people have no method of their own."""

from __future__ import annotations

from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked

STRATEGY = "strategy"
"""Whoever writes one out, be it the mean by which these recipes train, wants it with its own adapter."""
DECIDED = ("adapter.", "head.", "server.", "training.", "start.", "schedule", "head-rate", "phases")
"""What they decide as a whole: whoever sets one of these has a method of their own."""
FREE = (
    *("adapter.rank", "adapter.targets", "head.phrases", "head.margin", "training.batch-tokens"),
    *("start.text", "start.text-sha256", "start.records"),
)
"""Among them what may be set beside them."""
METHODS = ("adapter.name", "adapter.start")
"""Settings that say by themselves that another method is wanted."""


def is_method(key: str) -> bool:
    """Return whether a setting says, by being written out, that these recipes are not wanted."""
    return key == STRATEGY or (key.startswith(DECIDED) and key not in FREE)


def own_method(asked: Asked, *, claims: bool = True) -> str:
    """Return what in a run's settings is not for a recipe of a run with labels, in words; empty: nothing.

    Args:
        asked: the run.
        claims: whether the recipe is for runs that promise something, or for those that promise nothing.
    """
    run = asked.settings
    mechanism, task = run.privacy.mechanism, TASKS.get(run.model.task)
    if STRATEGY in asked.given:
        return f"strategy is {run.strategy!r}"
    if named := next((key for key in METHODS if key in asked.given), ""):
        return f"{named} is set"
    promises = mechanism.claims and not mechanism.central and "public records" in mechanism.starts
    if not (promises if claims else not mechanism.claims):
        return f"privacy.mode is {run.privacy.mode!r}"
    if task is None or not task.labelled:
        return f"model.task is {run.model.task!r}"
    if run.model.quantise != "none" or run.model.checkpointing:
        return "model.quantise or model.checkpointing is set"
    own = sorted(filter(is_method, asked.given))
    if not task.wording and run.head.start == "zeros":
        own = [key for key in own if key != "head.start"]  # there is no other but a random one
    return f"{own[0]} is set" if own else ""


def set_aside(reason: str) -> bool:
    """Return whether a reason of ``own_method`` is one setting of a recipe's own, whose writer may not want another."""
    key = reason.removesuffix(" is set")
    return key != reason and key.startswith(DECIDED) and key not in METHODS


def names_method(reason: str) -> bool:
    """Return whether a reason of ``own_method`` is that another method was asked for by its name."""
    return reason.startswith("strategy is ") or reason.removesuffix(" is set") in METHODS

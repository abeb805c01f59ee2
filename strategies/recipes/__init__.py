"""Recipes, one per file; ``RECIPES`` is the table of them, and ``auto`` is the first that suits a run.

A recipe is a set of settings that were found together. It fills in what people leave open, so whoever sets a value has
it. A new one is one file and one row.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.common.check import OneOf
from fedveil.common.config.asked import RunSettings
from fedveil.common.config.sections import ModelConfig, PrivacyConfig, Scalar
from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked, Recipe
from fedveil.strategies.recipes.head_only import HeadOnly
from fedveil.strategies.recipes.long_steps import LongSteps
from fedveil.strategies.recipes.metric import PublicMetricRecipe
from fedveil.strategies.recipes.open import Open
from fedveil.strategies.recipes.plain import Plain
from fedveil.strategies.recipes.whole import is_method, names_method, own_method, set_aside

_ROWS: tuple[Recipe, ...] = (PublicMetricRecipe(), HeadOnly(), LongSteps(), Open(), Plain())
RECIPES = {recipe.name: recipe for recipe in _ROWS}
AUTO = "auto"
"""What ``recipe`` calls the first row that suits the run, and a setting that the recipe fills in."""

_IMAGES = ModelConfig(task="image-classification")
_RUNS = (
    RunSettings(),
    RunSettings(privacy=PrivacyConfig(mode="secure-sum")),
    RunSettings(privacy=PrivacyConfig(mode="none")),
    RunSettings(model=ModelConfig(task="causal-lm")),
    RunSettings(model=_IMAGES),
    RunSettings(model=_IMAGES, privacy=PrivacyConfig(mode="secure-sum")),
)
FILLED = tuple(dict.fromkeys(key for row in RECIPES.values() for run in _RUNS for key in row.settings(Asked(run))))
"""Keys of the settings that some recipe fills in."""

OPEN_AT_ZERO = ("head-rate", "training.local-steps", "training.sample-rate", "training.learning-rate")
"""Those of which 0 says that they are left open."""


def is_open(key: str) -> bool:
    """Return whether a setting is ``auto`` by default: a recipe fills it in, or is chosen by whether it is written out.

    Flower lays what is written over a table of all defaults, in which a default that is a value looks as if written.
    """
    return key in FILLED or is_method(key)


def choose(named: str, asked: Asked) -> tuple[Recipe, str]:
    """Return the recipe of a run, and why ``auto`` is not the first row for such runs unless another method was named.

    Raises:
        ConfigError: no recipe is called ``named``.
    """
    OneOf((AUTO, *RECIPES)).check("recipe", named)
    if named != AUTO:
        return RECIPES[named], ""
    chosen = next(row for row in RECIPES.values() if not row.unfit(asked))
    claims, task = asked.settings.privacy.mechanism.claims, TASKS.get(asked.settings.model.task)
    labelled = task is None or task.labelled
    first = next((row for row in RECIPES.values() if (row.claims, row.labelled) == (claims, labelled)), chosen)
    reason = first.unfit(asked)
    why = own_method(asked, claims=claims) if labelled else reason
    if not reason or names_method(why):
        return chosen, ""
    keep = f": write recipe = {first.name!r} to keep that" if set_aside(why) else ""
    if chosen.trains:
        return chosen, f"Training {chosen.trains} (recipe {chosen.name!r}): {reason}{keep}"
    return chosen, f"recipe is {chosen.name!r} and not {first.name!r}, because {reason}{keep}"


def without_open(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings without those that are left to the recipe."""
    return {
        key: value
        for key, value in settings.items()
        if not (is_open(key) and (value == AUTO or (key in OPEN_AT_ZERO and value == 0)))
    }


__all__ = ["AUTO", "FILLED", "RECIPES", "Asked", "Recipe", "choose", "is_open", "own_method", "without_open"]

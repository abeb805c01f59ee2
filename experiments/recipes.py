"""The recipes of runs that are compared: said before the first of them, and one for all that name none."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.strategies.recipes import AUTO


def names_recipe(settings: Mapping[str, Scalar]) -> bool:
    """Return whether settings, as people write them, say which recipe fills in what they leave open."""
    return settings.get("recipe", AUTO) != AUTO


def check_recipes(recipes: Mapping[str, str], named: Collection[str]) -> None:
    """Raise ConfigError if two rows of a comparison get different recipes that neither of them names.

    They would differ in optimisers, rates, rounds and adapter as well. ``named`` are the rows that name theirs.
    """
    first, *others = [row for row in recipes if row not in named] or [""]
    for other in others:
        if recipes[other] != recipes[first]:
            raise ConfigError(
                f"{first!r} gets the recipe {recipes[first]!r} and {other!r} gets {recipes[other]!r}, so they differ "
                f"in more than they name: write recipe = {recipes[other]!r} for both, or each one's own"
            )


def recipes_said(recipes: Mapping[str, str]) -> str:
    """Return which rows each recipe fills in, in one line.

    >>> recipes_said({"a": "plain", "b": "plain", "c": "metric"})
    'recipes: plain (a, b); metric (c)'
    """
    rows = {recipe: [row for row in recipes if recipes[row] == recipe] for recipe in recipes.values()}
    return "recipes: " + "; ".join(f"{recipe} ({', '.join(names)})" for recipe, names in rows.items())

"""The settings that exist: every run's, the options of the core's rows, and those of each row of ``contrib`` it names.

Flower takes no setting that ``pyproject.toml`` does not list, and it lists none of ``contrib``. So these travel to
Flower in one text, the setting ``options``, and ``fedveil`` packs them there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from fedveil.common.adapters import ADAPTERS
from fedveil.common.check import OneOf, Rule
from fedveil.common.config.flat import Scalar, defaults, prefix_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.text import flatten, toml_value
from fedveil.common.errors import ConfigError
from fedveil.common.rows import Table
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, roles_of_all
from fedveil.common.tasks.roles import Role
from fedveil.common.toml import toml_of
from fedveil.strategies import CONTROLS, ROWS, STRATEGIES
from fedveil.strategies.recipes import AUTO, RECIPES, filled_keys, is_method
from fedveil.strategies.rules import RULES

START = "start."
"""What the options of a start begin with."""
OPTIONS = "options"
"""The setting that holds those of rows of ``contrib``, as the inside of an inline table of TOML."""
_TABLES: Mapping[str, tuple[Table[Any], ...]] = {
    "adapter.start": (STARTS,),
    "strategy": (STRATEGIES, CONTROLS),
    "server.rule": (RULES,),
}
"""The tables of rows that have options, by the setting that names a row; tasks may have some too."""
OF_ANOTHER = "it is an option of {owner!r}, which the run has not: set {naming} to {owner!r}, or leave it out"
EMPTY: Mapping[str, Scalar] = {}


def tables() -> dict[str, Rule]:
    """Return what the settings may be that name a row of a table, by their keys."""
    return {
        "recipe": OneOf(RECIPES),
        "strategy": OneOf(tuple(ROWS)),
        "adapter.name": OneOf(tuple(ADAPTERS)),
        "adapter.start": OneOf(tuple(STARTS)),
        "server.rule": OneOf(tuple(RULES)),
    }


def known_settings(values: Mapping[str, Scalar] = EMPTY) -> dict[str, Scalar]:
    """Return every setting that a run may have with its default, ``options`` included.

    What is left open is ``auto``.

    Args:
        values: the run's settings, flat; options of a row of ``contrib`` exist if they name it.
    """
    known = {key: AUTO if is_open(key) else value for key, value in declared_settings(values).items()}
    return {**known, OPTIONS: ""}


def is_open(key: str) -> bool:
    """Return whether a setting is ``auto`` by default: a run fills it in, or depends on whether it is written.

    Flower lays what is written over a table of all defaults, in which a default that is a value looks as if written.
    """
    return key == "recipe" or key in filled_keys() or is_method(key)


def declared_settings(values: Mapping[str, Scalar] = EMPTY) -> dict[str, Scalar]:
    """Return every setting with the default that its field declares; ``values`` as above."""
    return dict(_declared(tuple(rows_with_options(values)), roles_of_all()))


def rows_with_options(values: Mapping[str, Scalar] = EMPTY) -> Iterator[tuple[str, type[Any]]]:
    """Yield what the options of a row begin with, and the row: all of the core, then what ``values`` name beside it.

    Of tasks it is the one that ``values`` name, wherever it is, if it has options.
    """
    for key, rows in _TABLES.items():
        for table in rows:
            for name, row in table.core.items():
                yield _prefix(key, name), row
    for key, rows in _TABLES.items():
        named = values.get(key)
        for table in rows:
            if isinstance(named, str) and named in table and named not in table.core:
                yield _prefix(key, named), table[named]
    kind = values.get("model.task")
    if isinstance(kind, str) and kind in TASKS and prefix_of(TASKS[kind]):
        yield prefix_of(TASKS[kind]), type(TASKS[kind])


# Every job asks for them several times; the tables may get rows meanwhile.
@lru_cache(maxsize=64)
def _declared(rows: tuple[tuple[str, type[Any]], ...], roles: tuple[Role, ...]) -> Mapping[str, Scalar]:
    del roles  # of which defaults have the columns
    known = defaults(RunConfig)
    for prefix, row in rows:
        known.update({prefix + key: value for key, value in defaults(row).items()})
    return known


def _prefix(key: str, name: str) -> str:
    return START if key == "adapter.start" else f"{name}."


def unnamed(key: str, values: Mapping[str, Scalar]) -> str:
    """Return why a setting is unknown: it is an option of a row of ``contrib`` that a run does not name; else empty."""
    owner = key.partition(".")[0]
    for naming, rows in _TABLES.items():
        beside = naming != "adapter.start" and any(owner in table and owner not in table.core for table in rows)
        if beside and values.get(naming) != owner:
            return OF_ANOTHER.format(owner=owner, naming=naming)
    of_tasks = (task.name for task in TASKS.values() if prefix_of(task) == f"{owner}.")
    if (name := next(of_tasks, "")) and values.get("model.task") != name:
        return OF_ANOTHER.format(owner=name, naming="model.task")
    return ""


def with_options(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings with those that the text ``options`` holds beside the others.

    >>> with_options({"strategy": "switchlora", "options": "switchlora.window = 8"})
    {'strategy': 'switchlora', 'switchlora.window': 8}

    Raises:
        ConfigError: it is no such text, or holds a setting that belongs beside it.
    """
    others, text = {key: value for key, value in values.items() if key != OPTIONS}, values.get(OPTIONS, "")
    try:
        table = toml_of(f"{OPTIONS} = {{{text}}}") if isinstance(text, str) else {}
    except tomllib.TOMLDecodeError:
        table = {}
    if set(table) != {OPTIONS}:
        raise ConfigError(f"{OPTIONS} must be a text such as 'start.centred = true', not {text!r}")
    held = flatten(table[OPTIONS])
    if wrong := sorted(held.keys() & (known_settings().keys() | others.keys())):
        raise ConfigError(f"{OPTIONS} holds {wrong[0]}, which is a setting beside it: take it out of the text")
    return {**others, **held}


def for_flower(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings as Flower takes them: what ``pyproject.toml`` does not list is in the text ``options``.

    >>> for_flower({"strategy": "switchlora", "switchlora.window": 8})
    {'strategy': 'switchlora', 'options': 'switchlora.window = 8'}
    """
    spread, listed = with_options(values), known_settings()
    text = ", ".join(f"{key} = {toml_value(value)}" for key, value in spread.items() if key not in listed)
    return {key: value for key, value in spread.items() if key in listed} | ({OPTIONS: text} if text else {})

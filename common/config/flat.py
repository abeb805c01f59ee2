"""Settings in their flat form: dotted keys in kebab-case, as Flower passes them (``"adapter.rank"``).

Fields are the same words in snake_case. A key that no field answers to, or a value of another type, is an error that
names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

from fedveil.common.check import OneOf, nearest
from fedveil.common.config.fields import kebab, kinds_of
from fedveil.common.errors import ConfigError
from fedveil.common.tasks import TASKS, Task, roles_of_all
from fedveil.common.tasks.roles import Role

Scalar = str | int | float | bool
S = TypeVar("S")


class Columns(Mapping[str, str]):
    """The column of every role that some task has, by the role's setting; each is a key of its section.

    >>> Columns({"text": "note"})["text"]
    'note'
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._named = dict(named)

    def __getitem__(self, setting: str) -> str:
        return self._named[setting]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __hash__(self) -> int:
        return hash(frozenset(self._named.items()))

    def __repr__(self) -> str:
        return f"Columns({self._named})"


def columns_of_jobs() -> Columns:
    """Return the columns that roles have by default."""
    return Columns({role.setting: role.column for role in roles_of_all()})


def defaults(section: type[Any], prefix: str = "") -> dict[str, Scalar]:
    """Return every key of a dataclass of settings with its default, flat and in kebab-case.

    >>> from fedveil.common.config.sections import AdapterConfig
    >>> defaults(AdapterConfig, "adapter.")["adapter.rank"]
    8
    """
    return {prefix + key: value for key, value in _defaults(section, roles_of_all(), tuple(TASKS)).items()}  # type: ignore[arg-type]


# Every job asks for the defaults of all rows, several times.
@lru_cache(maxsize=1024)
def _defaults(section: type[Any], roles: tuple[Role, ...], tasks: tuple[str, ...]) -> Mapping[str, Scalar]:
    del roles, tasks  # of which defaults have the columns, and a policy's the options
    return to_mapping(section())


def from_section(section: type[S], values: Mapping[str, Scalar], prefix: str) -> S:
    """Build one dataclass of settings from the keys that start with ``prefix``; keys left out keep their defaults.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), a value has the wrong type
            or is out of range.
    """
    known = {prefix + key: value for key, value in defaults(section).items()}
    for key in values:
        if key.startswith(prefix) and key not in known:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}")
    return _build(section, values, prefix)


def _build(section: type[S], values: Mapping[str, Scalar], prefix: str) -> S:
    kinds = kinds_of(section)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        key, kind = _key(item, prefix), kinds[item.name]
        if kind is Columns:
            keys = {name: prefix + name for name in cast(Any, item.default_factory)()}
            named = {setting: typed(key, values[key], str) for setting, key in keys.items() if key in values}
            arguments[item.name] = Columns({setting: str(column) for setting, column in named.items()})
        elif dataclasses.is_dataclass(kind):
            arguments[item.name] = _build(cast(type[Any], kind), values, key + ".")
        elif key in values:
            arguments[item.name] = typed(key, values[key], kind)
    return section(**arguments)


def typed(key: str, value: Scalar, kind: type) -> Scalar:
    """Return the value of a setting in its kind: a whole number serves as a number.

    Raises:
        ConfigError: it is of another kind, or too large.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key} is too large: a whole number must fit 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}[kind]
        raise ConfigError(f"{key} must be {wanted}, not {value!r}")
    return value


def to_mapping(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """Return the flat, dotted, kebab-case form of ``config``: the inverse of from_section."""
    flat: dict[str, Scalar] = {}
    for item in dataclasses.fields(config):
        flat.update(_flat(item, getattr(config, item.name), prefix))
    return flat


def _flat(item: dataclasses.Field[Any], value: Any, prefix: str) -> dict[str, Scalar]:
    if isinstance(value, Columns):
        return {prefix + setting: column for setting, column in value.items()}
    key = _key(item, prefix)
    return to_mapping(value, key + ".") if dataclasses.is_dataclass(value) else {key: value}


def _key(item: dataclasses.Field[Any], prefix: str) -> str:
    return prefix + kebab(item.name)


def task_of(settings: Mapping[str, Scalar]) -> Task:
    """Return the task that flat settings name, or every run's by default, with its options.

    Raises:
        ConfigError: there is no such task, or an option is unknown, of another type or out of range.
    """
    name = str(settings.get("model.task", "classification"))
    OneOf(TASKS).check("model.task", name)
    task, prefix = TASKS[name], prefix_of(TASKS[name])
    own = {key: value for key, value in settings.items() if prefix and key.startswith(prefix)}
    return from_section(type(task), own, prefix) if prefix else task


def options_of(task: Task) -> dict[str, Scalar]:
    """Return the options of a task with their values, flat; none where it has none."""
    return to_mapping(task, prefix_of(task)) if prefix_of(task) else {}


def prefix_of(task: Task) -> str:
    """Return what the keys of a task's options begin with; empty: it has none."""
    return str(getattr(task, "prefix", "")) if dataclasses.is_dataclass(task) else ""

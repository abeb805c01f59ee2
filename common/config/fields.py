"""The declarations beside a setting's default: the rules that its value keeps, and its unit.

``rank: Annotated[int, POSITIVE, Unit("rows")] = 8``. The rules are checked when the object is made and printed by
``fedveil settings``, so what is documented is what is refused. The text under a field is its meaning.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, get_type_hints

from fedveil.common.check import Rule

TARGET_KINDS = ("auto", "values", "all-linear")
"""Words of ``adapter.targets`` that stand for layers, however the model names them (``common.adapters.targets``)."""


OPEN: Any = None
"""The default of a setting that is filled in for each run: a resolved configuration holds none."""


@dataclass(frozen=True)
class Unit:
    """What a number counts or measures."""

    name: str


RATIO = Unit("")
"""A number without a unit."""


class Section:
    """A frozen dataclass of settings, whose values keep the rules that its fields declare.

    Raises:
        ConfigError: a value breaks one; the message names it by its key.
    """

    prefix: ClassVar[str] = ""
    """What its keys begin with, such as ``adapter.``; empty: nothing."""

    def __post_init__(self) -> None:
        check_fields(self, self.prefix)


def check_fields(section: Any, prefix: str) -> None:
    """Raise ConfigError, naming the key, unless every field of a dataclass keeps its rules."""
    for name, rules in rules_of(type(section)).items():
        value = getattr(section, name)
        for rule in rules if value is not OPEN else ():
            rule.check(prefix + kebab(name), value)


def kinds_of(section: type[Any]) -> dict[str, Any]:
    """Return the type of every field of a dataclass, without what is declared beside it."""
    return _declared(section).kinds


def rules_of(section: type[Any]) -> dict[str, tuple[Rule, ...]]:
    """Return the rules of every field that declares some."""
    return _declared(section).rules


def unit_of(section: type[Any], field: str) -> Unit | None:
    """Return the unit that a field declares; None if it declares none."""
    return _declared(section).units.get(field)


def kebab(name: str) -> str:
    """Return a field's name as its key has it.

    >>> kebab("max_length")
    'max-length'
    """
    return name.replace("_", "-")


@dataclass(frozen=True)
class _Declared:
    kinds: dict[str, Any]
    rules: dict[str, tuple[Rule, ...]]
    units: dict[str, Unit]


def _declared(section: type[Any]) -> _Declared:
    return _read(section)  # type: ignore[arg-type]  # mypy takes no class for hashable


@lru_cache(maxsize=64)
def _read(section: type[Any]) -> _Declared:
    # Dear: it compiles every annotation anew.
    hints = get_type_hints(section, include_extras=True)
    beside = {item.name: getattr(hints[item.name], "__metadata__", ()) for item in dataclasses.fields(section)}
    rules = {name: tuple(extra for extra in extras if isinstance(extra, Rule)) for name, extras in beside.items()}
    return _Declared(
        kinds=get_type_hints(section),
        rules={name: own for name, own in rules.items() if own},
        units={name: extra for name, extras in beside.items() for extra in extras if isinstance(extra, Unit)},
    )

"""The reference of settings, made from their fields: what each means, its unit, its range and its default."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedveil.common.check import Rule, nearest
from fedveil.common.config.fields import kebab, kinds_of, rules_of, unit_of
from fedveil.common.config.flat import Columns, Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import ModelConfig, PrivacyConfig
from fedveil.common.config.text import toml_value
from fedveil.common.docstrings import fields_said
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, roles_of_all
from fedveil.strategies import ROWS
from fedveil.strategies.options import (
    EMPTY,
    OPTIONS,
    START,
    declared_settings,
    is_open,
    known_settings,
    rows_with_options,
    tables,
)
from fedveil.strategies.recipes import AUTO, RECIPES, recipe_settings
from fedveil.strategies.rules import RULES

KINDS: Mapping[type, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting, as its field declares it."""

    key: str
    default: Scalar
    """As a user writes it: 0, ``auto`` or empty may leave the value open."""
    meaning: str
    unit: str
    """Empty: none."""
    range: str
    """What it may be, in words: kind of value and rules."""
    owners: tuple[str, ...] = ()
    """The strategy or the starts whose option it is; empty: every run's."""


def all_settings(values: Mapping[str, Scalar] = EMPTY) -> dict[str, Setting]:
    """Return every setting by its key: every run's, the core's options, those of rows in ``values``.

    Args:
        values: settings of a run, flat, which may name rows of ``contrib``.
    """
    found = {setting.key: setting for setting in _of_section(RunConfig, "")}
    found[OPTIONS] = Setting(OPTIONS, "", _OF_OPTIONS, "", KINDS[str])
    for prefix, row in rows_with_options(values):
        for option in _of_section(row, prefix, {**values, **_named(row)}):
            found[option.key] = _shared(found.get(option.key), option, row.name)
    return {key: dataclasses.replace(s, meaning=s.meaning + _filled(key)) for key, s in found.items()}


_OF_OPTIONS = (
    "Options of rows of `contrib` for `flwr run`, which takes no setting that it does not know: "
    "`options='start.centred = true'`. `fedveil` takes them as they are, once the run names their row."
)


def _named(row: type[Any]) -> dict[str, Scalar]:
    """Return settings that name a row."""
    tables: dict[str, Mapping[str, Any]] = {"adapter.start": STARTS, "strategy": ROWS, "server.rule": RULES}
    tables |= {"model.task": {name: type(task) for name, task in TASKS.items()}}
    return {key: row.name for key, table in tables.items() if row.name in table and table[row.name] is row}


def options_of(row: type[Any]) -> Iterator[Setting]:
    """Yield the options of a row, as settings of a run that names it."""
    named = _named(row)
    prefix = START if "adapter.start" in named else row.prefix if "model.task" in named else f"{row.name}."
    for option in _of_section(row, prefix, named):
        yield dataclasses.replace(option, owners=(row.name,))


def select(names: Sequence[str], values: Mapping[str, Scalar] = EMPTY) -> list[Setting]:
    """Return the settings of these names: keys, or sections such as ``training``; all, in order, if there are none.

    ``values`` as for ``all_settings``.

    Raises:
        ConfigError: a name is neither; the nearest is named.
    """
    settings = all_settings(values)
    chosen: dict[str, Setting] = {}
    for name in names:
        matching = {key: s for key, s in settings.items() if key == name or key.startswith(f"{name}.")}
        if not matching:
            sections = {key.rpartition(".")[0] for key in settings} - {""}
            raise ConfigError(f"unknown setting {name!r}{nearest(name, [*settings, *sections])}")
        chosen |= matching
    return list((chosen if names else settings).values())


def lines_of(setting: Setting, given: Scalar | None, value: Scalar | None) -> str:
    """Return a setting in words and as TOML, so that all of them are a file that ``-c`` takes.

    Args:
        setting: what is described.
        given: the user's value; None: the default.
        value: the value of the run; None: the run has no such setting.
    """
    default = "" if setting.default == given or given is None else f"; default {toml_value(setting.default)}"
    filled = f"; here {toml_value(value)}" if value is not None and value not in (given, setting.default) else ""
    owners = f"option of {', '.join(setting.owners)}; " if setting.owners else ""
    unit = f"; unit: {setting.unit}" if setting.unit else ""
    comment = [*textwrap.wrap(setting.meaning, 100), f"({owners}{setting.range}{unit}{default}{filled})"]
    own = setting.default if given is None else given
    return "".join(f"# {line}\n" for line in comment) + f"{setting.key} = {toml_value(own)}\n"


def _shared(before: Setting | None, option: Setting, owner: str) -> Setting:
    """Return an option with one more owner, and its meaning there where that differs."""
    if before is None:
        return dataclasses.replace(option, owners=(owner,))
    said = before.meaning if option.meaning in before.meaning else f"{before.meaning} `{owner}`: {option.meaning}"
    return dataclasses.replace(before, meaning=said, owners=(*before.owners, owner))


def _of_section(section: type[Any], prefix: str, values: Mapping[str, Scalar] = EMPTY) -> Iterator[Setting]:
    """Yield the settings of a dataclass: its own first, then those of the sections in it."""
    said, kinds, rules = fields_said(section), kinds_of(section), rules_of(section)
    inner = [item for item in dataclasses.fields(section) if dataclasses.is_dataclass(kinds[item.name])]
    known = known_settings(values)
    for item in dataclasses.fields(section):
        name, kind, key = item.name, kinds[item.name], prefix + kebab(item.name)
        if item in inner:
            continue
        if kind is Columns:
            for role in roles_of_all():
                meaning = f"The {role.said}" + (". Empty: there is none." if role.optional else ".")
                yield Setting(prefix + role.setting, role.column, meaning, "", KINDS[str])
            continue
        own = [*rules.get(name, ()), *([tables()[key]] if key in tables() else [])]
        unit = unit_of(section, name)
        yield Setting(
            key=key,
            default=known[key],
            meaning=said[name].replace("``", "`"),  # out of reStructuredText
            unit=unit.name if unit else "",
            range=_range(key, kind, own),
        )
    for item in inner:
        yield from _of_section(kinds[item.name], f"{prefix}{kebab(item.name)}.")


_OTHER_RUNS = {
    "for language models": RunConfig(model=ModelConfig(task="causal-lm")),
    "for images": RunConfig(model=ModelConfig(task="image-classification")),
    "in a secure sum": RunConfig(privacy=PrivacyConfig(mode="secure-sum")),
    "without privacy": RunConfig(privacy=PrivacyConfig(mode="none")),
}


def _filled(key: str) -> str:
    """Return the values that recipes give an open setting, as a sentence of its meaning; empty for other settings."""
    if not is_open(key):
        return ""
    rest = declared_settings().get(key)
    if rest is None:
        return ""
    values = list[str]()
    for name in RECIPES:
        usual = recipe_settings(name, RunConfig()).get(key)
        values += [f"{toml_value(usual)} of `{name}`"] if usual is not None else []
        for which, run in _OTHER_RUNS.items():
            value = recipe_settings(name, run).get(key, rest if usual is not None else None)
            values += [f"{toml_value(value)} of `{name}` {which}"] if value not in (None, usual, AUTO) else []
    if not values:
        return f" {AUTO!r} is {toml_value(rest)}."
    other = [] if rest == AUTO else [f"else {toml_value(rest)}"]
    return f" Left to the recipe: {', '.join([*values, *other])}."


def _range(key: str, kind: type, rules: Sequence[Rule]) -> str:
    words = [rule.words for rule in rules]
    said = " ".join(words if words and kind is str else [KINDS[kind], *words])
    return said if not is_open(key) or AUTO in said else f"{said}, or {AUTO!r}"


def values_of(given: Mapping[str, Scalar], run: Mapping[str, Scalar], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the chosen settings as data, each with the user's value and the run's (None: it has no such setting)."""
    return [
        {
            **dataclasses.asdict(setting),
            "asked": given.get(setting.key, setting.default),
            "value": run.get(setting.key),
        }
        for setting in select(names, given)
    ]

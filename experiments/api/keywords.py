"""The settings of a run as people write them in Python: a dozen keywords, a mapping, a TOML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import flatten, read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.strategies.options import known_settings

KEYWORDS = {
    "text": "data.text",
    "label": "data.label",
    "labels": "data.labels",
    "epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
    "strategy": "strategy",
    "rounds": "rounds",
    "model": "model.name",
    "output": "output",
}
"""The setting that each plain keyword stands for."""
SETTINGS_OF_RECORDS = {"data.name": "data", "data.test": "test", "data.test-size": "test", "data.key": "site"}
"""The keyword on records that each of these settings follows from."""
OTHERS = ("site", "sites", "test", "ledger", "settings", "config", "resume", "quiet")
"""Keywords that are no setting."""
Settings: TypeAlias = "Mapping[str, Scalar | Sequence[str] | Mapping[str, object]]"
"""Flat (``{"adapter.rank": 4}``) or nested (``{"adapter": {"rank": 4}}``)."""


def given_settings(
    keywords: Mapping[str, object], settings: Settings | None, config: str | Path | None
) -> dict[str, Scalar]:
    """Return flat settings: those of ``config``, over which ``settings`` and keywords win.

    Raises:
        ConfigError: the file cannot be read, a value is no setting's, or a setting is given as keyword and otherwise.
    """
    named = {KEYWORDS[name]: _plain(value) for name, value in keywords.items() if value is not None}
    others = flatten(
        {key: list(value) if isinstance(value, tuple) else value for key, value in (settings or {}).items()}
    )
    if twice := [name for name, key in KEYWORDS.items() if key in {*named} & {*others}]:
        raise ConfigError(f"{twice[0]} and settings[{KEYWORDS[twice[0]]!r}] are the same setting: give one of them")
    file = read_settings_file(Path(config)) if config is not None else {}
    return {**file, **others, **flatten(named)}


def check_keywords(unknown: Mapping[str, object]) -> None:
    """Raise ConfigError for a keyword that there is not; it names the nearest one, or the setting that was meant."""
    for name in unknown:
        known = {key.replace(".", "_").replace("-", "_"): key for key in known_settings()}
        if name in known:
            raise ConfigError(f"{name} is no keyword: write settings={{{known[name]!r}: ...}}")
        raise ConfigError(
            f"unknown keyword {name!r}{nearest(name, [*KEYWORDS, *OTHERS])}; other settings go in settings="
        )


def _plain(value: object) -> object:
    """Return a keyword's value as a settings file has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def names_in_python(settings: Settings | None, config: str | Path | None) -> dict[str, str]:
    """Return what an error calls each setting that a keyword stands for, such as ``text=``.

    Settings that were given by their own names keep them.
    """
    if config is not None:
        return {}
    keywords = {**{key: f"{name}=" for name, key in KEYWORDS.items()}, "data.name": "data"}
    keywords |= {key: f"{name}=" for key, name in SETTINGS_OF_RECORDS.items() if name != "data"}
    return {key: name for key, name in keywords.items() if key not in flatten(dict(settings or {}))}

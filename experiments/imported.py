"""Settings from the training files of other programs.

The tables are data, one file a format in ``experiments/formats``. A key of theirs is a setting of ours, is refused
with its reason, or is listed as not used.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import toml_value
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.model.named import NAMED_MODELS
from fedveil.common.words import visible
from fedveil.strategies.job import configure

FORMATS = Path(__file__).resolve().parent / "formats"
ORDER = ("peft", "axolotl", "llama-factory", "trl")
"""Formats in the order in which a file is tried: the first with one of whose marks it has."""
MOST_BYTES, MOST_KEYS = 1 << 20, 2000
"""Above these a file is none of a training: YAML can name one list a million times."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)")
"""What YAML 1.1 takes for text and its writers mean as a number: ``2e-4``."""
NAMES = re.compile(r"[\w.\-]+(?:\s*,\s*[\w.\-]+)*")
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass
class Imported:
    """What became of each key of a file."""

    source: str
    """The program whose file it is, in words."""
    settings: dict[str, Scalar] = field(default_factory=dict)
    mapped: list[tuple[str, str]] = field(default_factory=list)
    """Their key with its value, and ours as TOML; empty where FedVeil does so anyway."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Their key, and why it is refused."""
    unused: list[tuple[str, str]] = field(default_factory=list)
    """Their key, and why it changes nothing here."""

    owners: dict[str, str] = field(default_factory=dict)
    """Which of their keys says a setting."""

    def take(self, key: str, value: Any, found: Mapping[str, Scalar]) -> None:
        """Note the settings that a key becomes; the key is refused where another one says otherwise."""
        for setting, own in found.items():
            if setting in self.owners and self.settings[setting] != own:
                self.refused.append((key, f"{self.owners[setting]} says {setting} otherwise"))
                return
        self.settings |= found
        self.owners |= dict.fromkeys(found, key)
        lines = ", ".join(f"{setting} = {toml_value(own)}" for setting, own in found.items())
        self.mapped.append((f"{key} = {_text(value)}", lines))


def import_file(path: Path, leave_out: Sequence[str] = ()) -> Imported:
    """Return what a training file of TRL, axolotl or LLaMA-Factory, or an ``adapter_config.json``, means here.

    Args:
        path: a YAML or JSON file.
        leave_out: keys that are not used, and so not refused.

    Raises:
        ConfigError: the file cannot be read, is of no known program, has no key of ``leave_out``, or its settings do
            not go together.
    """
    content = dict(_flat(_read(expanded(path))))
    if absent := [key for key in leave_out if key not in content]:
        raise ConfigError(f"{path} has no key {absent[0]!r} to leave out")
    name = next((name for name in ORDER if any(mark in content for mark in _format(name)["marks"])), "")
    if not name:
        programs = ", ".join(_format(each)["name"] for each in ORDER)
        raise ConfigError(f"{path} is of no program that is known here, which are {programs}")
    table = _format(name)
    imported = Imported(table["name"], dict(table.get("fixed", {})))
    for key, value in content.items():
        if key in leave_out:
            imported.unused.append((key, "left out, as --leave-out says"))
        else:
            _apply(imported, key, value, _rule(table, key))
    if not imported.refused:
        configure(imported.settings)
    return imported


def as_toml(imported: Imported, path: Path) -> str:
    """Return the settings as a TOML file in sections, with a comment on where they are from."""
    comments = [f"From {path.name} ({imported.source}), by `fedveil import`."]
    comments += [f"Not used: {keys} ({why})." for why, keys in by_reason(imported.unused)]
    lines = [f"# {visible(comment)}" for comment in comments]
    sections: dict[str, list[str]] = {"": []}
    for key, value in imported.settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    for section, own in sections.items():
        lines += ([f"\n[{section}]"] if section else []) + own
    return "\n".join(lines) + "\n"


def by_reason(keys: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each reason once with the keys that have it.

    >>> by_reason([("bf16", "it is off"), ("packing", "no"), ("fp16", "it is off")])
    [('it is off', 'bf16, fp16'), ('no', 'packing')]
    """
    reasons = dict.fromkeys(why for _, why in keys)
    return [(why, ", ".join(key for key, own in keys if own == why)) for why in reasons]


@cache
def _format(name: str) -> dict[str, Any]:
    return tomllib.loads((FORMATS / f"{name}.toml").read_text(encoding="utf-8"))


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES} bytes: it is no training file")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is neither YAML nor JSON ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no keys with values, as a training file does")
    return content


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; of a table in it, and of a list of tables, each key within, as in ``datasets.0.path``."""
    todo: list[tuple[str, Any]] = [(str(key), value) for key, value in content.items()]
    for count, (key, value) in enumerate(todo):
        if count > MOST_KEYS:
            raise ConfigError(f"the file has more than {MOST_KEYS} keys: it is no training file")
        tables = isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value)
        if isinstance(value, Mapping) and value:
            todo += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif tables:
            todo += [(f"{key}.{place}", inner) for place, inner in enumerate(value)]
        else:
            yield key, float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _rule(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the table's rule for a key; one that the table does not have is not used."""
    keys = table["keys"]
    pattern = key if key in keys else next((each for each in keys if "*" in each and fnmatchcase(key, each)), None)
    if pattern is not None:
        return keys[pattern] if isinstance(keys[pattern], Mapping) else {"to": keys[pattern]}
    reason = next((why for why, names in table["unused"].items() if key in names), "")
    if not reason and "." in key:  # a key of a table: what holds of the table holds of it
        return _rule(table, key.rpartition(".")[0])
    return {"unused": reason or "FedVeil does not know it"}


def _apply(imported: Imported, key: str, value: Any, rule: Mapping[str, Any]) -> None:
    """Let a rule decide what becomes of a key."""
    if value is None or ({*rule} <= {"refused", "off"} and (not value or value in rule.get("off", ()))):
        imported.unused.append((key, "it is off"))
        return
    found = _found(value, rule)
    if found is not None:
        imported.take(key, value, found)
    elif "unused" in rule:
        imported.unused.append((key, rule["unused"]))
    else:
        reason = rule.get("refused", f"{rule.get('to', 'FedVeil')} takes no such value")
        imported.refused.append((f"{key} = {_text(value)}", reason))


def _found(value: Any, rule: Mapping[str, Any]) -> dict[str, Scalar] | None:
    """Return the settings that a rule makes of a value; None: none, so that it is refused or not used."""
    values = rule.get("values", {})
    chosen = values.get(_text(value), values.get("*"))
    if isinstance(chosen, Mapping):
        return {name: value if own == "*" else own for name, own in chosen.items()}
    if chosen is not None:
        return {rule["to"]: chosen}
    if "to" not in rule or (values and "as" not in rule):
        return None
    converted = _converted(value, rule.get("as", ""))
    return None if converted is None else {rule["to"]: converted}


def _converted(value: Any, kind: str) -> Scalar | None:
    """Return a value as a setting takes it; None where none does."""
    if kind == "names":
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        return text if NAMES.fullmatch(text) else None
    if kind in ("dataset", "file"):
        is_file = isinstance(value, str) and (value.endswith(DATA_FILES) or expanded(value).exists())
        if not is_file and (kind == "file" or not isinstance(value, str)):
            return None
        return str(value) if is_file else f"hub:{value}"
    if kind == "model" and isinstance(value, str) and value not in NAMED_MODELS and not expanded(value).exists():
        return f"hub:{value}"
    return value if isinstance(value, str | int | float | bool) else None


def _text(value: Any) -> str:
    """Return a value as YAML writes it, in one short line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""The file of a site's policy (TOML), and the policy that it holds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedveil.client.pins import LABELS
from fedveil.client.policy import Policy
from fedveil.client.policy_values import names_in
from fedveil.common.config.flat import Scalar, from_section, options_of, typed
from fedveil.common.errors import ConfigError
from fedveil.common.labels import labels_text
from fedveil.common.tasks import TASKS
from fedveil.common.toml import toml_of

LISTS = ("strategies", "head-policies", "votes", "models", "projects", "bundles", "mechanisms", LABELS)
"""Keys whose value is a list in the file."""


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: it is missing, not TOML, has an unknown key (the nearest is named), or a value of
            another type or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy {path} cannot be read: {' '.join(str(error).split())}") from error
    return parse_policy(text, path)


def parse_policy(text: str, path: Path | str) -> Policy:
    """Return the policy of a file's text; ``path`` names it in errors, which are those of load_policy."""
    try:
        values = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        reason = " ".join(str(error).split()).replace(
            "Cannot overwrite a value", "a key stands there for the second time"
        )
        raise ConfigError(f"the policy {path} cannot be read: {reason}") from error
    try:
        return from_section(Policy, {key: _flat(key, value) for key, value in with_options(values).items()}, "")
    except ConfigError as error:
        raise ConfigError(f"the policy {path}: {error}") from error


def with_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy file's values, an option of a task as a text under its dotted key.

    Raises:
        ConfigError: an option is of another type than its task declares.
    """
    declared = {key: value for task in TASKS.values() for key, value in options_of(task).items()}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        of_task = isinstance(value, Mapping) and any(key.startswith(f"{name}.") for key in declared)
        inner = {f"{name}.{key}": own for key, own in value.items()} if of_task else {name: value}
        flat |= {
            key: str(typed(key, own, type(declared[key]))) if key in declared else own for key, own in inner.items()
        }
    return flat


def _flat(key: str, value: object) -> Scalar:
    if key in LISTS:
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f'{key} must be a list of texts, such as ["{"fed-sb" if key == LISTS[0] else "..."}"]')
        if key == LABELS:
            if not value or not all(label and label == label.strip() for label in value):
                raise ConfigError(f"{key} must name at least one, each without blanks around it; or leave it out")
            return labels_text(value)
        # An empty list would read as "any".
        if not value or not all(names_in(v) == (v,) for v in value):
            raise ConfigError(f"{key} must name at least one, and each without commas; or leave it out")
        return ",".join(value)
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{key} must be a text, a number, true or false")
    return value

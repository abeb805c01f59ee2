"""Requirements: values that a row of a table, or one setting, needs other settings to have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedveil.common.errors import ConfigError

Value = str | int | float | bool


@dataclass(frozen=True)
class Requirement:
    """One setting and the value that it must have."""

    key: str
    value: Value
    because: str
    """The reason, as a clause behind "because"."""


def one_plain_step(because: str) -> tuple[Requirement, ...]:
    """Return what makes a site's change of a round one gradient times the learning rate."""
    settings: Mapping[str, Value] = {
        "training.local-steps": 1,
        "training.optimizer": "sgd",
        "training.weight-decay": 0.0,
    }
    return tuple(Requirement(key, value, because) for key, value in settings.items())


def check_requirements(key: str, requirements: Iterable[Requirement], settings: Mapping[str, Value]) -> None:
    """Raise ConfigError, saying what to set, unless every setting has the value that is required.

    Args:
        key: the setting that requires them by its value, such as ``strategy``.
        requirements: what it requires.
        settings: every setting of the run, flat.
    """
    for required in requirements:
        if settings[required.key] != required.value:
            raise ConfigError(
                f"{key} {settings[key]!r} needs {required.key} {required.value!r}, because {required.because}, and it "
                f"is {settings[required.key]!r}: set {required.key} to {required.value!r}, or {key} to another"
            )

"""Validators named by what they check; they take ``name=value`` and name it when it fails.

>>> positive(clip_norm=0.5)
>>> positive(clip_norm=0.0)
Traceback (most recent call last):
    ...
common.errors.ConfigError: clip-norm must be above 0, not 0.0
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from common.errors import ConfigError

CLIP_NORMS = (1e-6, 1e6)
"""Least and largest L2 bound of a record's gradient."""


def _spoken(name: str) -> str:
    return name.replace("__", ".").replace("_", "-")


def positive(**values: float) -> None:
    """Raise ConfigError unless every value is finite and above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{_spoken(name)} must be above 0, not {value!r}")


def not_negative(**values: float) -> None:
    """Raise ConfigError unless every value is finite and at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{_spoken(name)} must be at least 0, not {value!r}")


def at_least(limit: float, **values: float) -> None:
    """Raise ConfigError unless every value is at least ``limit``."""
    for name, value in values.items():
        if not value >= limit:
            raise ConfigError(f"{_spoken(name)} must be at least {limit:g}, not {value!r}")


def in_range(low: float, high: float, **values: float) -> None:
    """Raise ConfigError unless ``low < value <= high`` for every value."""
    for name, value in values.items():
        if not (math.isfinite(value) and low < value <= high):
            raise ConfigError(f"{_spoken(name)} must be above {low} and at most {high}, not {value!r}")


def clip_norm(**values: float) -> None:
    """Raise ConfigError unless every value is a clip norm that float32 holds well, together with its noise.

    Near the ends of float32 a released gradient is rounded to steps as wide as its noise, or to zero or
    infinity: what arrives is then not the noise that was paid for.
    """
    for name, value in values.items():
        if not CLIP_NORMS[0] <= value <= CLIP_NORMS[1]:
            raise ConfigError(
                f"{_spoken(name)} must be from {CLIP_NORMS[0]:g} to {CLIP_NORMS[1]:g}, where float32 holds the noise, "
                f"not {value!r}"
            )


def below(limit: float, **values: float) -> None:
    """Raise ConfigError unless every value is below ``limit``."""
    for name, value in values.items():
        if not value < limit:
            raise ConfigError(f"{_spoken(name)} must be below {limit:g}, not {value!r}")


def one_of(choices: Iterable[str], **values: str) -> None:
    """Raise ConfigError, naming the nearest choice, unless every value is one of ``choices``."""
    known = tuple(choices)
    for name, value in values.items():
        if value not in known:
            raise ConfigError(f"{_spoken(name)} is {value!r}; choose one of {', '.join(known)}{nearest(value, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string.

    >>> nearest("rnk", ["rank", "alpha"])
    " (did you mean 'rank'?)"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""

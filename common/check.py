"""Rules that a value keeps, each with its words: a check and its documentation are the same thing.

The functions take ``name=value`` and name the value when it fails.

>>> positive(clip_norm=0.5)
>>> positive(clip_norm=0.0)
Traceback (most recent call last):
    ...
fedveil.common.errors.ConfigError: clip-norm must be above 0, not 0.0
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from fedveil.common.errors import ConfigError

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A name that somebody else chooses, and that is written into file names, ledgers and reports."""
CLIP_NORMS = (1e-6, 1e6)
"""Least and largest L2 bound of a record's gradient."""


class Rule(ABC):
    """What a value may be."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The rule in words that fit behind "must be"."""

    @abstractmethod
    def holds(self, value: float | str) -> bool:
        """Return whether the value keeps the rule."""

    def check(self, name: str, value: float | str) -> None:
        """Raise ConfigError, naming the value by ``name``, unless it keeps the rule."""
        if not self.holds(value):
            raise ConfigError(f"{name} must be {self.words}, not {value!r}")


@dataclass(frozen=True)
class Interval(Rule):
    """Finite numbers between two ends.

    >>> Interval(0, 1).words, Interval(0, 0.5, high_too=False).words, Interval(0, low_too=True).words
    ('above 0 and at most 1', 'above 0 and below 0.5', 'at least 0')
    """

    low: float
    high: float = math.inf
    low_too: bool = False
    """Whether ``low`` itself is in it."""
    high_too: bool = True
    """Whether ``high`` itself is in it."""
    or_zero: bool = False
    """Whether 0 is in it as well."""
    why: str = ""
    """Where the ends come from, behind a comma."""

    @property
    def words(self) -> str:
        """The ends in words."""
        if self.low_too and self.high_too and self.high < math.inf:
            ends = f"from {self.low:g} to {self.high:g}"
        else:
            ends = f"{'at least' if self.low_too else 'above'} {self.low:g}"
            if self.high < math.inf:
                ends += f" and {'at most' if self.high_too else 'below'} {self.high:g}"
        return ends + (", or 0" if self.or_zero else "") + (f", {self.why}" if self.why else "")

    def holds(self, value: float | str) -> bool:
        """Return whether a number is finite and in it."""
        if isinstance(value, str) or not math.isfinite(value):
            return False
        if self.or_zero and value == 0:
            return True
        above = value >= self.low if self.low_too else value > self.low
        return above and (value <= self.high if self.high_too else value < self.high)

    def check(self, name: str, value: float | str) -> None:
        """Raise ConfigError, naming the value by ``name``, unless it is finite and in it.

        >>> Interval(0).check("epsilon", math.inf)
        Traceback (most recent call last):
        fedveil.common.errors.ConfigError: epsilon must be above 0, not inf: give a finite number
        """
        if not self.holds(value):
            more = "" if isinstance(value, str) or math.isfinite(value) else ": give a finite number"
            raise ConfigError(f"{name} must be {self.words}, not {value!r}{more}")


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some words; a table's are those that it has at the check."""

    choices: Iterable[str]

    @property
    def words(self) -> str:
        """The choices."""
        return f"one of {', '.join(self.choices)}"

    def holds(self, value: float | str) -> bool:
        """Return whether a word is one of them."""
        return value in tuple(self.choices)

    def check(self, name: str, value: float | str) -> None:
        """Raise ConfigError, naming the nearest choice, unless the word is one of them."""
        if not self.holds(value):
            known = tuple(self.choices)
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(known)}{nearest(str(value), known)}")


@dataclass(frozen=True)
class Digits(Rule):
    """A number of hexadecimal digits, or no text at all."""

    count: int
    source: str
    """The command that prints them."""

    @property
    def words(self) -> str:
        """The number of digits, and what prints them."""
        return f"{self.count} hexadecimal digits, as {self.source} prints them, or empty"

    def holds(self, value: float | str) -> bool:
        """Return whether a text is such digits, or empty."""
        return value == "" or re.fullmatch(f"[0-9a-f]{{{self.count}}}", str(value)) is not None


@dataclass(frozen=True)
class PlainNames(Rule):
    """Plain names with commas between them, or no text at all."""

    most: int

    @property
    def words(self) -> str:
        """How many names, and of which characters."""
        many = "one name" if self.most == 1 else "names, each once and with commas between them,"
        return f"{many} of letters, digits, '.', '_' and '-', or empty"

    def holds(self, value: float | str) -> bool:
        """Return whether a text is empty, or at most so many different names."""
        names = plain_names(str(value))
        plain = all(map(PLAIN_NAME.fullmatch, names)) and len(set(names)) == len(names)
        return value == "" or (plain and len(names) <= self.most)


POSITIVE = Interval(0)
NOT_NEGATIVE = Interval(0, low_too=True)
CLIP_NORM = Interval(*CLIP_NORMS, low_too=True, why="where float32 holds the noise")
"""L2 bounds that float32 holds well, together with the noise.

Near the ends of float32 a released gradient is rounded to steps as wide as its noise, or to zero or
infinity: what arrives is then not the noise that was paid for.
"""


def _check(rule: Rule, values: dict[str, float] | dict[str, str]) -> None:
    for name, value in values.items():
        rule.check(name.replace("_", "-"), value)


def positive(**values: float) -> None:
    """Raise ConfigError unless every value is finite and above 0."""
    _check(POSITIVE, values)


def not_negative(**values: float) -> None:
    """Raise ConfigError unless every value is finite and at least 0."""
    _check(NOT_NEGATIVE, values)


def at_least(limit: float, **values: float) -> None:
    """Raise ConfigError unless every value is finite and at least ``limit``."""
    _check(Interval(limit, low_too=True), values)


def in_range(low: float, high: float, **values: float) -> None:
    """Raise ConfigError unless ``low < value <= high`` for every value."""
    _check(Interval(low, high), values)


def clip_norm(**values: float) -> None:
    """Raise ConfigError unless every value is a clip norm that float32 holds well (``CLIP_NORM``)."""
    _check(CLIP_NORM, values)


def below(limit: float, **values: float) -> None:
    """Raise ConfigError unless every value is finite and below ``limit``."""
    for name, value in values.items():
        if not (math.isfinite(value) and value < limit):
            raise ConfigError(f"{name.replace('_', '-')} must be below {limit:g}, not {value!r}")


def one_of(choices: Iterable[str], **values: str) -> None:
    """Raise ConfigError, naming the nearest choice, unless every value is one of ``choices``."""
    for name, value in values.items():
        OneOf(tuple(choices)).check(name.replace("_", "-"), value)


def plain_names(text: str) -> tuple[str, ...]:
    """Return the names of a text with commas between them.

    >>> plain_names("clinic, ward"), plain_names("")
    (('clinic', 'ward'), ())
    """
    return tuple(name.strip() for name in text.split(",")) if text else ()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string.

    >>> nearest("rnk", ["rank", "alpha"])
    " (did you mean 'rank'?)"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""

"""Figures and foreign text as people read them."""

from __future__ import annotations

import math
import re
from typing import Any

UNKNOWN = "–"
EACH = 12
"""Sites up to which each is named, or has a row of its own."""

LONGEST_REASON = 500
"""Characters of a reason that reach the terminal and the records."""


def visible(text: str) -> str:
    """Return ``text`` on one line, with every character that cannot be seen replaced.

    Names and reasons come from other machines: a control character or a change of the writing
    direction must not change how the rest of a report reads.

    >>> visible("site\\x1b[2K\\nfine")
    'site\ufffd[2K fine'
    """
    return printable(re.sub(r"[\t\r\n]+", " ", text))


def printable(text: str, instead: str = "\ufffd") -> str:
    """Return ``text`` with ``instead`` of every character that cannot be seen.

    >>> printable("a\\x1b[2Kb", "?")
    'a?[2Kb'
    """
    return "".join(character if character.isprintable() else instead for character in text)


def clean(text: str, longest: int = LONGEST_REASON) -> str:
    """Return a site's words as one printable line of bounded length: no control codes, no line breaks."""
    return printable(" ".join(text[: 2 * longest].split()), "?")[:longest]


_ANY_PATH = re.compile(r"(?<![\w.:/<])(?:~[\w.-]*|[A-Za-z]:)?[/\\][^\s'\"`,;:()]+")


def pathless(text: str) -> str:
    """Return ``text`` with ``<path>`` in the place of every path of a machine; of one with a blank its rest stays.

    >>> pathless("see /etc/x; 1/50 and https://host/x stay")
    'see <path>; 1/50 and https://host/x stay'
    """
    return _ANY_PATH.sub("<path>", text)


def percent_text(share: float | None) -> str:
    """Return a share in percent with one decimal."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def number_text(value: float | None) -> str:
    """Return a figure with four significant digits; whole numbers with separators of thousands."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def decimal_text(value: float | None, decimals: int) -> str:
    """Return a figure with ``decimals`` decimals; one of a model that diverged has none.

    >>> decimal_text(0.5, 2), decimal_text(float("nan"), 2), decimal_text(None, 2)
    ('0.50', 'not finite', '–')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.{decimals}f}" if math.isfinite(value) else "not finite"


def numbers_text(values: list[float]) -> str:
    """Return distinct figures one after another."""
    return ", ".join(number_text(value) for value in values) or UNKNOWN


def bytes_text(count: int | None) -> str:
    """Return bytes in the unit that suits them, decimal.

    >>> bytes_text(999), bytes_text(1_203_456)
    ('999 B', '1.20 MB')
    """
    if count is None:
        return UNKNOWN
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def seconds_text(value: float | None) -> str:
    """Return seconds; from two minutes on in minutes."""
    if value is None:
        return UNKNOWN
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def value_text(value: Any) -> str:
    """Return a setting as the configuration writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def counted(number: int, word: str) -> str:
    """Return the number with its word.

    >>> counted(1, "step"), counted(20, "step")
    ('1 step', '20 steps')
    """
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def capital(text: str) -> str:
    """Return a text with its first letter large, and the others as they are.

    >>> capital("micro F1")
    'Micro F1'
    """
    return text[:1].upper() + text[1:]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return what names are sorted by so that numbers in them count as numbers.

    >>> sorted(["site-10", "site-2", "north"], key=natural)
    ['north', 'site-2', 'site-10']
    """
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


def names_text(names: list[str]) -> str:
    """Return names in words: each, or the first and the last of many with their number.

    >>> names_text(["north", "south"]), names_text([f"site-{i}" for i in range(1000)])
    ('north, south', 'site-0 … site-999 (1,000 sites)')
    """
    if len(names) <= EACH:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names):,} sites)"

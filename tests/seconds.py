"""The tests' whole processor time, held against a limit in CI, and the files that take longest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator

MOST = 2700.0
"""Seconds of processor time of a whole ``make test``: 2,699 were measured beside containers and another run.

Processor time and not the clock's, for what runs beside the tests takes little of it. If they need more: make tests
quicker, and not this larger.
"""
LONGEST = 10
"""Files that are named."""


def own() -> float:
    """Return the processor time of this process and of those that it started and has waited for, in seconds."""
    return sum(os.times()[:4])


def too_many(spent: float) -> str:
    """Return what to say of so many seconds of processor time; empty: they are no more than ``MOST``."""
    if spent <= MOST:
        return ""
    return f"{spent:,.0f} s of processor time are above the {MOST:,.0f} of tests/seconds.py: make tests quicker"


def summary(spent: float, tests: Iterable[tuple[str, float]]) -> Iterator[str]:
    """Yield the lines at the end of a session.

    Args:
        spent: processor time, in seconds.
        tests: file and seconds of each phase of each test, by the clock.
    """
    by_file = Counter[str]()
    for file, seconds in tests:
        by_file[file] += seconds  # type: ignore[assignment]
    yield f"{spent:,.0f} s of processor time; the longest files, by the clock:"
    yield ", ".join(f"{file} {seconds:.0f} s" for file, seconds in by_file.most_common(LONGEST))

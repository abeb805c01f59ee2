"""The source of private randomness: 64-bit integers from the operating system.

Tests alone may replace it, so that whole runs repeat bit for bit. A deployed site or server refuses to start then, and
a report of such a run says that it protects no one. No setting, environment variable or message reaches it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from fedveil.common.errors import MechanismError
from fedveil.common.later import np

Source: TypeAlias = "Callable[[int], np.ndarray]"
"""Returns so many uniform 64-bit integers: uint64 of shape (count,)."""
_replacement: Source | None = None
_is_rehearsal = ContextVar("is_rehearsal", default=False)


def system_integers(count: int) -> np.ndarray:
    """Return ``count`` uniform 64-bit integers from the operating system: uint64 of shape (count,)."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def private_words(count: int) -> np.ndarray:
    """Return ``count`` uniform 64-bit integers from the operating system, or from a test's source."""
    source = system_integers if _replacement is None or _is_rehearsal.get() else _replacement
    return source(count)


@contextmanager
def replaced_entropy(source: Source) -> Iterator[None]:
    """Draw private randomness from ``source``; for tests alone: what runs inside protects no one."""
    global _replacement
    before, _replacement = _replacement, source
    try:
        yield
    finally:
        _replacement = before


def entropy_is_replaced() -> bool:
    """Return whether private randomness comes from a test's source."""
    return _replacement is not None


def require_system_entropy() -> None:
    """Refuse to go on where a test has replaced the operating system's entropy.

    Raises:
        MechanismError: it has.
    """
    if entropy_is_replaced():
        raise MechanismError(
            "private randomness comes from a test's source in this process and protects nobody: start a new process"
        )


@contextmanager
def rehearsal_entropy() -> Iterator[None]:
    """Draw from the operating system, so that a rehearsal takes nothing from a test's source."""
    token = _is_rehearsal.set(True)
    try:
        yield
    finally:
        _is_rehearsal.reset(token)

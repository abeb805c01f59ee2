"""The results of ``fedveil doctor``: one line for each thing looked at, and what to do where it is not well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fedveil.common.errors import FedVeilError


@dataclass(frozen=True)
class CheckResult:
    """One line of the doctor."""

    ok: bool
    what: str
    """What was looked at."""
    found: str
    """What was found; for a failure also what to do."""

    def line(self) -> str:
        """Return the line as it is printed."""
        return f"{'ok    ' if self.ok else 'failed'}  {self.what}: {self.found}"


Check = Callable[[], Iterable[CheckResult]]


def in_silence(step: str) -> None:
    """Say nothing of a step."""
    del step


def examine(checks: Iterable[tuple[str, Check]], step: Callable[[str], None] = in_silence) -> Iterator[CheckResult]:
    """Yield the results of every check; one that raises an error for people is a failure and stops no other.

    ``step`` hears what is looked at next.
    """
    for what, check in checks:
        step(what)
        try:
            yield from check()
        except FedVeilError as error:
            yield CheckResult(False, what, str(error))

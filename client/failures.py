"""A round that fails after it was written down: a refusal, or an answer that hides the failure."""

from __future__ import annotations

from dataclasses import dataclass

from fedveil.client.deadline import Deadline
from fedveil.client.outgoing import own_words
from fedveil.strategies.job import Job


@dataclass(frozen=True)
class OpenFailures:
    """A failure is a refusal, and an answer that is late is better than none."""

    deadline: Deadline
    """To which steps and reading keep."""

    def caught(self, error: Exception) -> str:
        """Raise the error: the server is told that the round failed."""
        raise error


@dataclass(frozen=True)
class HiddenFailures:
    """A failure is answered by steps on no record: a refusal would tell of the records."""

    deadline: Deadline

    def caught(self, error: Exception) -> str:
        """Return what the site's own log says of the error."""
        return own_words(error)


def failures_of(job: Job, deadline: Deadline) -> OpenFailures | HiddenFailures:
    """Return what becomes of failures in a run whose answer leaves at ``deadline``."""
    return HiddenFailures(deadline) if job.mechanism.conceals else OpenFailures(Deadline())

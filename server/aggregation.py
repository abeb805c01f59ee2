"""Which replies count, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

from common.messages import Refusal, Reply, TrainResult
from strategies import Contribution


def sort_replies(replies: Sequence[Reply], *, private: bool) -> tuple[list[TrainResult], list[Refusal]]:
    """Split replies into results that count and refusals.

    A second result under one site's name is refused (one site, one vote), and so is a result
    without a privacy account while the run makes a privacy claim.
    """
    accepted: list[TrainResult] = []
    refused: list[Refusal] = []
    for reply in replies:
        if isinstance(reply, Refusal):
            refused.append(reply)
        elif any(reply.site == other.site for other in accepted):
            refused.append(_refuse(reply, "another node already answered under this name in this round"))
        elif private and reply.spending is None:
            refused.append(_refuse(reply, "the reply states no privacy spending in a private run"))
        else:
            accepted.append(reply)
    return sorted(accepted, key=lambda r: r.site), sorted(refused, key=lambda r: r.site)


def _refuse(reply: TrainResult, reason: str) -> Refusal:
    return Refusal(reply.run, reply.round_number, reply.site, "task", reason)


def contributions(results: Sequence[TrainResult]) -> list[Contribution]:
    """Return what a strategy averages, weighted by the sizes that sites declare as public."""
    return [Contribution(result.site, float(result.public_size), result.contribution) for result in results]

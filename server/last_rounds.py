"""The end of a run that some sites cannot pay: its last rounds are not trained by the others alone.

A site's noise is calibrated for all its rounds. So a round that it paid for twice, since a server lost the first reply,
costs it one of the last ones: the final steps would be those of the sites that were luckier. Where a site ends by plan,
such as by a smaller budget, or is absent for any other reason, the others go on, and ``min-sites`` says how few. A site
that lies about what it paid ends a run no more rounds early than it was resumed times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedveil.common.messages.round import Spending
from fedveil.common.starts import PaidStart
from fedveil.common.words import clean, counted, names_text
from fedveil.privacy.accounting import Release
from fedveil.privacy.privacy_filter import promised
from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collected
from fedveil.server.members import Member
from fedveil.strategies.job import Job

AGREES = 1e-6
"""In ε, relative: the site's ledger holds what is known here and nothing else."""


class LastRounds:
    """Ends a run before a round that some sites cannot pay for, because an earlier one was repeated.

    Args:
        job: the run.
        admission: of its sites.
        resumes: how often the run was resumed, each time with a round that may be paid for again.
    """

    def __init__(self, job: Job, admission: Admission, resumes: int) -> None:
        self._job, self._admission, self._resumes = job, admission, resumes

    def before(self, round_number: int) -> str:
        """Return why the run ends before a round begins; empty: it begins."""
        return self._reason(cannot_pay(self._job, self._admission, round_number, self._resumes), round_number)

    def after(self, got: Collected, round_number: int) -> str:
        """Return why the run ends although a round has results; empty: it does not."""
        return self._reason(refused(self._job, self._admission, got, round_number, self._resumes), round_number)

    def _reason(self, lacking: list[Member], round_number: int) -> str:
        return not_alone(self._job, self._admission, lacking, round_number) if lacking else ""


def cannot_pay(job: Job, admission: Admission, number: int, resumes: int) -> list[Member]:
    """Return the sites of which it is known, before a round begins, that it is lost to them by a repeated one.

    It is known where a site's ledger holds nothing but this run. Any other site gets the task, and refuses.

    Args:
        job: the run.
        admission: of its sites.
        number: the round's.
        resumes: how often the run was resumed, each time with a round that may be paid for again.
    """
    return [
        member
        for member in admission.members.values()
        if member.spending and _may_lack(job, member, number, resumes) and _exceeds(job, member.spending)
    ]


def refused(job: Job, admission: Admission, got: Collected, number: int, resumes: int) -> list[Member]:
    """Return the sites that refused a round for their budget, of which a repeated one took it; as ``cannot_pay``."""
    nodes = [node for node, absence in got.refusals.items() if absence.kind == "budget"]
    found = [admission.members.get(admission.mark(node)) for node in nodes]
    return [member for member in found if member and _may_lack(job, member, number, resumes)]


def not_alone(job: Job, admission: Admission, lacking: Iterable[Member], number: int) -> str:
    """Return why a run ends before a round."""
    names = names_text([clean(member.site) for member in lacking])
    took_part = sum(member.round_number == number - 1 for member in admission.members.values())
    return (
        f"{names} paid twice for a round that was cut off, and cannot pay for round {number} of {job.config.rounds}; "
        f"the others do not train it alone: the last round is {number - 1}, of {counted(took_part, 'site')}"
    )


def _may_lack(job: Job, member: Member, number: int, resumes: int) -> bool:
    """Whether a site that was there until now has paid for more than its rounds, and a round is one that costs it."""
    steps, spent = job.config.training.local_steps, member.spending
    if spent is None or member.round_number != number - 1:
        return False
    more = max(member.repeated, spent.steps_total - member.round_number * steps)
    return number > job.config.rounds - min(math.ceil(more / steps), resumes)


def _exceeds(job: Job, spent: Spending) -> bool:
    """Whether one more round passes a site's budget; false where its ledger holds releases unknown here."""
    start = job.origin.release() if isinstance(job.origin, PaidStart) else None

    def price(steps: int) -> float:
        return promised([*([start] if start else []), Release(spent.event, steps)], spent.delta)[0]

    if not math.isclose(price(spent.steps_total), spent.epsilon_total, rel_tol=AGREES):
        return False
    return price(spent.steps_total + job.config.training.local_steps) > spent.epsilon_budget * (1 + AGREES)

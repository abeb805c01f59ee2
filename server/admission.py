"""Decide which results count.

A result must come from the node that holds the site's name, declare the same public size as before, and state a
privacy spending that is consistent with the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from fedveil.common.errors import FedVeilError
from fedveil.common.messages.round import Spending, TrainResult
from fedveil.privacy.accountant import INITIALISATION, TRAINING
from fedveil.privacy.accounting import LEAST_DELTA
from fedveil.privacy.calibration import noise_multiplier_for
from fedveil.privacy.events import LEAST_RATE, MOST_NOISE, EventKind
from fedveil.privacy.figures import epsilon_text, honest_text
from fedveil.privacy.plan import PrivacyPlan
from fedveil.server.members import Member, mark_of
from fedveil.server.optimizer import usual_change
from fedveil.server.plausible import implausible, largest_norm, oversized, update_norm
from fedveil.server.registered import misnamed
from fedveil.server.terms import least_plan
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

ROOM = 1e-3
"""Relative. Two versions of an accountant may differ by this in the least noise for a budget."""
ROUNDING = 1e-9


class Admission:
    """Judges a round's results by the run's settings and by what each site said before."""

    def __init__(
        self,
        job: Job,
        members: Mapping[str, Member],
        registered: Callable[[], Mapping[int, str] | None] = lambda: None,
        run: str = "",
    ) -> None:
        self._job, self._run = job, run
        self.registered = registered
        """Returns the name that each node's key is registered under; None where no names are registered."""
        self.members: dict[str, Member] = dict(members)
        """By the mark of the node, in the order in which they first counted."""

    def mark(self, node: int) -> str:
        """Return the mark of a node in all that the run writes."""
        return mark_of(node, self._run)

    def owner(self, site: str, online: Collection[int]) -> int | None:
        """Return whose a name is where none is registered: the first node's that counted under it and is online.

        None while it is free: a site that was started again may be another node, and the old one is offline then.
        """
        marks = [mark for mark, member in self.members.items() if member.site == site]
        nodes = {self.mark(node): node for node in online} if marks else {}
        return next((nodes[mark] for mark in marks if mark in nodes), None)

    def judge(self, results: Mapping[int, TrainResult], state: ServerState, online: Collection[int]) -> dict[int, str]:
        """Return the nodes whose result does not count, with the reason.

        Args:
            results: all results of the round so far, by node, in the order of their attempts.
            state: what the sites started from.
            online: the nodes that are online, whether or not they answered.
        """
        reasons = self.contradictions(results, online)
        left = {node: result for node, result in results.items() if node not in reasons}
        reasons |= self._oversized(left)
        left = {node: result for node, result in left.items() if node not in reasons}
        norms = {node: update_norm(self._job, result, state) for node, result in left.items()}
        bounds = {n: largest_norm(self._job, least_plan(self._job, r), r, state) for n, r in left.items()}
        return reasons | implausible(norms, bounds, usual_change(state))

    def contradictions(self, results: Mapping[int, TrainResult], online: Collection[int]) -> dict[int, str]:
        """Return the nodes that no honest site under their name would answer as, with the reason.

        Of what they say was spent nothing is believed, where a result that does not count for what it holds was paid
        for all the same. Arguments as for ``judge``.
        """
        reasons: dict[int, str] = {}
        claimed: set[str] = set()
        names = self.registered()
        for node, result in results.items():
            if reason := misnamed(node, result.site, names):
                reasons[node] = reason
                continue
            if names is None and self.owner(result.site, online) not in (None, node):
                reasons[node] = f"another node that is online counted as {result.site} before"
                continue
            if result.site in claimed:
                reasons[node] = "another node already answered under this name in this round"
                continue
            try:
                reason = self._contradiction(node, result)
            except FedVeilError as error:  # no plan follows from what it declares
                reason = str(error)
            if reason:
                reasons[node] = reason
            else:
                claimed.add(result.site)
        return reasons

    def _oversized(self, results: Mapping[int, TrainResult]) -> dict[int, str]:
        """Return the nodes whose size is out of proportion to the sizes that this round and earlier ones declared."""
        said = {member.site: member.public_size for member in self.members.values()}
        said |= {result.site: result.public_size for result in results.values()}
        reasons = oversized(said, self._job.config.max_size_ratio)
        return {node: reasons[result.site] for node, result in results.items() if result.site in reasons}

    def enrol(self, results: Mapping[int, TrainResult]) -> None:
        """Remember the nodes of a round that counts."""
        for node, result in results.items():
            before, spent = self._past(node, result.site), result.spending
            repeated = before.repeated if before else 0
            if before and before.spending and spent:
                repeated += spent.steps_total - spent.steps_round - before.spending.steps_total
            self.members[self.mark(node)] = Member(
                *(result.site, result.public_size, spent, result.rank, result.round_number, max(0, repeated))
            )

    def _past(self, node: int, site: str) -> Member | None:
        """Return what the node said last, or else the last one that had its name."""
        namesakes = [member for member in self.members.values() if member.site == site]
        return self.members.get(self.mark(node)) or (namesakes[-1] if namesakes else None)

    def _contradiction(self, node: int, result: TrainResult) -> str:
        """Return why a result contradicts the run or the site's own past; empty if it does not.

        Raises:
            FedVeilError: what it declares leaves no plan.
        """
        before, spent = self._past(node, result.site), result.spending
        if before and before.public_size != result.public_size:
            return f"the site declares the public size {result.public_size}, it was {before.public_size} in this run"
        # Round 0 trains no column.
        if before and before.round_number and result.round_number and before.rank != result.rank:
            return f"the site declares rank {result.rank}, it was {before.rank} in this run"
        plan = least_plan(self._job, result)
        if not isinstance(plan, PrivacyPlan):
            return "the reply states a privacy spending in a run without privacy" if spent else ""
        if spent is None:
            return "the reply states no privacy spending in a private run"
        past = before.spending if before else None
        if past and (spent.epsilon_total < past.epsilon_total * (1 - ROUNDING) or spent.steps_total < past.steps_total):
            before_it, now = (epsilon_text(s.epsilon_total, decimals=4) for s in (past, spent))
            honest = honest_text(self._job.config.privacy.honest_sites)
            return f"the site's total went back from ε {before_it} to {now}{honest}"
        return self._wrong_spending(result, spent, plan)

    def _wrong_spending(self, result: TrainResult, spent: Spending, plan: PrivacyPlan) -> str:
        """Return what a spending says that no honest site does, by the run's terms or by arithmetic."""
        wanted = TRAINING if result.round_number else INITIALISATION
        if spent.purpose != wanted:
            return f"the reply's spending is of kind {spent.purpose!r}, this round is {wanted!r}"
        stated, own = spent.event, plan.event
        if stated.kind != own.kind:
            return f"the spending's releases are {stated.kind!r}, the run's are {own.kind!r}"
        steps = plan.release(self._job.config.training.local_steps).count if result.round_number else 0
        if spent.steps_round != steps:
            return f"the reply's spending is for {spent.steps_round} steps, not {steps}"
        if not min(stated.sample_rate, stated.clip_norm, spent.delta) > 0:
            return "the spending's sample rate, clip norm and delta must all be above 0"
        stated.check()  # a report computes the price again, and what has none would leave it without
        # Figures that no honest site has would keep it busy.
        if stated.sample_rate < LEAST_RATE or spent.delta < LEAST_DELTA:
            return f"the spending's sample rate is below {LEAST_RATE:g}, or its delta below {LEAST_DELTA:g}"
        for name in sorted(set(own.figures) - set(EventKind.figures)):
            # Which way is stricter, its kind alone knows.
            if abs(stated.figures[name] - own.figures[name]) > ROUNDING * abs(own.figures[name]):
                both = f"{stated.figures[name]:.4g} is another than {own.figures[name]:.4g}"
                return f"the spending's {name} {both}, the run's"
        return self._out_of_bounds(result, spent, plan)

    def _out_of_bounds(self, result: TrainResult, spent: Spending, plan: PrivacyPlan) -> str:
        """Return which figure of a spending is below the least, or above the most, of every honest site; or nothing."""
        stated, own = spent.event, plan.event
        # The budget holds for what was charged under the site's own name. A total above it is that of records which
        # other names of its ledger share, an infinite one that of records released without privacy: nothing remains.
        total = spent.epsilon_budget if math.isinf(spent.epsilon_total) else spent.epsilon_total
        above = spent.epsilon_total > spent.epsilon_budget * (1 + ROUNDING)
        noises = [("noise multiplier", stated.noise_multiplier, own.noise_multiplier)]
        if result.noised_correct:
            one_count = noise_multiplier_for(plan.max_epsilon, plan.delta, 1.0, 1)
            noises.append(("noise of the count", result.noised_correct.noise_std, one_count))
        # Every site samples and clips as the run says. One that stated a lower rate would have its noise counted as so
        # much larger, at its whole weight, and the server's rate would follow it (``rates``).
        exact = [("sample rate", stated.sample_rate, own.sample_rate), ("clip norm", stated.clip_norm, own.clip_norm)]
        for name, figure, least in (*noises, *exact):
            if figure < least * (1 - ROOM):
                return f"the spending's {name} {figure:.4g} is below {least:.4g}, the run's least"
        for name, figure, most in (
            *((name, noise, MOST_NOISE) for name, noise, _ in noises),
            *exact,
            ("delta", spent.delta, plan.delta),
            ("budget", spent.epsilon_budget, plan.max_epsilon),
            ("price of the round", spent.epsilon_round, total),
            ("remainder", spent.epsilon_remaining, 0.0 if above else spent.epsilon_budget),
        ):
            if figure > most * (1 + ROUNDING):
                return f"the spending's {name} {figure:.4g} is above {most:.4g}"
        return ""

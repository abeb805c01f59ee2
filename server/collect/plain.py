"""Collect what each site sends, as it is sent: noised at the sites, or without privacy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from fedveil.common.log import about
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import Absence
from fedveil.common.words import counted
from fedveil.server.admission import Admission
from fedveil.server.aggregation import contributions, warn_of_noise
from fedveil.server.collect.base import Collected
from fedveil.server.collect.noise import Noise
from fedveil.server.last_rounds import LastRounds
from fedveil.server.members import Member
from fedveil.server.sites import Sites
from fedveil.server.spool import on_disk
from fedveil.strategies.job import Job
from fedveil.strategies.state import Contribution, ServerState

log = logging.getLogger("fedveil.server")
ASK_AGAIN = ("late", "failed")
"""Kinds of refusal that another attempt may mend; a spent budget or a task that does not fit stays what it is."""
Noised = Callable[[Job, Sequence[Contribution], Sequence[TrainResult]], tuple[tuple[Contribution, ...], Noise]]
"""From a job, what is averaged and the results to the same with each part's noise, and the average's."""


class PlainCollector:
    """Asks every online site, and averages what each has sent.

    Args:
        job: the run.
        sites: to ask.
        admission: of their results.
        last_rounds: ends a run whose sites cannot pay.
        noised: adds what is known of the noise.
    """

    def __init__(self, job: Job, sites: Sites, admission: Admission, last_rounds: LastRounds, noised: Noised) -> None:
        self._job, self._sites, self._admission, self._noised = job, sites, admission, noised
        self._keep = partial(on_disk, folder=run_folder(job.config, sites.run))
        self.ends_before = last_rounds.before
        self._ends_after = last_rounds.after

    @property
    def members(self) -> Mapping[str, Member]:
        """Every site that counted, by the mark of its node."""
        return self._admission.members

    def collect(self, round_number: int, state: ServerState) -> Collected:
        """Return the sites' contributions to a round, weighed, shortened where they are too long, and their noise."""
        got = self._gather(round_number, state)
        results = list(got.results.values())
        if results and round_number and (reason := self._ends_after(got, round_number)):
            got.ending = reason
        elif len(results) >= self._job.config.min_sites:
            if round_number == 1:
                warn_of_noise(self._job, results)
            parts = contributions(self._job, results, state, self._keep)
            got.averaged, got.noise = self._noised(self._job, parts, results)
            got.participants = tuple(result.site for result in results)
        elif round_number > 1 and got.only_budgets_failed():
            left = counted(len(results), "site") if results else "no site"
            have = "have" if len(results) > 1 else "has"
            needed = self._job.config.min_sites
            got.ending = f"{left} {have} budget left after round {round_number - 1}, {needed} needed"
        return got

    def _gather(self, round_number: int, state: ServerState) -> Collected:
        """Ask every online site for a round, and those that failed again while the round is below its quorum.

        Nodes are looked up again for every attempt, so a site that has just joined or come back
        takes part; results of earlier attempts are kept. No task is sent while too few are online to
        reach the quorum: it would spend budget on a round that cannot count. Results are enrolled
        only if the quorum is reached. What comes back is in the order of the sites' names.
        """
        config, got = self._job.config, Collected(needed=self._job.config.min_sites)
        for attempt in range(1, config.round_retries + 2):
            got.attempts = attempt
            wanted, settled = config.min_sites - len(got.results), _settled(got)
            nodes = self._sites.transport.nodes(wanted, settled)
            if len(nodes) < wanted:
                message = f"{counted(len(nodes), 'site')} could be asked, {wanted} more are needed for min-sites"
                self._sites.note(got, Absence(round_number, attempt, "", "quorum", message))
                continue
            self._attempt(got, nodes, round_number, state)
            if len(got.results) >= config.min_sites:
                self._admission.enrol(got.results)
                break
            if set(got.refusals) <= _settled(got):
                break
            log.warning("below quorum in attempt %d", attempt, extra=about(self._sites.run, round_number))
        return got.in_order()

    def _attempt(self, got: Collected, nodes: Collection[int], round_number: int, state: ServerState) -> None:
        online = {*nodes, *_settled(got)}
        exchange = self._sites.ask(nodes, round_number, state)
        got.bytes_down += exchange.bytes_down
        got.bytes_up += exchange.bytes_up
        refusals: dict[int, tuple[str, str, str]] = {}
        for node, reply in sorted(exchange.replies.items()):
            if isinstance(reply, Refusal):
                refusals[node] = (reply.site, reply.kind, reply.reason)
            elif isinstance(reply, TrainResult):
                got.results[node] = reply
        reasons, untrue = self._admission.judge(got.results, state, online), set[int]()
        if reasons:
            untrue = set(self._admission.contradictions(got.results, online))
        got.pay(got.results[node] for node in reasons if node not in untrue)
        for node, reason in reasons.items():
            refusals[node] = (got.results.pop(node).site, "reply", reason)
        self._sites.absent(got, round_number, refusals, online)


def _settled(got: Collected) -> set[int]:
    """Return the nodes that it is no use to ask again in this round."""
    return {*got.results, *(node for node, absence in got.refusals.items() if absence.kind not in ASK_AGAIN)}

"""Collect one sum of all sites, of which the server sees no part.

A site's key for the next round comes with its vector, so that a round costs no further message; a site that has sent
none gets a request first.

An attempt in which one vector is missing, or one reply does not count, is thrown away. The next one has new keys, new
noise and a new charge at every site. A site that is gone for good ends nothing as long as those that are left make a
sum: its noise, and so its price, is that of ``privacy.honest-sites``, however many there are.

What the server could hold against single updates it holds against the sum: no site is bounded any more, and one that
poisons is not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fedveil.common.errors import ConfigError
from fedveil.common.log import about
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, TrainResult
from fedveil.common.run_lines import Absence
from fedveil.privacy.secure_sum import KeyOffer, check_headroom, least_sites, may_be_lost
from fedveil.privacy.secure_sum.masks import Words
from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collected
from fedveil.server.collect.masked_sum import other_releases, summed_contribution, words_of
from fedveil.server.last_rounds import LastRounds
from fedveil.server.members import Member
from fedveil.server.noise import SumNoise
from fedveil.server.registered import misnamed
from fedveil.server.sites import Sites
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")
UNFIT = ("budget", "policy")
"""Kinds of refusal of a site that is asked no more in the run: each attempt without it would cost the others."""


class MaskedCollector:
    """Asks sites for one sum, and throws an attempt away that lacks a vector.

    Args:
        job: the run.
        sites: to ask.
        admission: of their results.
        last_rounds: ends a run whose sites cannot pay.
        layout: returns names and shapes of what a site sends in a round.
    """

    def __init__(
        self,
        job: Job,
        sites: Sites,
        admission: Admission,
        last_rounds: LastRounds,
        layout: Callable[[int, ServerState], Layout],
    ) -> None:
        self._job, self._sites, self._admission, self._layout = job, sites, admission, layout
        self.ends_before = last_rounds.before
        self._ends_after = last_rounds.after
        self._came: tuple[int, dict[int, KeyOffer]] = (0, {})
        """A round, and the keys for its first attempt, by node, that came with the vectors of the round before."""
        self._unfit: dict[int, Absence] = {}
        """By node, why it is asked no more, until the run is resumed."""
        self._sizes: dict[int, int] = {}
        """By node, the public size of its last reply that was judged sound."""
        config, privacy = job.config, job.config.privacy
        begins = least_sites(privacy.honest_sites, privacy.colluders, privacy.drop_outs)
        self._begins = max(config.min_sites + privacy.drop_outs, begins)
        """With how many sites a run begins."""
        self._last: set[int] = set()
        """The nodes of the last sum; empty before the first."""

    @property
    def members(self) -> Mapping[str, Member]:
        """Every site that counted, by the mark of its node."""
        return self._admission.members

    def collect(self, round_number: int, state: ServerState) -> Collected:
        """Return what all sites of a sum make of the model together, and the noise in it."""
        got = self._gather(round_number, state)
        results = list(got.results.values())
        if results and (reason := self._ends_after(got, round_number)):
            got.averaged, got.ending = (), reason
        elif got.averaged:
            got.noise = SumNoise(self._job, results)
            got.participants = tuple(result.site for result in results)
        elif round_number > 1 and got.only_budgets_failed():
            got.ending = f"too few sites for a sum have budget left after round {round_number - 1}"
        return got

    def _gather(self, round_number: int, state: ServerState) -> Collected:
        """Ask for keys that are not there yet, then for the vectors, until one attempt brings all.

        The sites of an attempt are those that gave a key. A run begins with as many as leave a sum, and ``min-sites``,
        when ``privacy.drop-outs`` are lost. Later rounds go on with fewer, of which fewer may be lost
        (``may_be_lost``), as long as a sum of them all counts. Else no site is charged.
        """
        config, privacy, got, unfit = self._job.config, self._job.config.privacy, Collected(), set(self._unfit)
        got.needed = config.min_sites
        got.refusals = {node: replace(absence, round_number=round_number) for node, absence in self._unfit.items()}
        least = self._begins if round_number == 1 else max(config.min_sites, privacy.honest_sites + privacy.colluders)
        for attempt in range(1, config.round_retries + 2):
            got.attempts = attempt
            offers = self._offers(got, unfit, max(least, self._waited_for(unfit)), least, round_number)
            if len(offers) < least:
                if not self._for_want_of_budget(got, offers, least):
                    what = (
                        "start the others, or lower privacy.drop-outs or privacy.honest-sites"
                        if round_number == 1
                        else "start the others, and resume the run"
                    )
                    message = f"{len(offers)} sites gave a key, {least} are needed for a sum: {what}"
                    self._sites.note(got, Absence(round_number, attempt, "", "quorum", message))
                continue
            if overfull := self._overfull(offers):
                self._sites.note(got, Absence(round_number, attempt, "", "quorum", overfull))
                break
            results = self._vectors(got, offers, round_number, state)
            unfit |= {node for node, absence in got.refusals.items() if absence.kind in UNFIT}
            if results:
                got.results, got.refusals = results, {n: r for n, r in got.refusals.items() if n not in results}
                keys = {node: result.offer for node, result in results.items() if result.offer is not None}
                self._came = round_number + 1, keys
                self._last = set(results)
                self._admission.enrol(results)
                break
        self._unfit = {node: absence for node, absence in got.refusals.items() if absence.kind in UNFIT}
        return got.in_order()

    def _waited_for(self, unfit: set[int]) -> int:
        """Return how many sites are waited for: of the last sum all but who has refused since and who may be lost.

        A site that may be lost from a sum is not waited for, for as long as ``round-timeout``, once Flower says that it
        is offline. All that are online get a request, however many are waited for, and so is who comes back.
        """
        if not self._last:
            return self._begins - len(unfit)
        config, privacy = self._job.config, self._job.config.privacy
        there = min(self._begins, len(self._last - unfit))
        terms = privacy.honest_sites, privacy.colluders, privacy.drop_outs
        return there - may_be_lost(there, *terms, config.min_sites)

    def _for_want_of_budget(self, got: Collected, offers: Mapping[int, KeyOffer], least: int) -> bool:
        """Return whether spent budgets alone explain that there is no sum: such a run ends well.

        They do not where all others that gave a key, refused otherwise or counted before would make one.
        """
        spent = {absence.site for absence in got.refusals.values() if absence.kind == "budget"}
        others = {offer.site for offer in offers.values()} | {absence.site for absence in got.refusals.values()}
        others |= {member.site for member in self._admission.members.values()}
        return bool(spent) and len(others - spent) < least

    def _overfull(self, offers: Iterable[int]) -> str:
        """Return why the sum of nodes does not fit its words, by the sizes that they have declared; empty if it does.

        Before anybody pays: else the sum would be thrown away, again in each attempt.
        """
        nodes = list(offers)
        size = sum(self._sizes.get(node, 0) for node in nodes)
        if not size:
            return ""
        plan = self._job.plan(self._job.config.total_steps, size)
        try:
            check_headroom(plan.expected_batch_size, plan.event.clip_norm, plan.noise_std, len(nodes))
        except ConfigError as error:
            return str(error)
        return ""

    def _offers(
        self, got: Collected, unfit: set[int], wanted: int, least: int, round_number: int
    ) -> dict[int, KeyOffer]:
        """Return the keys of an attempt by node, in the order of the sites' names; ``wanted`` sites are waited for.

        Where fewer than ``least`` are there, none gets a request. A key that came with the last vector is for a round's
        first attempt alone, and is used there if its node is still online; a site that has sent none gets a request.
        """
        nodes = self._sites.transport.nodes(wanted, unfit)
        if len(nodes) < least:
            return {}
        for_round, keys = self._came
        first = for_round == round_number and got.attempts == 1
        offers = {node: key for node, key in keys.items() if first and node in nodes}
        lacking = [node for node in nodes if node not in offers]
        if not lacking:
            return in_order(offers)
        task = KeyTask(self._sites.run, round_number, got.attempts - 1)
        exchange = self._sites.transport.exchange(dict.fromkeys(lacking, task), self._job.config.round_timeout)
        for node, reply in sorted(exchange.replies.items()):
            if isinstance(reply, Refusal):
                self._absent(got, round_number, node, (reply.site, reply.kind, reply.reason), nodes)
                continue
            reason = misnamed(node, reply.site, self._admission.registered())
            if not reason and reply.site in {offer.site for offer in offers.values()}:
                reason = "another node already answered under this name"
            if isinstance(reply, KeyReply) and not reason:
                offers[node] = reply.offer
            else:
                self._absent(got, round_number, node, (reply.site, "reply", reason), nodes)
        unfit |= {node for node, absence in got.refusals.items() if absence.kind in UNFIT}
        return in_order(offers)

    def _vectors(
        self, got: Collected, offers: Mapping[int, KeyOffer], round_number: int, state: ServerState
    ) -> dict[int, TrainResult]:
        """Return the results of an attempt, with what they make in ``got``; none if it is thrown away."""
        results = self._masked(got, offers, round_number, state, {})
        if len(results) < len(offers):
            self._throw_away(got, round_number, "a sum needs all its vectors")
            return {}
        return self._summed(got, results, words_of(results), round_number, state)

    def _masked(
        self,
        got: Collected,
        offers: Mapping[int, KeyOffer],
        round_number: int,
        state: ServerState,
        sealed: Mapping[int, tuple[bytes, ...]],
    ) -> dict[int, TrainResult]:
        """Return the results that count of those that are to send a vector; ``sealed`` as in ``_ask``."""
        exchange = self._sites.ask(list(offers), round_number, state, got.attempts - 1, tuple(offers.values()), sealed)
        got.bytes_down += exchange.bytes_down
        got.bytes_up += exchange.bytes_up
        results = {node: reply for node, reply in exchange.replies.items() if isinstance(reply, TrainResult)}
        for node, reply in exchange.replies.items():
            if isinstance(reply, Refusal):
                self._absent(got, round_number, node, (reply.site, reply.kind, reply.reason), offers)
        reasons = self._admission.judge(results, state, set(offers))
        misnamed = [node for node, result in results.items() if result.site != offers[node].site]
        # Also what is thrown away, or does not count, was charged and sent.
        untrue = {*self._admission.contradictions(results, set(offers)), *misnamed}
        got.pay(result for node, result in results.items() if node not in untrue)
        reasons |= other_releases(self._job, results)
        reasons |= dict.fromkeys(misnamed, "it answers under another name than its key")
        self._sizes |= {node: result.public_size for node, result in results.items() if node not in reasons}
        for node, reason in reasons.items():
            self._absent(got, round_number, node, (results[node].site, "reply", reason), offers)
        return {node: result for node, result in results.items() if node not in reasons}

    def _summed(
        self,
        got: Collected,
        results: dict[int, TrainResult],
        vectors: Iterable[Words],
        round_number: int,
        state: ServerState,
    ) -> dict[int, TrainResult]:
        """Return the results whose vectors these are, or add up to, with what they make in ``got``; else none."""
        layout = self._layout(round_number, state)
        summed = summed_contribution(self._job, results, vectors, layout, state, round_number)
        if isinstance(summed, str):
            self._sites.note(got, Absence(round_number, got.attempts, "", "quorum", summed))
            return {}
        got.averaged = (summed,)
        return results

    def _throw_away(self, got: Collected, round_number: int, why: str) -> None:
        log.warning("attempt %d is thrown away: %s", got.attempts, why, extra=about(self._sites.run, round_number))

    def _absent(
        self, got: Collected, round_number: int, node: int, refusal: tuple[str, str, str], online: Iterable[int]
    ) -> None:
        """Record that a node did not take part, by the site, kind and reason that are stated."""
        self._sites.absent(got, round_number, {node: refusal}, set(online))


def in_order(offers: Mapping[int, KeyOffer]) -> dict[int, KeyOffer]:
    """Return keys in the order of the sites' names."""
    return dict(sorted(offers.items(), key=lambda item: item[1].site))

"""The round of a secure sum: keys, then the tasks, and the sum of all or nothing.

A site's key for the next round comes with its vector, so that a round costs no further message; who has sent none is
asked first.

An attempt in which one vector is missing, or one reply does not count, is thrown away. The next one has new keys, new
noise and a new charge at every site. A site that is gone for good ends nothing as long as those that are left make a
sum: its noise, and so its price, is that of ``privacy.honest-sites``, however many there are.

What the server could hold against single updates it holds against the sum: no site is bounded any more, and one that
poisons is not seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from common.log import about
from common.messages.round import KeyReply, KeyTask, Refusal, TrainResult
from common.messages.state import HEAD, AdapterState
from common.messages.wire import Layout
from common.privacy.events import Event
from common.privacy.plan import PrivacyPlan
from common.run_lines import Absence
from common.secure_sum import KeyOffer, check_headroom, least_sites, may_be_lost, total
from common.secure_sum.masks import Words
from server.admission import ROOM, Admission
from server.model import ServerModel
from server.plausible import SLACK
from server.registered import misnamed
from server.sites import Gathering, Sites, Transport
from server.terms import paid_plan
from strategies.job import Job
from strategies.state import Contribution, ServerState

log = logging.getLogger("fedveil.server")
ALL = "the sum of all sites"
"""What the contribution of a sum is called."""
UNFIT = ("budget", "policy")
"""Kinds of refusal of a site that is asked no more in the run: each attempt without it would cost the others."""


class SummedSites(Sites):
    """Asks sites for one sum, of which it sees no part."""

    def __init__(
        self, job: Job, run: str, transport: Transport, server_model: ServerModel, admission: Admission
    ) -> None:
        super().__init__(job, run, transport, server_model, admission)
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

    def gather(self, round_number: int, state: ServerState) -> Gathering:
        """Ask for keys that are not there yet, then for the vectors, until one attempt brings all.

        The sites of an attempt are those that gave a key. A run begins with as many as leave a sum, and ``min-sites``,
        when ``privacy.drop-outs`` are lost. Later rounds go on with fewer, of which fewer may be lost
        (``may_be_lost``), as long as a sum of them all counts. Else nobody is asked for anything that costs.
        """
        config, privacy, got, unfit = self._job.config, self._job.config.privacy, Gathering(), set(self._unfit)
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
                    self._note(got, Absence(round_number, attempt, "", "quorum", message))
                continue
            if overfull := self._overfull(offers):
                self._note(got, Absence(round_number, attempt, "", "quorum", overfull))
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
        is offline. Who is online is asked, however many are waited for, and so is who comes back.
        """
        if not self._last:
            return self._begins - len(unfit)
        config, privacy = self._job.config, self._job.config.privacy
        there = min(self._begins, len(self._last - unfit))
        terms = privacy.honest_sites, privacy.colluders, privacy.drop_outs
        return there - may_be_lost(there, *terms, config.min_sites)

    def _for_want_of_budget(self, got: Gathering, offers: Mapping[int, KeyOffer], least: int) -> bool:
        """Return whether spent budgets alone explain that there is no sum: such a run ends well.

        They do not where all others that gave a key, refused otherwise or counted before would make one.
        """
        spent = {absence.site for absence in got.refusals.values() if absence.kind == "budget"}
        others = {offer.site for offer in offers.values()} | {absence.site for absence in got.refusals.values()}
        others |= {member.site for member in self._admission.members.values()}
        return bool(spent) and len(others - spent) < least

    def _overfull(self, offers: Iterable[int]) -> str:
        """Return why the sum of nodes does not fit its words, by the sizes that they have told; empty if it does.

        Before anybody pays: else the sum would be thrown away, again in each attempt.
        """
        config, nodes = self._job.config, list(offers)
        size = sum(self._sizes.get(node, 0) for node in nodes)
        if not size:
            return ""
        plan = self._job.mechanism.plan(config.privacy, config.training, config.total_steps, size)
        try:
            check_headroom(plan.expected_batch_size, plan.event.clip_norm, plan.noise_std, len(nodes))
        except ConfigError as error:
            return str(error)
        return ""

    def _offers(
        self, got: Gathering, unfit: set[int], wanted: int, least: int, round_number: int
    ) -> dict[int, KeyOffer]:
        """Return the keys of an attempt by node, in the order of the sites' names; ``wanted`` sites are waited for.

        Where fewer than ``least`` are there, none is asked. A key that came with the last vector is for a round's first
        attempt alone, and is used there if its node is still online; who has sent none is asked.
        """
        nodes = self._transport.nodes(wanted, unfit)
        if len(nodes) < least:
            return {}
        for_round, keys = self._came
        first = for_round == round_number and got.attempts == 1
        offers = {node: key for node, key in keys.items() if first and node in nodes}
        lacking = [node for node in nodes if node not in offers]
        if not lacking:
            return in_order(offers)
        task = KeyTask(self._run, round_number, got.attempts - 1)
        exchange = self._transport.exchange(dict.fromkeys(lacking, task), self._job.config.round_timeout)
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
        self, got: Gathering, offers: Mapping[int, KeyOffer], round_number: int, state: ServerState
    ) -> dict[int, TrainResult]:
        """Return the results of an attempt, with what they make in ``got``; none if it is thrown away."""
        results = self._masked(got, offers, round_number, state, {})
        if len(results) < len(offers):
            self._throw_away(got, round_number, "a sum needs all its vectors")
            return {}
        return self._summed(got, results, words_of(results), round_number, state)

    def _masked(
        self,
        got: Gathering,
        offers: Mapping[int, KeyOffer],
        round_number: int,
        state: ServerState,
        sealed: Mapping[int, tuple[bytes, ...]],
    ) -> dict[int, TrainResult]:
        """Return the results that count of those that are asked for a vector; ``sealed`` as in ``_ask``."""
        exchange = self._ask(list(offers), round_number, state, got.attempts - 1, tuple(offers.values()), sealed)
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
        reasons |= _others(self._job, results) | dict.fromkeys(misnamed, "it answers under another name than its key")
        self._sizes |= {node: result.public_size for node, result in results.items() if node not in reasons}
        for node, reason in reasons.items():
            self._absent(got, round_number, node, (results[node].site, "reply", reason), offers)
        return {node: result for node, result in results.items() if node not in reasons}

    def _summed(
        self,
        got: Gathering,
        results: dict[int, TrainResult],
        vectors: Iterable[Words],
        round_number: int,
        state: ServerState,
    ) -> dict[int, TrainResult]:
        """Return the results whose vectors these are, or add up to, with what they make in ``got``; else none."""
        summed = summed_contribution(self._job, results, vectors, self._layout(round_number), state, round_number)
        if isinstance(summed, str):
            self._note(got, Absence(round_number, got.attempts, "", "quorum", summed))
            return {}
        got.summed = (summed,)
        return results

    def _throw_away(self, got: Gathering, round_number: int, why: str) -> None:
        log.warning("attempt %d is thrown away: %s", got.attempts, why, extra=about(self._run, round_number))

    def _absent(
        self, got: Gathering, round_number: int, node: int, told: tuple[str, str, str], online: Iterable[int]
    ) -> None:
        """Write down that a node did not take part, by the site, kind and reason that were told."""
        site, kind, reason = told
        name = self._name(node, site, got, set(online))
        absence = Absence(round_number, got.attempts, name, kind, reason)
        got.refusals[node] = absence
        self._note(got, absence)


def in_order(offers: Mapping[int, KeyOffer]) -> dict[int, KeyOffer]:
    """Return keys in the order of the sites' names."""
    return dict(sorted(offers.items(), key=lambda item: item[1].site))


def words_of(results: Mapping[int, TrainResult]) -> Iterable[Words]:
    """Yield the vectors of results."""
    return (np.frombuffer(result.words, dtype="<u4").astype(np.uint32) for result in results.values())


def _others(job: Job, results: Mapping[int, TrainResult]) -> dict[int, str]:
    """Return the nodes that were charged for another release than the run's, or the others: masks would not cancel."""
    told = {node: result.spending.event for node, result in results.items() if result.spending}
    fitting = [event for node, event in told.items() if _is_run_s(job, event, results[node].public_size)]
    usual = max(fitting, key=fitting.count) if fitting else None
    return {
        node: "the spending's release is another than the run's, and all sites of a sum pay for the same"
        for node in results
        if usual is None or told.get(node) != usual
    }


def _is_run_s(job: Job, told: Event, public_size: int) -> bool:
    """Return whether an event is the run's, up to what two versions of an accountant make of the noise."""
    config = job.config
    own = job.mechanism.plan(config.privacy, config.training, config.total_steps, public_size).event
    noise = own.noise_multiplier
    return abs(told.noise_multiplier - noise) <= ROOM * noise and told.having(noise_multiplier=noise) == own


def summed_contribution(
    job: Job,
    results: Mapping[int, TrainResult],
    vectors: Iterable[Words],
    layout: Layout,
    state: ServerState,
    round_number: int,
) -> Contribution | str:
    """Return what all sites of an attempt make of the model, as one site with all records would; or why nothing.

    Args:
        job: the run.
        results: of all sites of the sum.
        vectors: what they have sent, or what that adds up to.
        layout: names and shapes of what is summed.
        state: what the sites started from.
        round_number: of the round.
    """
    config, sizes = job.config, sum(result.public_size for result in results.values())
    plan = paid_plan(job, next(iter(results.values())))
    event = next(result.spending.event for result in results.values() if result.spending)
    own = type(plan)(event, event.sample_rate * sizes, plan.delta, plan.max_epsilon)
    try:
        check_headroom(own.expected_batch_size, event.clip_norm, own.noise_std, len(results))
    except ConfigError as error:
        return str(error)
    summed = total(vectors, own.noise_std)
    longest = longest_sum(own, len(results), summed.numel())
    if not float(summed.norm()) <= longest:
        return (
            f"the sum's length {float(summed.norm()):.3g} is above {longest:.3g}, the most that the settings allow: a "
            "site sent what is no vector of it, or the sites were told different things"
        )
    gradient, training = _shaped(summed / own.expected_batch_size, layout), config.training
    rate = config.site_rate(round_number, 0)
    # What rests in this round is no part of the sum, and stays.
    moved = {
        layer: {name: held for name, held in factors.items() if state.trains(layer, name)}
        for layer, factors in state.adapter.items()
    }
    moved = {layer: factors for layer, factors in moved.items() if factors}
    for layer, factors in gradient.items():
        own_rate = rate * (training.head_rate if layer == HEAD else 1.0)
        held = state.adapter[layer]
        moved[layer] = {name: (held[name].double() - own_rate * tensor).float() for name, tensor in factors.items()}
    return Contribution(ALL, sizes, moved)


def longest_sum(plan: PrivacyPlan, sites: int, numbers: int) -> float:
    """Return how long a sum may be, before the divisor: all clips in one direction, and all sites' noise, with slack.

    Args:
        plan: of one site with the records of all.
        sites: of the sum.
        numbers: that are summed.
    """
    return SLACK * (plan.event.clip_norm * plan.expected_batch_size + plan.noise_std * math.sqrt(sites * numbers))


def _shaped(numbers: Tensor, layout: Layout) -> AdapterState:
    """Return a vector as tensors, in the canonical order of layers and factors."""
    places = [(layer, name, layout[layer][name]) for layer in sorted(layout) for name in sorted(layout[layer])]
    sizes = [math.prod(shape) for _, _, shape in places]
    state: AdapterState = {}
    for (layer, name, shape), part in zip(places, torch.split(numbers, sizes), strict=True):
        state.setdefault(layer, {})[name] = part.view(shape)
    return state

"""Collect one sum that sites may be lost from: shares, vectors, one signed list, and revealed shares.

As long as no more than ``privacy.drop-outs`` are lost, the others have their sum and pay once. A site may be lost
before its shares, before its vector, or after it; then it is in the sum. What it was charged by then stays. Where sites
are gone for good, fewer of those that are left may be lost, by their number alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypeVar

from fedveil.common.errors import ProtocolError
from fedveil.common.log import about
from fedveil.common.messages.round import (
    Refusal,
    ShareReply,
    ShareTask,
    SumReply,
    SumTask,
    SurvivorReply,
    SurvivorTask,
    TrainResult,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.run_lines import Absence
from fedveil.privacy.secure_sum import KeyOffer, are_shares, may_be_lost, threshold, unmasked
from fedveil.server.collect.base import Collected
from fedveil.server.collect.masked import MaskedCollector, in_order
from fedveil.server.collect.masked_sum import words_of
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")
Told = TypeVar("Told", bound=SumReply)


class RecoveringCollector(MaskedCollector):
    """Asks sites for one sum, of which some may be missing."""

    def _vectors(
        self, got: Collected, offers: Mapping[int, KeyOffer], round_number: int, state: ServerState
    ) -> dict[int, TrainResult]:
        """Return the results of those in an attempt's sum, with what they make in ``got``; none if there is no sum.

        Args:
            got: what came of the round so far.
            offers: keys to seal shares with, by node.
            round_number: of the round.
            state: what the sites start from.
        """
        config, privacy = self._job.config, self._job.config.privacy
        where, holders = (self._sites.run, round_number, got.attempts - 1), [offer.site for offer in offers.values()]
        self._warn_of_fewer(len(holders), round_number)
        needed = threshold(len(holders), privacy.colluders)
        least = max(config.min_sites, privacy.honest_sites + privacy.colluders, needed)
        shared = self._told(got, ShareTask(*where, tuple(offers.values())), offers, ShareReply)
        shared = self._whole(got, shared, len(holders), offers, round_number)
        if not self._enough(got, round_number, shared, least, "have shared the secrets of their masks"):
            return {}
        masks = in_order({node: reply.sharing.offer for node, reply in shared.items()})
        sealed = {
            node: tuple(shared[other].sharing.sealed[holders.index(offer.site)] for other in masks)
            for node, offer in masks.items()
        }
        results = self._masked(got, masks, round_number, state, sealed)
        if not self._enough(got, round_number, results, least, "have sent a vector that counts"):
            return {}
        usual, agreed = self._agreed(got, where, results)
        if not self._enough(got, round_number, agreed, needed, "have signed for one sum of the survivors"):
            return {}
        signatures = tuple((reply.site, reply.agreement.signature) for reply in agreed.values())
        replies = self._telling(got, UnmaskTask(*where, signatures), agreed, len(masks))
        if not self._enough(got, round_number, replies, needed, "have told their shares"):
            return {}
        vectors = dict(zip((result.site for result in results.values()), words_of(results), strict=True))
        keys = {offer.site: offer.public for offer in masks.values()}
        try:
            shares = {results[node].site: reply.shares for node, reply in replies.items()}
            total = unmasked(vectors, keys, holders, privacy.colluders, usual, shares)
        except ProtocolError as error:
            self._sites.note(got, Absence(round_number, got.attempts, "", "quorum", str(error)))
            return {}
        return self._summed(got, results, [total], round_number, state)

    def _agreed(
        self, got: Collected, where: tuple[str, int, int], results: Mapping[int, TrainResult]
    ) -> tuple[bytes, dict[int, SurvivorReply]]:
        """Return the digest of survivors that most sites signed for, and the replies of those."""
        survivors = tuple(sorted(result.site for result in results.values()))
        signed = self._told(got, SurvivorTask(*where, survivors), results, SurvivorReply)
        digests = Counter(reply.agreement.digest for reply in signed.values())
        usual = max(digests, key=lambda digest: digests[digest], default=b"")
        agreed = {node: reply for node, reply in signed.items() if reply.agreement.digest == usual}
        return usual, {node: reply for node, reply in agreed.items() if reply.site == results[node].site}

    def _warn_of_fewer(self, sites: int, round_number: int) -> None:
        """Log that fewer sites may be lost than the run was set up for."""
        config, privacy = self._job.config, self._job.config.privacy
        terms = privacy.honest_sites, privacy.colluders, privacy.drop_outs
        if (few := may_be_lost(sites, *terms, config.min_sites)) < privacy.drop_outs:
            line = "%d sites are left, of which %d may be lost, and privacy.drop-outs is %d"
            log.warning(line, sites, few, privacy.drop_outs, extra=about(self._sites.run, round_number))

    def _told(self, got: Collected, task: SumTask, nodes: Collection[int], kind: type[Told]) -> dict[int, Told]:
        """Return what nodes answer to one task, in the order of the nodes; who does not is written down."""
        exchange = self._sites.transport.exchange(dict.fromkeys(nodes, task), self._job.config.round_timeout)
        replies: dict[int, Told] = {}
        for node in nodes:
            reply = exchange.replies[node]
            if isinstance(reply, kind):
                replies[node] = reply
            elif isinstance(reply, Refusal):
                self._absent(got, task.round_number, node, (reply.site, reply.kind, reply.reason), nodes)
        return replies

    def _telling(self, got: Collected, task: UnmaskTask, nodes: Collection[int], sites: int) -> dict[int, UnmaskReply]:
        """Return the answers that have a share of each of the sum's ``sites``; the others are written down."""
        telling = {}
        for node, reply in self._told(got, task, nodes, UnmaskReply).items():
            if are_shares(reply.shares, sites):
                telling[node] = reply
            else:
                reason = "what it told is not one share of each site of the sum"
                self._absent(got, task.round_number, node, (reply.site, "reply", reason), nodes)
        return telling

    def _whole(
        self,
        got: Collected,
        shared: Mapping[int, ShareReply],
        holders: int,
        offers: Mapping[int, KeyOffer],
        round_number: int,
    ) -> dict[int, ShareReply]:
        """Return the replies that have a share for each holder, under the name of the node's key."""
        whole = {}
        for node, reply in shared.items():
            if reply.site == offers[node].site and len(reply.sharing.sealed) == holders:
                whole[node] = reply
            else:
                reason = "it shares with others than the sites that gave a key, or under another name"
                self._absent(got, round_number, node, (reply.site, "reply", reason), offers)
        return whole

    def _enough(self, got: Collected, round_number: int, sites: Collection[int], least: int, what: str) -> bool:
        if len(sites) >= least:
            return True
        message = f"{len(sites)} sites {what}, {least} are needed"
        self._sites.note(got, Absence(round_number, got.attempts, "", "quorum", message))
        self._throw_away(got, round_number, message)
        return False

"""Asking the sites for one round: attempts, deadline, quorum, and what came of each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.log import about
from common.messages.round import Refusal, Reply, Spending, SumReply, Task, TrainResult, TrainTask
from common.messages.state import below_head, of_head
from common.messages.tensors import fingerprint
from common.run_lines import Absence
from common.secure_sum import KeyOffer
from common.words import counted
from server.admission import Admission
from server.model import ServerModel
from strategies.job import Job
from strategies.state import Contribution, ServerState

log = logging.getLogger("fedveil.server")
ASK_AGAIN = ("late", "failed")
"""Kinds of refusal that another attempt may mend; a spent budget or a task that does not fit stays what it is."""


@dataclass(frozen=True)
class Exchange:
    """What came of sending tasks once."""

    replies: Mapping[int, Reply | SumReply]
    """By node; every node that was asked is in it. One that did not answer in time is ``late``."""
    bytes_down: int
    """Adapter payload of all tasks as encoded."""
    bytes_up: int
    """Adapter payload of all replies as encoded."""


class Transport(Protocol):
    """How tasks reach sites: Flower in earnest, plain calls in a test."""

    def nodes(self, wanted: int, besides: Collection[int]) -> list[int]:
        """Return the nodes online other than ``besides``; waits for ``wanted`` of them up to the round's time-out."""

    def registered(self) -> Mapping[int, str] | None:
        """Return the name that each node's key is registered under; None where no names are registered."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Send one task per node and collect what comes back within ``timeout`` seconds; nothing later counts."""


@dataclass
class Gathering:
    """What all attempts at a round brought."""

    results: dict[int, TrainResult] = field(default_factory=dict)
    """By node; these count."""
    refusals: dict[int, Absence] = field(default_factory=dict)
    """By node, the last word of each that was asked and has no result."""
    paid: list[TrainResult] = field(default_factory=list)
    """What was paid for in every attempt, without what it held, in order; also what does not count, and what does."""
    failures: list[Absence] = field(default_factory=list)
    """Everything that went wrong, also where a later attempt mended it."""
    attempts: int = 0
    bytes_down: int = 0
    """Adapter payload of all tasks and, up, of all replies."""
    bytes_up: int = 0
    summed: tuple[Contribution, ...] = ()
    """In place of what each site sent, where nobody sees that: what all of them together make."""
    released: Spending | None = None
    """Of a trusted server: what the round cost its ledger. Then ``summed`` is noised, and there are no results."""
    spent: str = ""
    """Of a trusted server: why its ledger does not pay for the round."""

    def counts(self, least: int) -> bool:
        """Return whether the round counts, with at least so many results; a trusted server's does whatever came."""
        return self.released is not None or len(self.results) >= least

    def settled(self) -> set[int]:
        """Return the nodes that it is no use to ask again in this round."""
        return {*self.results, *(node for node, r in self.refusals.items() if r.kind not in ASK_AGAIN)}

    def pay(self, results: Iterable[TrainResult]) -> None:
        """Remember what results cost their sites, whatever becomes of them."""
        self.paid += [replace(one, contribution={}, words=b"", offer=None) for one in results if one.spending]

    def in_order(self) -> Gathering:
        """Return the same, results and refusals in the order of the sites' names."""
        results = dict(sorted(self.results.items(), key=lambda item: item[1].site))
        return replace(self, results=results, refusals=dict(sorted(self.refusals.items(), key=lambda i: i[1].site)))


class Sites:
    """Asks sites, and remembers which of them already have what is sent once."""

    def __init__(
        self, job: Job, run: str, transport: Transport, server_model: ServerModel, admission: Admission
    ) -> None:
        self._job, self._run, self._transport, self._admission = job, run, transport, admission
        self._layout = server_model.reply_layout
        self._base = server_model.model.base.fingerprint
        self._start = job.start_fingerprint(server_model.start)
        self._informed: set[int] = set()
        """Nodes that have what is sent once."""
        self._mark = self._head_mark = ""
        """The fingerprints of all of that, and of what of it is of the head."""
        self._partly: set[int] = set()
        """Nodes that have of it what is of the head alone."""

    def gather(self, round_number: int, state: ServerState) -> Gathering:
        """Ask every online site for a round, and those that failed again while the round is below its quorum.

        Nodes are looked up anew for every attempt, so a site that has just joined or come back is
        asked; results of earlier attempts are kept. No site is asked while too few are online to
        reach the quorum: it would spend budget on a round that cannot count. Results are enrolled
        only if the quorum is reached. What comes back is in the order of the sites' names.
        """
        config, got = self._job.config, Gathering()
        for attempt in range(1, config.round_retries + 2):
            got.attempts = attempt
            wanted, settled = config.min_sites - len(got.results), got.settled()
            nodes = self._transport.nodes(wanted, settled)
            if len(nodes) < wanted:
                message = f"{counted(len(nodes), 'site')} could be asked, {wanted} more are needed for min-sites"
                self._note(got, Absence(round_number, attempt, "", "quorum", message))
                continue
            self._attempt(got, nodes, round_number, state)
            if len(got.results) >= config.min_sites:
                self._admission.enrol(got.results)
                break
            if set(got.refusals) <= got.settled():
                break
            log.warning("below quorum in attempt %d", attempt, extra=about(self._run, round_number))
        return got.in_order()

    def _attempt(self, got: Gathering, nodes: Collection[int], round_number: int, state: ServerState) -> None:
        online = {*nodes, *got.settled()}
        exchange = self._ask(nodes, round_number, state)
        got.bytes_down += exchange.bytes_down
        got.bytes_up += exchange.bytes_up
        told: dict[int, tuple[str, str, str]] = {}
        for node, reply in sorted(exchange.replies.items()):
            if isinstance(reply, Refusal):
                told[node] = (reply.site, reply.kind, reply.reason)
            elif isinstance(reply, TrainResult):
                got.results[node] = reply
        reasons, untrue = self._admission.judge(got.results, state, online), set[int]()
        if reasons:
            untrue = set(self._admission.contradictions(got.results, online))
        got.pay(got.results[node] for node in reasons if node not in untrue)
        for node, reason in reasons.items():
            told[node] = (got.results.pop(node).site, "reply", reason)
        absent = {
            node: Absence(round_number, got.attempts, self._name(node, site, got, online), kind, reason)
            for node, (site, kind, reason) in told.items()
        }
        got.refusals = {n: a for n, a in {**got.refusals, **absent}.items() if n not in got.results}
        for absence in sorted(absent.values(), key=lambda absence: absence.site):
            self._note(got, absence)

    def _name(self, node: int, told: str, got: Gathering, online: Collection[int]) -> str:
        """Return what a node that did not take part is called: as registered, or else as it counted before.

        It is never called by another's name.
        """
        names = self._admission.registered()
        if names is not None:
            return names.get(node, self._admission.mark(node))
        member = self._admission.members.get(self._admission.mark(node))
        name = member.site if member else told
        taken = {result.site for result in got.results.values()}
        if name in taken or self._admission.owner(name, online) not in (None, node):
            return self._admission.mark(node)
        return name

    def _note(self, got: Gathering, absence: Absence) -> None:
        got.failures.append(absence)
        where = about(self._run, absence.round_number, absence.site)
        log.warning("%s: %s", absence.kind, absence.reason, extra=where)

    def _ask(
        self,
        nodes: Iterable[int],
        round_number: int,
        state: ServerState,
        attempt: int = 0,
        offers: tuple[KeyOffer, ...] = (),
        sealed: Mapping[int, tuple[bytes, ...]] | None = None,
    ) -> Exchange:
        """Send every node its task; a site that lost what is sent once gets it within the attempt.

        ``sealed``: by node, what goes to it alone.
        """
        first = self._exchange(nodes, round_number, state, attempt, offers, sealed or {})
        lacking = [n for n, r in first.replies.items() if isinstance(r, Refusal) and r.kind == "basis"]
        if not lacking:
            return first
        self._informed -= set(lacking)
        self._partly -= set(lacking)
        second = self._exchange(lacking, round_number, state, attempt, offers, sealed or {})
        return Exchange(
            {**first.replies, **second.replies},
            first.bytes_down + second.bytes_down,
            first.bytes_up + second.bytes_up,
        )

    def _exchange(
        self,
        nodes: Iterable[int],
        round_number: int,
        state: ServerState,
        attempt: int,
        offers: tuple[KeyOffer, ...],
        sealed: Mapping[int, tuple[bytes, ...]],
    ) -> Exchange:
        strategy = self._job.strategy
        basis = self._job.due(state, round_number) if round_number else {}
        mark = fingerprint(basis) if basis else ""
        if mark != self._mark:  # as after ``training.head-first``
            head_mark = fingerprint(of_head(basis))
            self._partly = self._informed if head_mark == self._head_mark else set()
            self._informed, self._mark, self._head_mark = set(), mark, head_mark
        rest = below_head(basis)
        tasks = {
            node: TrainTask(
                run=self._run,
                round_number=round_number,
                state=strategy.downlink(state) if round_number else {},
                basis={} if node in self._informed else rest if node in self._partly else basis,
                basis_fingerprint=mark,
                base_fingerprint=self._base,
                start_fingerprint=self._start,
                attempt=attempt,
                offers=offers,
                sealed=sealed.get(node, ()),
            )
            for node in nodes
        }
        exchange = self._transport.exchange(tasks, self._job.config.round_timeout)
        if round_number:
            self._informed |= {n for n, reply in exchange.replies.items() if isinstance(reply, TrainResult)}
        return exchange

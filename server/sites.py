"""Send sites their tasks, and say which of them did not take part."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from fedveil.common.log import about
from fedveil.common.messages.blocks import rounded
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.formats import FLOAT32
from fedveil.common.messages.named import digests
from fedveil.common.messages.round import Refusal, Reply, SumReply, Task, TrainResult, TrainTask
from fedveil.common.messages.state import BASIS, STATE, Place
from fedveil.common.messages.tensors import add, fingerprint
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import Absence
from fedveil.privacy.secure_sum import KeyOffer
from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collected
from fedveil.server.model import ServerModel
from fedveil.server.plausible import held_by
from fedveil.server.spool import on_disk
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState

log = logging.getLogger("fedveil.server")


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

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        """Return the nodes online other than ``besides``; waits for ``wanted`` of them up to the round's time-out."""

    def registered(self) -> Mapping[int, str] | None:
        """Return the name that each node's key is registered under; None where no names are registered."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Send one task per node and collect what comes back within ``timeout`` seconds; nothing later counts."""


class Sites:
    """Sends every site its task, and remembers which tensors each has: they are named, and not sent again."""

    def __init__(
        self, job: Job, run: str, transport: Transport, server_model: ServerModel, admission: Admission
    ) -> None:
        self._job, self.run, self.transport, self._admission = job, run, transport, admission
        self.base = server_model.model.base.fingerprint
        self.start = job.start_fingerprint(server_model.start)
        self._trained = server_model.trained_start()
        self._acknowledged: dict[int, Mapping[Place, bytes]] = {}
        """By node, the hashes of the tensors that it has acknowledged with its last result."""

    def absent(
        self,
        got: Collected,
        round_number: int,
        refusals: Mapping[int, tuple[str, str, str]],
        online: Collection[int],
    ) -> None:
        """Record that nodes did not take part.

        Args:
            got: what came of the round so far.
            round_number: of the round.
            refusals: the site, the kind and the reason of each, as the node or the server states them, by node.
            online: the nodes that are online, whether or not they answered.
        """
        absences = {
            node: Absence(round_number, got.attempts, self._name(node, site, got, online), kind, reason)
            for node, (site, kind, reason) in refusals.items()
        }
        got.refusals = {n: a for n, a in {**got.refusals, **absences}.items() if n not in got.results}
        for absence in sorted(absences.values(), key=lambda absence: absence.site):
            self.note(got, absence)

    def note(self, got: Collected, absence: Absence) -> None:
        """Record and log one thing that went wrong."""
        got.failures.append(absence)
        where = about(self.run, absence.round_number, absence.site)
        log.warning("%s: %s", absence.kind, absence.reason, extra=where)

    def _name(self, node: int, site: str, got: Collected, online: Collection[int]) -> str:
        """Return what a node that did not take part is called: as registered, or else as it counted before.

        It is never called by another's name.
        """
        names = self._admission.registered()
        if names is not None:
            return names.get(node, self._admission.mark(node))
        member = self._admission.members.get(self._admission.mark(node))
        name = member.site if member else site
        taken = {result.site for result in got.results.values()}
        if name in taken or self._admission.owner(name, online) not in (None, node):
            return self._admission.mark(node)
        return name

    def ask(
        self,
        nodes: Iterable[int],
        round_number: int,
        state: ServerState,
        attempt: int = 0,
        offers: tuple[KeyOffer, ...] = (),
        sealed: Mapping[int, tuple[bytes, ...]] | None = None,
    ) -> Exchange:
        """Send every node its task; a site that lost tensors gets all of them within the attempt.

        ``sealed``: by node, what goes to it alone.
        """
        first = self._exchange(nodes, round_number, state, attempt, offers, sealed or {})
        lacking = [n for n, r in first.replies.items() if isinstance(r, Refusal) and r.kind == "tensors"]
        if not lacking:
            return first
        for node in lacking:
            self._acknowledged.pop(node, None)
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
        precision = self._job.config.wire.precision
        down = rounded(self._job.strategy.downlink(state), precision) if round_number else {}
        basis = rounded(self._job.brought(state, round_number), precision)
        known = digests({STATE: down, BASIS: basis})
        mark = fingerprint(basis) if basis else ""
        tasks = {
            node: TrainTask(
                run=self.run,
                round_number=round_number,
                state=down,
                basis=basis,
                basis_fingerprint=mark,
                base_fingerprint=self.base,
                start_fingerprint=self.start,
                attempt=attempt,
                offers=offers,
                sealed=sealed.get(node, ()),
                named=dict(self._acknowledged.get(node, {}).items() & known.items()),
                precision=precision,
            )
            for node in nodes
        }
        exchange = self.transport.exchange(tasks, self._job.config.round_timeout)
        if not round_number:
            return exchange
        lasting = digests(self._job.lasting(round_number, down, basis))
        self._acknowledged |= {n: lasting for n, r in exchange.replies.items() if isinstance(r, TrainResult)}
        return replace(exchange, replies={n: self._whole(reply, state) for n, reply in exchange.replies.items()})

    def _whole(self, reply: Reply | SumReply, state: ServerState) -> Reply | SumReply:
        """Return a reply with the trained tensors from which the server's own state is as far as the site moved.

        In another format than float32 a site sends how far it moved from what it received. The layers that its round
        does not train no site sends.
        """
        if not isinstance(reply, TrainResult) or reply.words:
            return reply
        if reply.precision != FLOAT32:
            before = held_by(self._job, reply, state)
            own = {layer: {n: before[layer][n] for n in factors} for layer, factors in reply.contribution.items()}
            moved = add(own, reply.contribution)
            reply = replace(reply, contribution=on_disk(moved, run_folder(self._job.config, self.run)))
        moving = self._job.sent(state.round_number + 1, self._trained)
        if len(moving) == len(self._trained):
            return reply
        resting = {
            layer: {name: state.adapter[layer][name] for name in factors}
            for layer, factors in self._trained.items()
            if layer not in moving
        }
        return replace(
            reply, contribution=reply.contribution | narrowed(resting, self._job.trained_columns(state, reply.rank))
        )

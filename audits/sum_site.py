"""One deployed site among others of its roster, asked by hand for vectors of secure sums."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from audits.tiny_site import OneSite
from fedveil.client.app import answer
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, TrainResult, TrainTask
from fedveil.common.messages.wire import encode_task
from fedveil.privacy.secure_sum import AttemptName, Identity, Roster, SiteAttempt

JOINING: dict[str, Any] = {
    "mechanisms": ["dp-sgd", "secure-sum"],
    "honest_sites": 3,
    "epsilon_alone": 100.0,
    "peers": "peers.toml",
}
"""A policy's keys that let a site into secure sums, beside plain runs, with the roster's hash."""


@dataclass
class SumSite:
    """A site called ``clinic``, others, and a server that asks it whatever a test wants."""

    site: OneSite
    names: tuple[str, ...] = ("north", "south")
    """Of the others."""
    peers: dict[str, Identity] = field(default_factory=dict)
    others: dict[str, SiteAttempt] = field(default_factory=dict)
    """The other sites' parts in the attempt that was asked for last."""

    def __post_init__(self) -> None:
        folder, own = self.site.ledger.parent, Identity.new()
        (folder / "identity.key").write_bytes(own.pem())
        self.peers = {name: Identity.new() for name in self.names}
        self.roster = Roster({"clinic": own.public, **{name: peer.public for name, peer in self.peers.items()}})
        (folder / "peers.toml").write_text(self.roster.text(), encoding="utf-8")
        self.site.node["identity"] = str(folder / "identity.key")
        self.rule()

    def rule(self, **rules: Any) -> None:
        """Write the policy of a steward who lets the site join with this roster; rules as in ``OneSite.rule``."""
        self.site.rule(**{**JOINING, "peers_hash": self.roster.digest, **rules})

    def key(self, number: int = 1, attempt: int = 0, run: str = "1") -> Any:
        """Ask for a key and return the answer."""
        task = KeyTask(run, number, attempt)
        return answer(encode_task(task), self.site.node, self.site.settings, run, self.site.memory)

    def task(self, number: int = 1, attempt: int = 0, run: str = "1") -> TrainTask:
        """Return the task of an attempt, once all sites have given their keys."""
        reply = self.key(number, attempt, run)
        assert isinstance(reply, KeyReply), f"the site gives no key: {reply}"
        name = AttemptName(run, number, attempt, self.roster.digest)
        self.others = {site: SiteAttempt(name, site, identity) for site, identity in self.peers.items()}
        offers = [reply.offer, *(other.offer for other in self.others.values())]
        ordered = tuple(sorted(offers, key=lambda offer: offer.site))
        return replace(self.site.task(number, run), attempt=attempt, offers=ordered)

    def train(self, number: int = 1, run: str = "1") -> TrainResult:
        """Ask for a vector that must come."""
        reply = self.site.ask(self.task(number, run=run))
        assert isinstance(reply, TrainResult), f"the site refuses: {reply}"
        return reply

    def refuse(self, task: TrainTask, words: str) -> None:
        """Ask for a vector that must be refused in such words, with nothing charged."""
        before = self.site.charges()
        reply = self.site.ask(task)
        assert isinstance(reply, Refusal), "the site took part"
        assert words in reply.reason, reply.reason
        assert self.site.charges() == before, "a refused round was charged"

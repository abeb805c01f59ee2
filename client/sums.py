"""A site's part in secure sums: who it is, whom it takes for its peers, its key of an attempt, its masks, its shares.

The key is made with the reply of the round before, or when the server asks for it, and kept in the node's memory until
the task comes; the ledger writes down under which key a vector was charged, so that a second one never leaves under its
masks, whatever is lost or repeated. Where sites may be lost from a sum, the shares of all its sites are kept from the
vector until they are told; what was sealed for a node that lost its memory is lost with it, as the node would be. Which
survivors were signed for is written down in the ledger, too, before the signature leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedveil.client.pins import refusal
from fedveil.client.policy import Policy
from fedveil.common.config.sections import Scalar
from fedveil.common.errors import ConfigError, PolicyRefusal, ProtocolError
from fedveil.common.files import expanded
from fedveil.common.messages.round import (
    KeyReply,
    KeyTask,
    ShareReply,
    ShareTask,
    SumReply,
    SumTask,
    SurvivorReply,
    SurvivorTask,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.wire import encode_state, layout_digest, layout_of
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy.secure_sum import (
    AttemptName,
    Holder,
    Identity,
    KeyOffer,
    RecoverableAttempt,
    Roster,
    SiteAttempt,
    Task,
    Terms,
    may_be_lost,
)
from fedveil.privacy.secure_sum.masks import Words
from fedveil.privacy.secure_sum.roster import load_roster
from fedveil.strategies.job import Job

KEPT, HELD = "mask-key", "mask-shares"
"""Keys of a node's memory: what is secret of the next vector's masks, and what this site holds of the last one's."""


@dataclass(frozen=True)
class Party:
    """A site among those of a roster."""

    site: str
    identity: Identity
    roster: Roster
    honest: int
    """Sites of the roster that the steward takes for honest, at least."""

    def check_size(self, sites: int, honest: int) -> None:
        """Raise PolicyRefusal unless so many sites of a sum have so many honest ones, whichever of the roster they are.

        The server chooses them, and would choose those that need not be honest first.
        """
        others = len(self.roster.keys) - self.honest
        if sites - others < honest:
            raise refusal(
                "honest-sites",
                f"{self.honest} of the roster's {len(self.roster.keys)}",
                f"privacy.honest-sites = {honest} of a sum of {sites} sites, of which {others} need not be honest",
            )

    def check_threshold(self, sites: int, colluders: int) -> None:
        """Raise PolicyRefusal if the steward takes more sites for not honest than the run's ``colluders``.

        Those of them that hold shares could help the server to both secrets of a site. It is so at any number of
        sites, so that a run which begins well goes on as sites are lost.
        """
        others = len(self.roster.keys) - self.honest
        # The threshold t has 2t > sites + colluders. So with others <= colluders 2t > sites + others: two lists with t
        # signatures each have an honest site in common. With one more that holds only where sites + colluders is even.
        if others > colluders:
            raise refusal(
                "honest-sites",
                f"{self.honest} of the roster's {len(self.roster.keys)}",
                f"privacy.colluders = {colluders} of a sum of {sites} sites that may lose some, of which {others} need "
                "not be honest",
            )


def party_of(site: str, node: Mapping[str, Scalar], policy: Policy, run: str, *, simulated: bool) -> Party:
    """Return who a site is in secure sums, and whom its steward takes for its peers.

    In a simulation, one machine's own, there is nobody to keep out: signing keys follow from the run's name.

    Raises:
        ConfigError: the node names no ``identity`` or the policy no ``peers``, or one of the files is none; or the
            roster is not the one of ``peers-hash``, has another key for this site, or fewer sites than the steward
            takes for honest.
        PolicyRefusal: the roster does not have this site.
    """
    if simulated and not policy.peers:
        names = [f"site-{i}" for i in range(int(node.get("num-partitions", 0)))]
        identities = {name: _simulated(run, name) for name in names}
        roster = Roster({name: own.public for name, own in identities.items()})
        party = Party(site, _simulated(run, site), roster, len(names))
    else:
        if "identity" not in node or not policy.peers:
            raise ConfigError(
                "a site that joins secure sums needs 'identity' in the node's settings and 'peers' in the policy: its "
                "own signing key, and the roster of all sites"
            )
        own = _identity(expanded(str(node["identity"])))
        party = Party(site, own, _roster(roster_file(node, policy), policy.peers_hash), policy.honest_sites)
    if party.honest > len(party.roster.keys):
        raise ConfigError(
            f"the policy has honest-sites = {party.honest}, and its roster {len(party.roster.keys)} sites: count those "
            "of the roster alone, or hand over a whole one"
        )
    if site not in party.roster.keys:
        raise PolicyRefusal(f"the roster of this site's steward does not have {site!r}: stewards must agree on one")
    if party.roster.keys[site] != party.identity.public:
        raise ConfigError(f"the roster has another signing key for {site!r} than the site's own: hand over the new one")
    return party


def roster_file(node: Mapping[str, Scalar], policy: Policy) -> Path:
    """Return where the policy's roster is: beside the policy, if it names no folder."""
    return expanded(str(node["policy"])).parent / expanded(policy.peers)


def _roster(path: Path, pinned: str) -> Roster:
    """Read the policy's roster, of that hash; an error, which the server is told, does not say where the file is."""
    try:
        roster = load_roster(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), "<peers>")) from error
    if roster.digest != pinned:
        raise ConfigError(
            f"the roster <peers> has the hash {roster.digest}, and the policy's peers-hash is {pinned or 'missing'}: "
            "put back the roster that the stewards agreed on, or let them compare the new one's hash and set that"
        )
    return roster


def _simulated(run: str, site: str) -> Identity:
    return Identity.from_secret(hashlib.sha256(json.dumps(["simulated", run, site]).encode()).digest())


def _identity(path: Path) -> Identity:
    try:
        return Identity.from_pem(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the signing key {path} cannot be read ({error.strerror}): check 'identity'") from error


def make_key(task: KeyTask, job: Job, party: Party, memory: MutableMapping[str, bytes]) -> KeyReply:
    """Return a new key for an attempt, and keep its secret half in place of any other."""
    name = _name(task, party)
    kind = RecoverableAttempt if job.config.privacy.drop_outs else SiteAttempt
    attempt = kind(name, party.site, party.identity)
    memory[KEPT] = json.dumps({**asdict(name), "secret": attempt.secret.hex()}).encode()
    return KeyReply(task.run, task.round_number, party.site, attempt.offer)


def next_key(task: TrainTask, job: Job, party: Party, memory: MutableMapping[str, bytes]) -> KeyOffer:
    """Return a new key for the first attempt at the round after a task's, and keep its secret half."""
    return make_key(KeyTask(task.run, task.round_number + 1, 0), job, party, memory).offer


def told_for_sum(
    task: ShareTask | SurvivorTask | UnmaskTask,
    job: Job,
    party: Party,
    memory: MutableMapping[str, bytes],
    write_down: Callable[[bytes, Sequence[str]], None],
) -> SumReply:
    """Return what a site tells before and after its vector, where sites may be lost from the sum.

    Args:
        task: what is asked.
        job: the run.
        party: who the site is.
        memory: what the node keeps; it may be an earlier one than the last reply left.
        write_down: keeps which survivors of a sum, by its context's hash, are signed for, before they are; raises if
            others were.

    Raises:
        ProtocolError: none may be lost in this run; this site has no key or no shares of the attempt; or as
            ``RecoverableAttempt`` and ``Holder`` say.
        PolicyRefusal: of the sites too few are honest by the policy.
    """
    privacy, where = job.config.privacy, (task.run, task.round_number, party.site)
    if not privacy.drop_outs:
        raise ProtocolError("shares are asked for in a run with privacy.drop-outs = 0: no vector may be missing")
    if isinstance(task, ShareTask):
        # What may be left of them: a list of survivors that this site refused later would be paid for by then. Where
        # the server names fewer sites than the run began with, whoever they are, fewer may be lost, and no claim rests
        # on whether they are gone: the honest ones of what is left are counted here, and again before a list is signed.
        terms = privacy.honest_sites, privacy.colluders, privacy.drop_outs
        lost = may_be_lost(len(task.offers), *terms, job.config.min_sites)
        party.check_size(len(task.offers) - lost, privacy.honest_sites)
        party.check_threshold(len(task.offers), privacy.colluders)
        attempt, kept = _recoverable(task, party, memory)
        sharing = attempt.share(task.offers, party.roster, privacy.honest_sites, privacy.colluders)
        kept |= {"threshold": attempt.threshold, "sealing": {site: key.hex() for site, key in attempt.sealing.items()}}
        kept |= {"figures": terms}
        memory[KEPT] = json.dumps(kept).encode()
        return ShareReply(*where, sharing)
    holder = _holder(task, party, memory)
    if isinstance(task, UnmaskTask):
        return UnmaskReply(*where, holder.reveal(dict(task.signatures), party.roster))
    # By what was priced with the vector: a server may say anything of the run beside each message.
    party.check_size(len(task.survivors), holder.least[0])
    party.check_threshold(len(holder.held), holder.least[1])
    agreement = holder.sign(task.survivors, party.identity)
    # Flower hands over the reply before it keeps the memory, and memory may be put back: only what is on disk says of
    # one attempt that one list is signed.
    write_down(holder.digest, holder.survivors)
    _hold(holder, memory)
    return SurvivorReply(*where, agreement)


def agreed(
    task: TrainTask, job: Job, model: FederatedModel, public_size: int, party: Party, memory: MutableMapping[str, bytes]
) -> Callable[[Words], bytes]:
    """Check a task of a secure sum, before anything is charged, and return what puts this site's masks on its vector.

    The kept key is taken away here: it serves once. What this site holds of the others is kept with the vector, after
    the charge: a task that is replayed on memory that was put back is not charged twice, and so brings back no part in
    the attempt that could sign a second list of survivors.

    Raises:
        ProtocolError: this site has no key for the attempt, or as ``SiteAttempt.agree``.
        PolicyRefusal: of the sites too few are honest by the policy.
    """
    attempt: SiteAttempt | RecoverableAttempt
    holder: Holder | None = None
    terms, hashes = terms_of(job, public_size), _hashes(task, job, model)
    if job.config.privacy.drop_outs:
        attempt, kept = _recoverable(task, party, memory)
        attempt.threshold = kept.get("threshold", 0)
        attempt.sealing = {site: bytes.fromhex(key) for site, key in kept.get("sealing", {}).items()}
        _check_figures(kept, job)
        party.check_size(len(task.offers), terms.honest_sites)
        holder = attempt.agree(task.offers, task.sealed, party.roster, terms, hashes)
    else:
        secret = _kept(task, party, memory)["secret"]
        party.check_size(len(task.offers), terms.honest_sites)
        attempt = SiteAttempt(_name(task, party), party.site, party.identity, bytes.fromhex(secret))
        attempt.agree(task.offers, party.roster, terms, hashes)
    del memory[KEPT]

    def masked(words: Words) -> bytes:
        if holder is not None:
            _hold(holder, memory)
        return attempt.masked(words).astype("<u4").tobytes()

    return masked


def _name(task: SumTask | TrainTask, party: Party) -> AttemptName:
    return AttemptName(task.run, task.round_number, task.attempt, party.roster.digest)


def _kept(task: SumTask | TrainTask, party: Party, memory: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what is kept of an attempt's key; ProtocolError if there is none of this attempt."""
    kept = dict(json.loads(memory.get(KEPT, b"{}")))
    if {key: kept.get(key) for key in asdict(_name(task, party))} != asdict(_name(task, party)):
        raise ProtocolError("this site has no key for that attempt: the server must ask for one, in a new attempt")
    return kept


def _recoverable(
    task: SumTask | TrainTask, party: Party, memory: Mapping[str, bytes]
) -> tuple[RecoverableAttempt, dict[str, Any]]:
    kept = _kept(task, party, memory)
    secret = bytes.fromhex(kept["secret"])
    return RecoverableAttempt(_name(task, party), party.site, party.identity, secret), kept


def _check_figures(kept: Mapping[str, Any], job: Job) -> None:
    """Raise ProtocolError if a run's figures are others than those for which this site shared its secrets out.

    How many shares tell a secret, and how many sites may be lost, follow from them; what is charged follows from what
    the run says now.
    """
    privacy = job.config.privacy
    now = [privacy.honest_sites, privacy.colluders, privacy.drop_outs]
    if kept.get("sealing") and kept.get("figures") != now:
        raise ProtocolError(
            "privacy.honest-sites, colluders and drop-outs are others now than when this site shared its secrets out: "
            "an attempt has one run's figures"
        )


def _hold(holder: Holder, memory: MutableMapping[str, bytes]) -> None:
    """Keep what a site holds of an attempt, in place of any other."""
    held = {site: shares.hex() for site, shares in holder.held.items()}
    memory[HELD] = json.dumps({**asdict(holder), "digest": holder.digest.hex(), "held": held}).encode()


def _holder(task: SumTask, party: Party, memory: Mapping[str, bytes]) -> Holder:
    """Return what this site holds of an attempt; ProtocolError if it is nothing."""
    held = json.loads(memory.get(HELD, b"{}"))
    if held.get("name") != asdict(_name(task, party)):
        raise ProtocolError("this site has masked no vector of that attempt, or has lost what it held of it")
    return Holder(
        name=_name(task, party),
        site=party.site,
        digest=bytes.fromhex(held["digest"]),
        threshold=held["threshold"],
        least=tuple(held["least"]),
        held={site: bytes.fromhex(shares) for site, shares in held["held"].items()},
        survivors=tuple(held["survivors"]),
    )


def terms_of(job: Job, public_size: int) -> Terms:
    """Return the figures that all sites of a run agree on; the public size decides none of them."""
    config = job.config
    plan = job.plan(config.total_steps, public_size)
    return Terms(
        noise_multiplier=plan.event.noise_multiplier,
        clip_norm=plan.event.clip_norm,
        sample_rate=plan.event.sample_rate,
        rounds=config.rounds,
        honest_sites=config.privacy.honest_sites,
        colluders=config.privacy.colluders,
    )


def _hashes(task: TrainTask, job: Job, model: FederatedModel) -> Task:
    with model.columns_alone(job.strategy.trained_columns(task.state, task.round_number, 0)):
        sent = job.sent(task.round_number, model.trained())
    trained = {layer: {name: p.detach() for name, p in factors.items()} for layer, factors in sent.items()}
    return Task(
        base=model.base.fingerprint,
        start=job.start_fingerprint(model.start),
        basis=hashlib.sha256(encode_state(task.basis)).hexdigest() if task.basis else "",
        state=hashlib.sha256(encode_state(task.state)).digest(),
        layout=layout_digest(layout_of(trained)),
    )

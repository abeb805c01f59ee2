"""A site's part in secure sums: its key of an attempt, its masks, its shares.

The key is made with the reply of the round before, or when the server asks for it, and kept in the node's memory until
the task comes; the ledger writes down under which key a vector was charged, so that a second one never leaves under its
masks, whatever is lost or repeated. Where sites may be lost from a sum, the shares of all its sites are kept from the
vector until they are revealed; what was sealed for a node that lost its memory is lost with it, as the node would be.
Which survivors were signed for is written down in the ledger, too, before the signature leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from fedveil.client.budget import check_budget
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.party import Party
from fedveil.client.site import Site
from fedveil.common.errors import ProtocolError
from fedveil.common.messages.blocks import encode_state, layout_digest, layout_of
from fedveil.common.messages.round import (
    KeyReply,
    KeyTask,
    ShareReply,
    ShareTask,
    SumReply,
    SumTask,
    SurvivorReply,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.model.alone import columns_alone
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy.secure_sum import (
    AttemptName,
    Holder,
    KeyOffer,
    RecoverableAttempt,
    Sharing,
    SiteAttempt,
    Task,
    Terms,
    may_be_lost,
)
from fedveil.privacy.secure_sum.masks import Words
from fedveil.strategies.job import Job

KEPT, HELD = "mask-key", "mask-shares"
"""Keys of a node's memory: what is secret of the next vector's masks, and what this site holds of the last one's."""


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


def reply_for_sum(task: SumTask, job: Job, site: Site, party: Party, memory: MutableMapping[str, bytes]) -> SumReply:
    """Return what a site sends beside its vector: a key, and where sites may be lost, shares and signatures.

    Args:
        task: the request.
        job: the run.
        site: whose budget must pay for the vector, and whose ledger keeps which survivors were signed for.
        party: who the site is.
        memory: what the node keeps; it may be an earlier one than the last reply left.

    Raises:
        BudgetExhausted, PolicyRefusal: the site could not pay for the attempt's vector.
        ProtocolError: none may be lost in this run; this site has no key or no shares of the attempt; or as
            ``RecoverableAttempt`` and ``Holder`` say.
        PolicyRefusal: of the sites too few are honest by the policy.
    """
    if isinstance(task, KeyTask):
        check_budget(site, job, task)
        return make_key(task, job, party, memory)
    if not job.config.privacy.drop_outs:
        raise ProtocolError("shares are asked for in a run with privacy.drop-outs = 0: no vector may be missing")
    where = task.run, task.round_number, party.site
    if isinstance(task, ShareTask):
        return ShareReply(*where, _shared(task, job, party, memory))
    holder = _holder(task, party, memory)
    if isinstance(task, UnmaskTask):
        return UnmaskReply(*where, holder.reveal(dict(task.signatures), party.roster))
    # By what was priced with the vector: a server may say anything of the run beside each message.
    party.check_size(len(task.survivors), holder.least[0])
    party.check_threshold(len(holder.held), holder.least[1])
    agreement = holder.sign(task.survivors, party.identity)
    # Flower hands over the reply before it keeps the memory, and memory may be put back: only what is on disk says of
    # one attempt that one list is signed. It raises if another was.
    with Ledger(site.ledger_path, apart=site.apart) as ledger:
        ledger.sums.sign(holder.digest, holder.survivors)
    _hold(holder, memory)
    return SurvivorReply(*where, agreement)


def _shared(task: ShareTask, job: Job, party: Party, memory: MutableMapping[str, bytes]) -> Sharing:
    """Share this site's secrets out among the sites of an attempt, and keep with whom."""
    # What may be left of them: a list of survivors that this site refused later would be paid for by then. Where the
    # server names fewer sites than the run began with, fewer may be lost, and no claim depends on whether they are
    # gone: the honest ones of what is left are counted here, and again before a list is signed.
    privacy = job.config.privacy
    _check_named(task.offers, job)
    figures = privacy.honest_sites, privacy.colluders, privacy.drop_outs
    lost = may_be_lost(len(task.offers), *figures, job.config.min_sites)
    party.check_size(len(task.offers) - lost, privacy.honest_sites)
    party.check_threshold(len(task.offers), privacy.colluders)
    attempt, secrets = _recoverable(task, party, memory)
    sharing = attempt.share(task.offers, party.roster, privacy.honest_sites, privacy.colluders)
    sealing = {site: key.hex() for site, key in attempt.sealing.items()}
    memory[KEPT] = json.dumps(
        {**secrets, "threshold": attempt.threshold, "sealing": sealing, "figures": figures}
    ).encode()
    return sharing


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
    _check_named(task.offers, job)
    terms, hashes = terms_of(job, public_size), _hashes(task, job, model)
    if job.config.privacy.drop_outs:
        attempt, secrets = _recoverable(task, party, memory)
        attempt.threshold = secrets.get("threshold", 0)
        attempt.sealing = {site: bytes.fromhex(key) for site, key in secrets.get("sealing", {}).items()}
        _check_figures(secrets, job)
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
    """Return what is kept of an attempt's key; ProtocolError if it is of another attempt."""
    secrets = dict(json.loads(memory.get(KEPT, b"{}")))
    if {key: secrets.get(key) for key in asdict(_name(task, party))} != asdict(_name(task, party)):
        raise ProtocolError("this site has no key for that attempt: the server must ask for one, in a new attempt")
    return secrets


def _recoverable(
    task: SumTask | TrainTask, party: Party, memory: Mapping[str, bytes]
) -> tuple[RecoverableAttempt, dict[str, Any]]:
    secrets = _kept(task, party, memory)
    secret = bytes.fromhex(secrets["secret"])
    return RecoverableAttempt(_name(task, party), party.site, party.identity, secret), secrets


def _check_figures(secrets: Mapping[str, Any], job: Job) -> None:
    """Raise ProtocolError if a run's figures are others than those for which this site shared its secrets out.

    How many shares tell a secret, and how many sites may be lost, follow from them; what is charged follows from what
    the run says now.
    """
    privacy = job.config.privacy
    now = [privacy.honest_sites, privacy.colluders, privacy.drop_outs]
    if secrets.get("sealing") and secrets.get("figures") != now:
        raise ProtocolError(
            "privacy.honest-sites, colluders and drop-outs are others now than when this site shared its secrets out: "
            "an attempt has one run's figures"
        )


def _check_named(offers: Sequence[KeyOffer], job: Job) -> None:
    """Raise ProtocolError if a sum has a site that the run does not name."""
    named = job.config.site_names
    if others := [offer.site for offer in offers if named and offer.site not in named]:
        raise ProtocolError(f"the sum has the site {others[0]!r}, which the run does not name")


def _hold(holder: Holder, memory: MutableMapping[str, bytes]) -> None:
    """Keep what a site holds of an attempt, in place of any other."""
    held = {site: shares.hex() for site, shares in holder.held.items()}
    memory[HELD] = json.dumps({**asdict(holder), "digest": holder.digest.hex(), "held": held}).encode()


def _holder(task: SumTask, party: Party, memory: Mapping[str, bytes]) -> Holder:
    """Return what this site holds of an attempt; ProtocolError if it is nothing."""
    saved = json.loads(memory.get(HELD, b"{}"))
    if saved.get("name") != asdict(_name(task, party)):
        raise ProtocolError("this site has masked no vector of that attempt, or has lost what it held of it")
    return Holder(
        name=_name(task, party),
        site=party.site,
        digest=bytes.fromhex(saved["digest"]),
        threshold=saved["threshold"],
        least=tuple(saved["least"]),
        held={site: bytes.fromhex(shares) for site, shares in saved["held"].items()},
        survivors=tuple(saved["survivors"]),
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
    with columns_alone(model, job.strategy.trained_columns(task.state, task.round_number, 0)):
        sent = job.sent(task.round_number, model.trained())
    trained = {layer: {name: p.detach() for name, p in factors.items()} for layer, factors in sent.items()}
    return Task(
        base=model.base.fingerprint,
        start=job.start_fingerprint(model.start),
        basis=hashlib.sha256(encode_state(task.basis)).hexdigest() if task.basis else "",
        state=hashlib.sha256(encode_state(task.state)).digest(),
        layout=layout_digest(layout_of(trained)),
    )

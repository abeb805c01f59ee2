"""A site's part in secure sums: who it is, whom it takes for its peers, its key of an attempt, its masks.

The key is made with the reply of the round before, or when the server asks for it, and kept in the node's memory until
the task comes; the ledger writes down under which key a vector was charged, so that a second one never leaves under its
masks, whatever is lost or repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from client.pins import refusal
from client.policy import Policy
from common.config.sections import Scalar
from common.errors import ConfigError, PolicyRefusal, ProtocolError
from common.messages.round import KeyReply, KeyTask, TrainTask
from common.messages.wire import encode_state, layout_digest, layout_of
from common.model.federated import FederatedModel
from common.secure_sum import AttemptName, Identity, KeyOffer, Roster, SiteAttempt, Task, Terms
from common.secure_sum.masks import Words
from common.secure_sum.roster import load_roster
from strategies.job import Job

KEPT = "mask-key"
"""Key of a node's memory."""


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


def party_of(site: str, node: Mapping[str, Scalar], policy: Policy, run: str, *, simulated: bool) -> Party:
    """Return who a site is in secure sums, and whom its steward takes for its peers.

    In a simulation, one machine's own, there is nobody to keep out: signing keys follow from the run's name.

    Raises:
        ConfigError: the node names no ``identity`` or the policy no ``peers``, or one of the files is none; or the
            roster has another key for this site.
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
        own = _identity(Path(str(node["identity"])).expanduser())
        party = Party(site, own, load_roster(roster_file(node, policy)), policy.honest_sites)
    if site not in party.roster.keys:
        raise PolicyRefusal(f"the roster of this site's steward does not have {site!r}: stewards must agree on one")
    if party.roster.keys[site] != party.identity.public:
        raise ConfigError(f"the roster has another signing key for {site!r} than the site's own: hand over the new one")
    return party


def roster_file(node: Mapping[str, Scalar], policy: Policy) -> Path:
    """Return where the policy's roster is: beside the policy, if it names no folder."""
    return Path(str(node["policy"])).expanduser().parent / Path(policy.peers).expanduser()


def _simulated(run: str, site: str) -> Identity:
    return Identity.from_secret(hashlib.sha256(json.dumps(["simulated", run, site]).encode()).digest())


def _identity(path: Path) -> Identity:
    try:
        return Identity.from_pem(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the signing key {path} cannot be read ({error.strerror}): check 'identity'") from error


def make_key(task: KeyTask, party: Party, memory: MutableMapping[str, bytes]) -> KeyReply:
    """Return a new key for an attempt, and keep its secret half in place of any other."""
    name = AttemptName(task.run, task.round_number, task.attempt, party.roster.digest)
    attempt = SiteAttempt(name, party.site, party.identity)
    memory[KEPT] = json.dumps({**asdict(name), "secret": attempt.secret.hex()}).encode()
    return KeyReply(task.run, task.round_number, party.site, attempt.offer)


def next_key(task: TrainTask, party: Party, memory: MutableMapping[str, bytes]) -> KeyOffer:
    """Return a new key for the first attempt at the round after a task's, and keep its secret half."""
    return make_key(KeyTask(task.run, task.round_number + 1, 0), party, memory).offer


def agreed(
    task: TrainTask, job: Job, model: FederatedModel, public_size: int, party: Party, memory: MutableMapping[str, bytes]
) -> Callable[[Words], bytes]:
    """Check a task of a secure sum, before anything is charged, and return what puts this site's masks on its vector.

    The kept key is taken away here: it serves once.

    Raises:
        ProtocolError: this site has no key for the attempt, or as ``SiteAttempt.agree``.
        PolicyRefusal: of the sites too few are honest by the policy.
    """
    name = AttemptName(task.run, task.round_number, task.attempt, party.roster.digest)
    kept = json.loads(memory.get(KEPT, b"{}"))
    secret = kept.pop("secret", "")
    if not secret or kept != asdict(name):
        raise ProtocolError("this site has no key for that attempt: the server must ask for one, in a new attempt")
    party.check_size(len(task.offers), job.config.privacy.honest_sites)
    attempt = SiteAttempt(name, party.site, party.identity, bytes.fromhex(secret))
    attempt.agree(task.offers, party.roster, terms_of(job, public_size), _hashes(task, job, model))
    del memory[KEPT]
    return lambda words: attempt.masked(words).astype("<u4").tobytes()


def terms_of(job: Job, public_size: int) -> Terms:
    """Return the figures that all sites of a run agree on; the public size decides none of them."""
    config = job.config
    plan = job.mechanism.plan(config.privacy, config.training, config.total_steps, public_size)
    return Terms(
        noise_multiplier=plan.event.noise_multiplier,
        clip_norm=plan.event.clip_norm,
        sample_rate=plan.event.sample_rate,
        rounds=config.rounds,
        honest_sites=config.privacy.honest_sites,
        colluders=config.privacy.colluders,
    )


def _hashes(task: TrainTask, job: Job, model: FederatedModel) -> Task:
    sent = job.summed(task.round_number, model.trained())
    trained = {layer: {name: p.detach() for name, p in factors.items()} for layer, factors in sent.items()}
    return Task(
        base=model.base.fingerprint,
        start=job.start_fingerprint(model.start),
        basis=hashlib.sha256(encode_state(task.basis)).hexdigest() if task.basis else "",
        state=hashlib.sha256(encode_state(task.state)).digest(),
        layout=layout_digest(layout_of(trained)),
    )

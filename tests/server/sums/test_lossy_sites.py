"""A site of a sum with drop-outs: what it signs, tells and refuses, whatever the server says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from summed_runs import SUMMED, words_of

from audits.bands import out_of_band, related
from audits.sum_site import SumSite
from audits.summed import noise_again
from audits.tiny_site import clinic
from fedveil.client import sums
from fedveil.client.app import answer
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import LedgerError, PolicyRefusal
from fedveil.common.messages.round import (
    KeyReply,
    Refusal,
    ShareReply,
    ShareTask,
    SurvivorReply,
    SurvivorTask,
    Task,
    TrainResult,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.wire import encode_reply, encode_task
from fedveil.privacy.secure_sum import (
    AttemptName,
    Holder,
    Identity,
    RecoverableAttempt,
    Roster,
    noise_share,
    recovery,
    threshold,
    total,
    unmasked,
)
from fedveil.privacy.secure_sum.masks import Words
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


# --- one deployed site ------------------------------------------------------------------------------------------------
class LossySite(SumSite):
    """A site among two others, and a server that asks it whatever a test wants."""

    def ask(self, task: Task) -> Any:
        return answer(encode_task(task), self.site.node, self.site.settings, task.run, self.site.memory)

    def refused(self, task: Task, words: str) -> None:
        reply = self.ask(task)
        assert isinstance(reply, Refusal), f"the site answers {reply}"
        assert words in reply.reason, reply.reason

    def join(self, *names: str) -> None:
        """Take more sites into the roster."""
        self.peers |= {name: Identity.new() for name in names}
        self.roster = Roster({**self.roster.keys, **{name: self.peers[name].public for name in names}})
        (self.site.ledger.parent / "peers.toml").write_text(self.roster.text())

    def begin(self, number: int = 1, attempt: int = 0) -> tuple[ShareTask, TrainTask]:
        """Take all through keys and shares; return the tasks to share, and to train."""
        reply = self.key(number, attempt)
        assert isinstance(reply, KeyReply), reply
        name = AttemptName("1", number, attempt, self.roster.digest)
        self.lossy = {site: RecoverableAttempt(name, site, identity) for site, identity in self.peers.items()}
        offers = sorted([reply.offer, *(own.offer for own in self.lossy.values())], key=lambda offer: offer.site)
        task = ShareTask("1", number, attempt, tuple(offers))
        own = self.ask(task)
        assert isinstance(own, ShareReply), own
        shared = {site: other.share(offers, self.roster, 2, 1) for site, other in self.lossy.items()}
        shared = dict(sorted({**shared, "clinic": own.sharing}.items()))
        masks, place = tuple(one.offer for one in shared.values()), list(shared).index("clinic")
        self.shared = shared
        sealed = tuple(one.sealed[place] for one in shared.values())
        return task, replace(self.site.task(number), attempt=attempt, offers=masks, sealed=sealed)

    def peers_agree(self, task: TrainTask) -> dict[str, Holder]:
        """Let the others agree to a task, and return what they hold."""
        job, model = configure(self.site.settings), self.site.model()
        hashes = sums._hashes(task, job, model)
        return {
            site: own.agree(
                task.offers,
                [one.sealed[list(self.shared).index(site)] for one in self.shared.values()],
                self.roster,
                sums.terms_of(job, 50),
                hashes,
            )
            for site, own in self.lossy.items()
        }

    def bare(self, task: TrainTask, reply: TrainResult) -> torch.Tensor:
        """Take the sum of the site's vector and of zeros to its end; return it over the site's share of the noise."""
        held, where = self.peers_agree(task), (task.run, task.round_number, task.attempt)
        names = tuple(sorted(self.shared))
        signed = self.ask(SurvivorTask(*where, names))
        assert isinstance(signed, SurvivorReply), signed
        assert {holder.digest for holder in held.values()} == {signed.agreement.digest}
        words = {site: own.sign(names, self.peers[site]) for site, own in held.items()} | {"clinic": signed.agreement}
        told = self.ask(UnmaskTask(*where, tuple((site, word.signature) for site, word in words.items())))
        assert isinstance(told, UnmaskReply), told
        signatures = {site: word.signature for site, word in words.items()}
        shares = {"clinic": told.shares} | {site: own.reveal(signatures, self.roster) for site, own in held.items()}
        vectors = {site: own.masked(0 * words_of_result(reply)) for site, own in self.lossy.items()}
        vectors["clinic"] = words_of_result(reply)
        keys = {site: one.offer.public for site, one in self.shared.items()}
        share = noise_share(2.0, 1.0, 2)
        return total([unmasked(vectors, keys, names, 1, signed.agreement.digest, shares)], share) / share


@pytest.fixture
def clinics(toy_settings: dict[str, Any], tmp_path: Path) -> LossySite:
    settings = {**toy_settings, **SUMMED, "privacy.drop-outs": 1, "privacy.delta": 1e-3}
    return LossySite(clinic(settings, tmp_path))


def test_a_sites_vector_is_bound_to_what_it_was_told_and_comes_off_with_its_shares(clinics: LossySite) -> None:
    clinics.site.settings["training.sample-rate"] = 1e-6  # no record, so that what is left is the site's noise
    _, task = clinics.begin()
    reply = clinics.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert len(clinics.site.charges()) == 1
    own = clinics.bare(task, reply)
    assert not out_of_band(float(own.square().sum()), own.numel())


def words_of_result(reply: TrainResult) -> Any:
    return words_of(encode_reply(reply)).astype("uint32")


def test_a_server_that_asks_for_both_secrets_of_a_site_is_refused(
    clinics: LossySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First with north among the survivors, then without it; and with the signatures of another list."""
    clinics.join("east")
    clinics.rule(honest_sites=4)
    _, task = clinics.begin()
    assert isinstance(clinics.ask(task), TrainResult)
    held = clinics.peers_agree(task)
    everybody, fewer = ("clinic", "east", "north", "south"), ("clinic", "east", "south")
    clinics.refused(UnmaskTask("1", 1, 0, (("north", bytes(64)),)), "signed for no survivors")
    assert isinstance(clinics.ask(SurvivorTask("1", 1, 0, everybody)), SurvivorReply)
    clinics.refused(SurvivorTask("1", 1, 0, fewer), "other survivors were signed for in this attempt")
    wrong = [(site, held[site].sign(fewer, clinics.peers[site]).signature) for site in ("east", "south")]
    clinics.refused(UnmaskTask("1", 1, 0, tuple(wrong)), "0 sites have signed the survivors, and 3 are needed")
    # The planted fault: a site that forgets what it has signed tells both shares of north.
    monkeypatch.setattr(Sums, "sign", lambda *own: None)
    kept = json.loads(clinics.site.memory[sums.HELD])
    assert kept["survivors"] == list(everybody)
    told = {}
    for survivors in (everybody, fewer):
        kept |= {"survivors": [], "threshold": 1}
        clinics.site.memory[sums.HELD] = json.dumps(kept).encode()
        signed = clinics.ask(SurvivorTask("1", 1, 0, survivors))
        assert isinstance(signed, SurvivorReply), signed
        reply = clinics.ask(UnmaskTask("1", 1, 0, (("clinic", signed.agreement.signature),)))
        assert isinstance(reply, UnmaskReply), reply
        told[survivors] = reply.shares[2]
    assert told[everybody] + told[fewer] == bytes.fromhex(kept["held"]["north"])


def test_memory_that_is_put_back_after_a_signature_signs_no_second_list(
    clinics: LossySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker is killed between its reply and what it keeps, or a server races what the node copies."""
    clinics.join("east")
    clinics.rule(honest_sites=4)
    _, task = clinics.begin()
    assert isinstance(clinics.ask(task), TrainResult)
    kept = dict(clinics.site.memory)
    everybody, fewer = ("clinic", "east", "north", "south"), ("clinic", "east", "south")

    def put_back() -> None:
        clinics.site.memory.clear()
        clinics.site.memory.update(kept)

    def broken(*own: Any) -> None:
        raise LedgerError("the disk is full")

    with monkeypatch.context() as patch:  # what cannot be written down is not signed
        patch.setattr(Sums, "sign", broken)
        assert isinstance(clinics.ask(SurvivorTask("1", 1, 0, fewer)), Refusal)
    put_back()
    first = clinics.ask(SurvivorTask("1", 1, 0, everybody))
    assert isinstance(first, SurvivorReply), first
    for _ in range(2):
        put_back()
        clinics.refused(SurvivorTask("1", 1, 0, fewer), "other survivors were signed for in this attempt")
    clinics.refused(UnmaskTask("1", 1, 0, (("north", bytes(64)),)), "signed for no survivors")
    assert clinics.ask(SurvivorTask("1", 1, 0, everybody)) == first, "the list that was signed is signed no more"
    # The planted fault: what is signed is known to the memory alone.
    monkeypatch.setattr(Sums, "sign", lambda *own: None)
    put_back()
    assert isinstance(clinics.ask(SurvivorTask("1", 1, 0, fewer)), SurvivorReply)


def test_one_key_has_one_vector_whatever_is_lost_or_kept(clinics: LossySite) -> None:
    share, task = clinics.begin()
    again = clinics.ask(share)
    assert isinstance(again, ShareReply)
    assert again.sharing == clinics.shared["clinic"], "a task that comes twice has two answers"
    kept = dict(clinics.site.memory)
    first = clinics.ask(task)
    assert isinstance(first, TrainResult)
    assert clinics.ask(task).words == first.words
    clinics.refused(share, "has no key for that attempt")
    clinics.site.memory.clear()
    clinics.site.memory.update(kept)
    clinics.refused(task, "was charged under this key of its masks before")
    # Nothing is held again that could sign a second list.
    clinics.refused(SurvivorTask("1", 1, 0, ("clinic", "north", "south")), "masked no vector of that attempt")
    clinics.site.memory.clear()
    clinics.refused(task, "has no key for that attempt")
    clinics.refused(SurvivorTask("1", 1, 0, ("clinic", "north", "south")), "or has lost what it held of it")
    assert len(clinics.site.charges()) == 1


def seeds_of_masks(clinics: LossySite, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the seeds of all masks that a site puts on vectors, over attempts, rounds, replays and lost memory."""
    used, add, draw = list[bytes](), recovery.add_mask, recovery.mask_of

    def of_pair(words: Words, seed: bytes, own: str, peer: str) -> None:
        used.append(seed)
        add(words, seed, own, peer)

    def of_site(seed: bytes, count: int) -> Words:
        used.append(seed)
        return draw(seed, count)

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "add_mask", of_pair)
        patched.setattr(recovery, "mask_of", of_site)
        for number, attempt in ((1, 0), (1, 1), (2, 0)):
            _, task = clinics.begin(number, attempt)
            kept = dict(clinics.site.memory)
            for memory in (None, None, kept, {}):  # the task, its replay, memory that is put back, and none
                if memory is not None:
                    clinics.site.memory.clear()
                    clinics.site.memory.update(memory)
                clinics.ask(task)
        clinics.ask(clinics.begin(2, 0)[1])  # the same attempt, whose key is gone
    return used


def test_no_two_vectors_leave_under_one_mask_of_a_pair_or_of_the_site(
    clinics: LossySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = seeds_of_masks(clinics, monkeypatch)
    assert len(used) == len(set(used)) == 4 * 3, "one site used one seed twice"
    assert len(clinics.site.charges()) == 4
    # The planted fault: which key a vector was charged under is known to the memory alone.
    monkeypatch.setattr(Sums, "use_key", lambda *own: None)
    used = seeds_of_masks(clinics, monkeypatch)
    assert len(set(used)) < len(used), "the check is blind"


def test_what_is_asked_out_of_turn_is_refused_and_costs_nothing(clinics: LossySite) -> None:
    share, task = clinics.begin()
    survive = SurvivorTask("1", 1, 0, ("clinic", "north", "south"))
    clinics.refused(survive, "masked no vector of that attempt")
    clinics.refused(UnmaskTask("1", 1, 0, (("north", bytes(64)),)), "masked no vector of that attempt")
    clinics.refused(replace(share, attempt=1), "has no key for that attempt")
    clinics.refused(replace(share, offers=share.offers[:2]), "the attempt has 2 sites")
    clinics.refused(replace(task, sealed=task.sealed[::-1]), "cannot be opened")
    clinics.refused(replace(task, offers=share.offers), "is not signed by that site")
    clinics.refused(replace(task, sealed=()), "0 sealed shares of 3 sites")
    clinics.key(1, 1)
    clinics.refused(replace(task, attempt=1), "has shared no secrets")
    assert not clinics.site.charges()
    clinics.site.settings |= {"privacy.drop-outs": 0}
    clinics.refused(share, "privacy.drop-outs = 0")


def test_a_steward_who_counts_on_fewer_honest_sites_than_the_threshold_does_is_not_in_the_sum(
    clinics: LossySite,
) -> None:
    """Of six sites three need not be honest; with the run's one colluder four shares would tell a secret."""
    clinics.join("east", "west", "centre")
    clinics.rule(honest_sites=3)
    with pytest.raises(AssertionError, match="of a sum of 6 sites that may lose some, of which 3 need not be honest"):
        clinics.begin()
    clinics.rule(honest_sites=5)
    assert clinics.begin()
    with pytest.MonkeyPatch.context() as patch:  # the planted fault: a site that believes the run's colluders
        patch.setattr(sums.Party, "check_threshold", lambda *own: None)
        clinics.rule(honest_sites=3)
        assert clinics.begin(), "the refusal is another's"


def four_of_whom_one_may_lie(clinics: LossySite) -> tuple[ShareTask, TrainTask]:
    clinics.join("east")
    clinics.rule(honest_sites=3)
    return clinics.begin()


SAID = [
    {"privacy.honest-sites": 1, "privacy.colluders": 2},
    {"privacy.honest-sites": 1, "privacy.colluders": 3},
    {"privacy.colluders": 2},
    {"privacy.drop-outs": 2},
]


FEWER, DEARER = ("clinic", "east", "south"), {"privacy.honest-sites": 3, "privacy.colluders": 0}


def test_figures_that_change_between_the_messages_of_an_attempt_price_no_sum(
    clinics: LossySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares for two honest sites beside one, a vector charged as if three were, and a list with two of them."""
    agreed = {"privacy.honest-sites": 2, "privacy.colluders": 1}
    _, task = four_of_whom_one_may_lie(clinics)
    clinics.site.settings |= DEARER
    clinics.refused(task, "an attempt has one run's figures")
    assert not clinics.site.charges()
    # The planted fault: a vector is charged by whatever is said beside it. The list is held to that price all the same.
    monkeypatch.setattr(sums, "_check_figures", lambda *own: None)
    assert isinstance(clinics.ask(task), TrainResult)
    with Ledger(clinics.site.ledger) as ledger:
        assert [entry.event.figures["honest_sites"] for entry in ledger.entries()] == [3]
    clinics.site.settings |= agreed
    clinics.refused(SurvivorTask("1", 1, 0, FEWER), "honest-sites = 3 of a sum of 3 sites, of which 1 need not be")
    # The second one: a list is judged by what is said beside it.
    monkeypatch.setattr(sums.Party, "check_size", lambda *own: None)
    monkeypatch.setattr(sums.Party, "check_threshold", lambda *own: None)
    assert isinstance(clinics.ask(SurvivorTask("1", 1, 0, FEWER)), SurvivorReply), "the refusal is another's"


@pytest.mark.parametrize("said", SAID)
def test_what_is_said_beside_a_list_of_survivors_changes_nothing_of_it(
    clinics: LossySite, said: dict[str, int]
) -> None:
    _, task = four_of_whom_one_may_lie(clinics)
    assert isinstance(clinics.ask(task), TrainResult)
    kept = dict(clinics.site.memory)
    clinics.site.settings |= said
    clinics.refused(SurvivorTask("1", 1, 0, ("clinic", "east")), "honest-sites = 2 of a sum of 2 sites, of which 1")
    told = clinics.ask(SurvivorTask("1", 1, 0, FEWER))
    assert isinstance(told, SurvivorReply), told
    clinics.site.settings |= {"privacy.honest-sites": 2, "privacy.colluders": 1, "privacy.drop-outs": 1}
    clinics.site.memory.clear()
    clinics.site.memory.update(kept)
    assert clinics.ask(SurvivorTask("1", 1, 0, FEWER)) == told


@pytest.mark.parametrize("said", SAID)
def test_a_vector_is_of_the_figures_for_which_secrets_were_shared_out(clinics: LossySite, said: dict[str, int]) -> None:
    _, task = four_of_whom_one_may_lie(clinics)
    clinics.site.settings |= said
    assert isinstance(clinics.ask(task), Refusal)
    assert not clinics.site.charges()


@pytest.mark.parametrize("sites", [7, 6, 5, 4])
def test_more_sites_than_the_colluders_that_need_not_be_honest_are_refused_at_any_number(
    sites: int, clinics: LossySite
) -> None:
    """Else a run of an even number of sites begins, and is refused once one of them is lost for good."""
    clinics.join(*("east", "west", "centre", "coast")[: sites - 3])
    party = sums.Party("clinic", Identity.new(), clinics.roster, sites - 2)
    with pytest.raises(PolicyRefusal, match=f"privacy.colluders = 1 of a sum of {sites} sites"):
        party.check_threshold(sites, 1)
    party.check_threshold(sites, 2)
    for colluders in (1, 2):
        replace(party, honest=sites - 1).check_threshold(sites, colluders)
        assert 2 * threshold(sites, colluders) > sites + colluders, "two lists may have no honest site in common"


def test_a_steward_whose_honest_sites_may_be_too_few_of_what_is_left_pays_for_nothing(clinics: LossySite) -> None:
    """Of four sites two need not be honest: once another is lost, one of the three that are left is honest."""
    clinics.join("east")
    clinics.rule(honest_sites=2)
    with pytest.raises(AssertionError, match="honest-sites = 2 of a sum of 3 sites, of which 2 need not be honest"):
        clinics.begin()
    assert not clinics.site.charges()
    clinics.rule(honest_sites=3)
    assert clinics.begin()


def test_a_server_that_calls_sites_lost_gets_no_sum_of_fewer_honest_ones(clinics: LossySite) -> None:
    """It names three of six sites, one of which is its own: what is left is counted by the steward's roster."""
    clinics.join("east", "west", "centre")
    roster = list(clinics.roster.keys)
    clinics.rule(honest_sites=5)
    del clinics.peers["east"], clinics.peers["west"], clinics.peers["centre"]
    share, task = clinics.begin()
    assert len(share.offers) == 3, "one of the six need not be honest, and two of any three are"
    assert isinstance(clinics.ask(task), TrainResult)
    # Fewer survive by its word: of two, one may be the server's.
    clinics.refused(SurvivorTask("1", 1, 0, ("clinic", "north")), "honest-sites = 2 of a sum of 2 sites")
    # A steward who takes two of the six for not honest pays for no sum of three.
    clinics.rule(honest_sites=4)
    with pytest.raises(AssertionError, match="honest-sites = 2 of a sum of 3 sites, of which 2 need not be honest"):
        clinics.begin(2)
    assert [number for _, number, _ in clinics.site.charges()] == [1]
    with pytest.MonkeyPatch.context() as patch:  # the planted fault: a site that counts on sites which are gone
        patch.setattr(sums.Party, "check_size", lambda *own: None)
        patch.setattr(sums.Party, "check_threshold", lambda *own: None)
        share, task = clinics.begin(2)
        assert isinstance(clinics.ask(task), TrainResult), "the refusal is another's"
    assert len(roster) == 6


def test_a_server_that_names_other_sites_in_a_second_attempt_has_another_vector_and_another_charge(
    clinics: LossySite,
) -> None:
    """It gets a sum with north and one without: two charges, and two vectors of which no mask or noise is the same."""
    clinics.site.settings["training.sample-rate"] = 1e-6  # no record, so that what is left is the site's noise
    clinics.join("east")
    clinics.rule(honest_sites=4)
    everybody = dict(clinics.peers)

    def ask(attempt: int, *gone: str) -> tuple[TrainResult, torch.Tensor]:
        clinics.peers = {name: peer for name, peer in everybody.items() if name not in gone}
        _, task = clinics.begin(1, attempt)
        reply = clinics.ask(task)
        assert isinstance(reply, TrainResult), reply
        assert len(clinics.site.charges()) == attempt + 1
        return reply, clinics.bare(task, reply)

    (first, noise), (again, other) = ask(0), ask(1, "north")
    apart = (words_of_result(first) - words_of_result(again)).astype("int32").astype(float)
    assert abs(apart).mean() > 2.0**29, "the masks of both are the same"
    assert not related(noise, other), "the noise of one attempt is in the next one, too"
    with noise_again():  # the planted fault
        assert related(ask(2)[1], ask(3, "north")[1]), "the check is blind"

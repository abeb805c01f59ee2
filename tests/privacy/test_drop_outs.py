"""Sums that sites are lost from: what the server gets of the others, and how little a lying one does."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from audits.bands import out_of_band
from audits.summed import CELLS, SHIFTS, unevenness
from fedveil.common.errors import MechanismError, ProtocolError
from fedveil.privacy.secure_sum import (
    Agreement,
    AttemptName,
    Context,
    Holder,
    Identity,
    KeyOffer,
    RecoverableAttempt,
    Roster,
    Sharing,
    Task,
    Terms,
    least_sites,
    may_be_lost,
    recovery,
    rounded,
    threshold,
    total,
    unmasked,
)
from fedveil.privacy.secure_sum import survivors as signing
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.masks import Words, mask_of, pair_seed
from fedveil.privacy.secure_sum.shares import PRIME, SHARE_BYTES, combined, weights

TERMS = Terms(noise_multiplier=4.8, clip_norm=0.5, sample_rate=0.33, rounds=12, honest_sites=2, colluders=1)


TASK = Task(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))


class Federation:
    """Sites with signing keys and a roster of them, taken through one attempt step by step."""

    def __init__(self, sites: int, terms: Terms = TERMS) -> None:
        self.terms = terms
        self.identities = {f"site-{i:02}": Identity.new() for i in range(sites)}
        self.names = list(self.identities)
        self.roster = Roster({name: identity.public for name, identity in self.identities.items()})
        name = AttemptName("run", 3, 0, self.roster.digest)
        self.attempts = {n: RecoverableAttempt(name, n, identity) for n, identity in self.identities.items()}
        self.shared: dict[str, Sharing] = {}
        self.holders: dict[str, Holder] = {}

    def offers(self, names: Collection[str] | None = None) -> list[KeyOffer]:
        return [self.attempts[name].offer for name in names or self.names]

    def share(self, lost: Collection[str] = (), names: Sequence[str] | None = None) -> None:
        """Let all share but those that are lost here; ``names``: among these alone."""
        for name in names or self.names:
            if name not in lost:
                honest, colluders = self.terms.honest_sites, self.terms.colluders
                self.shared[name] = self.attempts[name].share(self.offers(names), self.roster, honest, colluders)

    def sealed(self, name: str, sites: Sequence[str]) -> list[bytes]:
        """Return what ``sites`` have sealed for one."""
        place = list(self.attempts[name].sealing).index(name)
        return [self.shared[site].sealed[place] for site in sites]

    def agree(self, name: str, sites: Sequence[str] | None = None) -> Holder:
        sites = sites or list(self.shared)
        offers = [self.shared[site].offer for site in sites]
        self.holders[name] = self.attempts[name].agree(offers, self.sealed(name, sites), self.roster, self.terms, TASK)
        return self.holders[name]

    def vectors(self, words: dict[str, Words]) -> dict[str, Words]:
        """Return the masked vectors of those who agreed, and are given words."""
        return {name: self.attempts[name].masked(words[name]) for name in self.holders if name in words}

    def sign(self, name: str, survivors: Sequence[str]) -> Agreement:
        return self.holders[name].sign(survivors, self.identities[name])

    def reveal(self, name: str, signed: Sequence[Agreement]) -> tuple[bytes, ...]:
        return self.holders[name].reveal({own.site: own.signature for own in signed}, self.roster)

    def unmask(self, vectors: dict[str, Words], told: dict[str, tuple[bytes, ...]]) -> Words:
        offers = {site: shared.offer.public for site, shared in self.shared.items()}
        digest = next(iter(self.holders.values())).digest
        return unmasked(vectors, offers, self.names, self.terms.colluders, digest, told)


def is_uniform(words: Words) -> bool:
    return not any(out_of_band(unevenness(words, shift), CELLS - 1) for shift in SHIFTS)


def modular_sum(vectors: Collection[Words]) -> list[int]:
    """Add by hand: whole numbers of any size, one remainder at the end."""
    return [sum(int(vector[i]) for vector in vectors) % 2**32 for i in range(len(next(iter(vectors))))]


# --- the sum of those that are left -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("sites", "early", "late", "mute"), [(3, 0, 0, 0), (4, 0, 1, 0), (7, 1, 1, 0), (16, 1, 2, 2)])
def test_the_server_gets_the_sum_of_the_survivors_bit_for_bit(sites: int, early: int, late: int, mute: int) -> None:
    """Sites are lost before they share, with the vector, and after it: these last ones are in the sum."""
    federation, draw = Federation(sites), np.random.default_rng(sites)
    names = federation.names
    words = {name: draw.integers(0, 2**32, 257, dtype=np.uint32) for name in names}
    federation.share(lost=names[:early])
    for name in federation.shared:
        federation.agree(name)
    survivors = names[early + late :]
    vectors = federation.vectors({name: words[name] for name in survivors})
    assert all((vectors[name] != words[name]).mean() > 0.9 for name in survivors)
    signed = [federation.sign(name, survivors) for name in survivors]
    told = {name: federation.reveal(name, signed) for name in survivors[mute:]}
    got = federation.unmask(vectors, told)
    assert got.tolist() == modular_sum([words[name] for name in survivors])


def test_with_as_many_sites_as_the_settings_ask_for_the_drop_outs_may_be_lost() -> None:
    for honest, colluders, drop_outs in itertools.product(range(2, 9), range(4), range(6)):
        sites = least_sites(honest, colluders, drop_outs)
        left = sites - drop_outs
        assert left >= honest + colluders
        assert left >= threshold(sites, colluders)
        fewer = sites - 1
        assert fewer - drop_outs < honest + colluders or fewer - drop_outs < threshold(fewer, colluders)


def test_so_many_may_be_lost_as_an_attempt_of_so_many_sites_survives() -> None:
    """Against a search of all numbers up to the settings'."""
    for honest, colluders, drop_outs, least in itertools.product(range(2, 7), range(3), range(5), (1, 4, 9)):
        for sites in range(honest + colluders, 24):
            found = may_be_lost(sites, honest, colluders, drop_outs, least)
            fits = [n for n in range(drop_outs + 1) if sites >= max(least + n, least_sites(honest, colluders, n))]
            assert found == max(fits, default=0)
            left = sites - found
            assert left >= honest + colluders
            assert left >= threshold(sites, colluders)


def test_a_threshold_has_an_honest_site_in_common_to_any_two_groups() -> None:
    for sites, colluders in itertools.product(range(3, 120), range(4)):
        if colluders < sites:
            needed = threshold(sites, colluders)
            assert 2 * (needed - colluders) > sites - colluders
            assert 2 * (needed - 1 - colluders) <= sites - colluders, "a lower one would do"


def test_the_noise_of_the_fewest_survivors_is_what_is_priced() -> None:
    """Six sites, two are lost, one of the others adds no noise: what is left is that of three, which is priced."""
    terms = Terms(2.0, 0.5, 1.0, 1, honest_sites=3, colluders=1)
    federation = Federation(least_sites(3, 1, 2), terms)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    survivors = federation.names[2:]
    numbers = 20_000
    words = {name: rounded(torch.zeros(numbers), terms.noise_share) for name in survivors[1:]}
    words[survivors[0]] = np.zeros(numbers, dtype=np.uint32)
    vectors = federation.vectors(words)
    signed = [federation.sign(name, survivors) for name in survivors]
    with pytest.raises(ProtocolError, match="need 4"):
        federation.holders[survivors[0]].sign(survivors[:3], federation.identities[survivors[0]])
    told = {name: federation.reveal(name, signed) for name in survivors}
    left = total([federation.unmask(vectors, told)], terms.noise_share)
    priced = terms.noise_multiplier * terms.clip_norm
    assert not out_of_band(float((left / priced).square().sum()), numbers)
    # The planted fault: shares of the noise for all sites that began.
    short = Terms(2.0, 0.5, 1.0, 1, honest_sites=5, colluders=1)
    noise = sum(total([rounded(torch.zeros(numbers), short.noise_share)], short.noise_share) for _ in range(3))
    assert isinstance(noise, torch.Tensor)
    assert out_of_band(float((noise / priced).square().sum()), numbers)


# --- what one vector tells --------------------------------------------------------------------------------------------
def test_a_vector_that_came_late_stays_uniform_although_its_key_is_told() -> None:
    """The server calls a site lost and has its vector: every mask of its pairs is known then, and its own is not."""
    federation = Federation(4)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    lost, *survivors = federation.names
    vectors = federation.vectors(dict.fromkeys(federation.names, np.zeros(50_000, dtype=np.uint32)))
    late = vectors.pop(lost)
    signed = [federation.sign(name, survivors) for name in survivors]
    told = {name: federation.reveal(name, signed) for name in survivors}
    assert not federation.unmask(vectors, told).any()
    key = secret_of(federation, lost, told)
    offers = {site: shared.offer.public for site, shared in federation.shared.items()}
    assert X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw() == offers[lost]
    bare = without_pairs(federation, late, lost, key)
    assert is_uniform(late)
    assert is_uniform(bare)
    own = federation.holders  # the planted fault: a site that tells both
    both = {name: own[name].held[lost][:SHARE_BYTES] for name in survivors}
    numbers = [1 + federation.names.index(name) for name in survivors]
    seed = combined(list(both.values())[:3], weights(numbers[:3]))
    assert not (bare - mask_of(seed, len(bare))).any(), "the check is blind"


def secret_of(federation: Federation, site: str, told: dict[str, tuple[bytes, ...]]) -> bytes:
    """Return what the shares of a site make."""
    needed, place = threshold(len(federation.names), federation.terms.colluders), list(federation.shared).index(site)
    chosen = sorted(told)[:needed]
    numbers = [1 + federation.names.index(name) for name in chosen]
    return combined([told[name][place] for name in chosen], weights(numbers))


def without_pairs(federation: Federation, vector: Words, site: str, key: bytes) -> Words:
    """Take all masks of a site's pairs off its vector, with the secret half of its key."""
    own, left, digest = X25519PrivateKey.from_private_bytes(key), vector.copy(), federation.holders[site].digest
    for peer, shared in federation.shared.items():
        if peer != site:
            mask = mask_of(pair_seed(own, shared.offer.public, digest, site, peer), len(left))
            left = left - mask if site < peer else left + mask
    return left


# --- a server that lies -----------------------------------------------------------------------------------------------
@contextmanager
def planted(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def both_secrets(colluder: str = "site-06") -> tuple[Federation, Words]:
    """Tell half of the honest sites that site 0 survived and the others that it was lost; return what is left of it.

    Seven sites; the last one colludes, and signs and tells whatever the server wants.

    Raises:
        ProtocolError: a site refuses.
    """
    federation = Federation(7)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    victim, names = "site-00", federation.names
    vectors = federation.vectors(dict.fromkeys(names, np.zeros(2_000, dtype=np.uint32)))
    told = []
    for group, survivors in ((names[:3], names), (names[3:6], names[1:])):
        signed = [federation.sign(name, survivors) for name in group]
        mole = federation.holders[colluder]
        mole.survivors = ()
        signed.append(mole.sign(survivors, federation.identities[colluder]))
        shares = {name: federation.reveal(name, signed)[0] for name in group}
        shares[colluder] = mole.held[victim][:SHARE_BYTES] if victim in survivors else mole.held[victim][SHARE_BYTES:]
        numbers = [1 + names.index(name) for name in shares]
        told.append(combined(list(shares.values()), weights(numbers)))
    seed, key = told
    return federation, without_pairs(federation, vectors[victim], victim, key) - mask_of(seed, 2_000)


def test_two_lists_of_survivors_have_too_few_signatures_each() -> None:
    with pytest.raises(ProtocolError, match="4 sites have signed the survivors, and 5 are needed"):
        both_secrets()
    # The planted fault: half of the sites tell a secret, so that two halves tell both.
    with planted(recovery, "threshold", lambda sites, colluders: sites // 2 + 1):
        _, left = both_secrets()
    assert not left.any(), "the attack does not work: the refusal is of something else"


def test_a_site_signs_one_list_of_survivors() -> None:
    federation = Federation(4)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    first = federation.sign("site-01", federation.names)
    assert federation.sign("site-01", federation.names) == first
    with pytest.raises(ProtocolError, match="other survivors were signed for"):
        federation.sign("site-01", federation.names[1:])
    signed = [first, *(federation.sign(name, federation.names) for name in ("site-00", "site-02"))]
    own_masks = federation.reveal("site-01", signed)
    assert own_masks == tuple(shares[:SHARE_BYTES] for shares in federation.holders["site-01"].held.values())
    # The planted fault: it signs whatever it is asked for, and tells both shares of each site.
    for name in ("site-01", "site-02", "site-03"):
        federation.holders[name].survivors = ()
    others = [federation.sign(name, federation.names[1:]) for name in ("site-01", "site-02", "site-03")]
    assert federation.reveal("site-01", others)[0] == federation.holders["site-01"].held["site-00"][SHARE_BYTES:]


def test_signatures_that_are_forged_or_of_something_else_do_not_count() -> None:
    federation = Federation(5)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    survivors = federation.names[1:]
    signed = [federation.sign(name, survivors) for name in survivors]
    good = {own.site: own.signature for own in signed}
    three = {site: signature for site, signature in good.items() if site != "site-02"}
    asked = federation.holders["site-01"]
    other = Holder(asked.name, "site-02", bytes(32), asked.threshold, asked.least, asked.held)
    lies = {
        "forged": {**good, "site-02": bytes(64)},
        "of another site": {**good, "site-02": good["site-03"]},
        "of a site that was lost": {**three, "site-00": federation.identities["site-00"].sign(asked._signed())},
        "of nobody": {**three, "mole": good["site-01"]},
        "too few": three,
        "of another context": {**good, "site-02": other.sign(survivors, federation.identities["site-02"]).signature},
        "of other survivors": {
            **good,
            "site-02": Holder(asked.name, "site-02", asked.digest, 1, (1, 0), asked.held)
            .sign(["site-02", "site-03"], federation.identities["site-02"])
            .signature,
        },
    }
    assert threshold(5, 1) == 4
    for signatures in lies.values():
        with pytest.raises(ProtocolError, match="3 sites have signed the survivors, and 4 are needed"):
            asked.reveal(signatures, federation.roster)
    told = asked.reveal(good, federation.roster)
    assert asked.reveal({**good, "site-00": bytes(64), "mole": good["site-01"]}, federation.roster) == told
    with planted(signing, "is_signed", lambda *own: True):  # the planted fault
        assert asked.reveal(lies["forged"], federation.roster)


def test_lists_that_are_none_are_not_signed() -> None:
    federation = Federation(5)
    federation.share(lost=["site-04"])
    for name in federation.shared:
        federation.agree(name)
    asked, names = federation.holders["site-01"], federation.names
    with pytest.raises(ProtocolError, match="signed for no survivors"):
        asked.reveal({}, federation.roster)
    for survivors in (
        names,  # one has no vector: it has shared nothing
        [names[0], *names[2:4]],  # not this site
        [names[1], names[0], names[2]],
        [names[0], names[1], names[1], names[2]],
        [*names[:3], "mole"],
    ):
        with pytest.raises(ProtocolError, match="not sites of the sum"):
            federation.sign("site-01", survivors)
    with pytest.raises(ProtocolError, match="need 3"):
        federation.sign("site-01", names[:2])


def test_lies_about_the_sites_are_refused_before_a_vector_is_masked() -> None:
    federation = Federation(5)
    names, mole = federation.names, Identity.new()
    own = federation.attempts["site-01"]
    strange = RecoverableAttempt(own.name, "mole", mole).offer
    second = RecoverableAttempt(own.name, "site-01", federation.identities["site-01"]).offer
    keys = {offer.site: offer for offer in federation.offers()}
    for offers, words in (
        ([*keys.values(), strange], "'mole' is not in the roster"),
        ([*keys.values(), keys["site-02"]], "'site-02' is there twice"),
        ([KeyOffer("site-02", keys["site-03"].public, keys["site-02"].signature), keys["site-01"]], "'site-02' is not"),
        ([second, keys["site-02"], keys["site-03"]], "own key is not among"),
        ([keys["site-01"], keys["site-02"]], "need 3"),
    ):
        with pytest.raises(ProtocolError, match=words):
            own.share(offers, federation.roster, 2, 1)
    with pytest.raises(ProtocolError, match="has shared no secrets"):
        own.agree(list(keys.values()), [], federation.roster, TERMS, TASK)
    federation.share(names=names[:4])
    sealed = federation.sealed("site-01", names[:4])
    offers = [federation.shared[name].offer for name in names[:4]]
    # The fifth has shared among other sites, and so has signed another list of holders.
    federation.attempts["site-04"].share(federation.offers(), federation.roster, 2, 1)
    fifth = federation.attempts["site-04"].share(federation.offers(), federation.roster, 2, 1)
    for told, boxes, words in (
        ([*offers, fifth.offer], [*sealed, fifth.sealed[1]], "'site-04' is not signed by that site"),
        (offers, [sealed[1], sealed[0], *sealed[2:]], "'site-00' cannot be opened"),
        (offers, [*federation.sealed("site-02", names[:4])], "'site-00' cannot be opened"),
        (offers, [b"", *sealed[1:]], "'site-00' cannot be opened"),
        (offers, sealed[1:], "3 sealed shares of 4 sites"),
        (offers[:2], sealed[:2], "need 3"),
        ([offers[0], keys["site-01"], *offers[2:]], sealed, "'site-01' is not signed by that site"),
    ):
        with pytest.raises(ProtocolError, match=words):
            own.agree(told, boxes, federation.roster, TERMS, TASK)
    assert federation.agree("site-01", names[:4]).held
    own.masked(np.zeros(3, dtype=np.uint32))
    for again in (
        lambda: own.masked(np.zeros(3, dtype=np.uint32)),
        lambda: federation.agree("site-01", names[:4]),
        lambda: own.share(federation.offers(), federation.roster, 2, 1),
    ):
        with pytest.raises(MechanismError, match="one vector"):
            again()


def test_a_task_that_comes_twice_has_one_answer_and_other_sites_have_other_secrets() -> None:
    federation = Federation(5)
    own = federation.attempts["site-01"]
    first = own.share(federation.offers(), federation.roster, 2, 1)
    again = RecoverableAttempt(own.name, "site-01", federation.identities["site-01"], own.secret)
    assert again.offer == own.offer
    assert again.share(list(reversed(federation.offers())), federation.roster, 2, 1) == first
    fewer = own.share(federation.offers(federation.names[:4]), federation.roster, 2, 1)
    assert fewer.offer.public != first.offer.public
    assert not set(fewer.sealed) & set(first.sealed)


def test_no_two_secrets_share_a_polynomial_and_no_two_directions_of_a_pair_a_key_stream() -> None:
    federation = Federation(5)
    federation.share()
    held = {name: federation.agree(name).held for name in federation.names}
    for site in federation.names:
        pairs = [(own[site][:SHARE_BYTES], own[site][SHARE_BYTES:]) for own in held.values()]
        apart = {(int.from_bytes(one, "big") - int.from_bytes(other, "big")) % PRIME for one, other in pairs}
        assert len(apart) == 5, "one share of each tells how far a site's two secrets are apart"
    first, second = federation.names[:2]
    streams = [
        bytes(a ^ b for a, b in zip(federation.sealed(holder, [sender])[0], held[holder][sender], strict=False))
        for sender, holder in ((first, second), (second, first))
    ]
    assert streams[0] != streams[1], "a key seals twice"


def test_masks_are_bound_to_who_holds_shares_and_to_how_many_tell_a_secret() -> None:
    federation = Federation(5)
    federation.share()
    holder, own = federation.agree("site-01"), federation.attempts["site-01"]
    keys = {name: shared.offer.public for name, shared in federation.shared.items()}
    values = {**asdict(own.name), "threshold": 4, "keys": [[o.site, o.public] for o in federation.offers()]}
    sharing = hashlib.sha256(canonical("fedveil/secure-sum/1/sharing", values)).digest()
    assert holder.threshold == 4
    assert holder.digest == Context(own.name, TERMS, TASK, keys, sharing).digest()
    assert holder.digest != Context(own.name, TERMS, TASK, keys).digest()


def test_the_key_of_a_lost_site_opens_nothing_that_was_sealed_for_it() -> None:
    """With one key for masks and seals, the server would have one share more of everybody from each lost site."""

    def opened(federation: Federation) -> bool:
        lost, *survivors = federation.names
        federation.share()
        for name in federation.names:
            federation.agree(name)
        signed = [federation.sign(name, survivors) for name in survivors]
        key = X25519PrivateKey.from_private_bytes(
            secret_of(federation, lost, {name: federation.reveal(name, signed) for name in survivors})
        )
        victim = federation.attempts["site-01"]
        box = recovery._box(key, victim.sealing["site-01"], victim._sharing(), "site-01", lost, "site-01")
        assert isinstance(box, ChaCha20Poly1305)
        try:
            box.decrypt(bytes(12), federation.shared["site-01"].sealed[0], None)
        except recovery.InvalidTag:
            return False
        return True

    assert not opened(Federation(5))
    derive = RecoverableAttempt._own_key
    one = lambda own, what, salt=b"": derive(own, "sealing key")  # noqa: E731
    derived = RecoverableAttempt._derived

    def same(own: RecoverableAttempt, what: str, salt: bytes = b"") -> bytes:
        return derived(own, "sealing key") if what == "mask key" else derived(own, what, salt)

    with planted(RecoverableAttempt, "_own_key", one), planted(RecoverableAttempt, "_derived", same):
        assert opened(Federation(5))


def test_too_few_answers_or_false_ones_make_no_sum() -> None:
    federation = Federation(5)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    survivors = federation.names[1:]
    vectors = federation.vectors(dict.fromkeys(survivors, np.arange(50_000, dtype=np.uint32)))
    signed = [federation.sign(name, survivors) for name in survivors]
    told = {name: federation.reveal(name, signed) for name in survivors}
    with pytest.raises(ProtocolError, match="3 sites told their shares, and 4 are needed"):
        federation.unmask(vectors, dict(list(told.items())[:3]))
    for bad, words in (
        ((told["site-02"][1], *told["site-01"][1:]), "not of its key|do not belong together"),
        (told["site-01"][1:], "3 sites told their shares, and 4 are needed"),
        ((b"", *told["site-01"][1:]), "3 sites told their shares, and 4 are needed"),
    ):
        with pytest.raises(ProtocolError, match=words):
            federation.unmask(vectors, {**told, "site-01": bad})
    # A false share of an own mask shows in nothing but the sum, which is uniform then.
    false = (told["site-01"][0], told["site-01"][2], *told["site-01"][2:])
    try:
        assert is_uniform(federation.unmask(vectors, {**told, "site-01": false}))
    except ProtocolError as error:
        assert "do not belong together" in str(error)  # noqa: PT017
    assert federation.unmask(vectors, told).tolist() == (4 * np.arange(50_000)).tolist()


@pytest.mark.parametrize("bad", ["one fewer", "one more", "too short", "no number of the field"])
def test_an_answer_that_is_no_shares_is_left_out_if_the_others_suffice(bad: str) -> None:
    federation = Federation(5)
    federation.share()
    for name in federation.names:
        federation.agree(name)
    words = {name: np.full(257, 2**31 + 5 * i, dtype=np.uint32) for i, name in enumerate(federation.names)}
    vectors = federation.vectors(words)
    signed = [federation.sign(name, federation.names) for name in federation.names]
    told = {name: federation.reveal(name, signed) for name in federation.names}
    whole = told["site-00"]
    told["site-00"] = {
        "one fewer": whole[1:],
        "one more": (*whole, whole[0]),
        "too short": (whole[0][1:], *whole[1:]),
        "no number of the field": (*whole[:-1], PRIME.to_bytes(SHARE_BYTES, "big")),
    }[bad]
    assert federation.unmask(vectors, told).tolist() == modular_sum(list(words.values()))

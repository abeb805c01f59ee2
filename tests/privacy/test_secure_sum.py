"""Sums of which nobody sees the parts: masks that cancel and hide, keys that are checked, noise that is a share."""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from audits.bands import out_of_band, related
from fedveil.common.errors import ConfigError, DataError, MechanismError, ProtocolError
from fedveil.privacy.accounting import epsilon, gaussian_release, noise_multiplier_for
from fedveil.privacy.randomness import noise_grid
from fedveil.privacy.secure_sum import (
    AttemptName,
    Context,
    Identity,
    KeyOffer,
    Roster,
    SiteAttempt,
    Task,
    Terms,
    attempt,
    check_headroom,
    masks,
    noise_share,
    rounded,
    rounding,
    total,
)
from fedveil.privacy.secure_sum import context as context_module
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.identity import is_signed
from fedveil.privacy.secure_sum.masks import Words, add_mask, mask_of, pair_seed
from fedveil.privacy.secure_sum.roster import load_roster, parse_roster

TERMS = Terms(noise_multiplier=4.8, clip_norm=0.5, sample_rate=0.33, rounds=12, honest_sites=2, colluders=1)
TASK = Task(base="b" * 64, start="c" * 64, basis="", state=bytes(32), layout=bytes(8))


@dataclass
class Federation:
    """Sites with signing keys and a roster of them; each round is one attempt of all."""

    sites: int
    identities: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = {f"site-{i:02}": Identity.new() for i in range(self.sites)}
        self.roster = Roster({name: identity.public for name, identity in self.identities.items()})
        self.begin()

    def begin(self, number: int = 0) -> None:
        """Make everybody's key of an attempt."""
        name = AttemptName("run", 3, number, self.roster.digest)
        self.attempts = {site: SiteAttempt(name, site, identity) for site, identity in self.identities.items()}
        self.offers = [own.offer for own in self.attempts.values()]

    def agree(self, terms: Mapping[str, Terms] | None = None, task: Mapping[str, Task] | None = None) -> None:
        """Let all agree, those that are named to other terms or another task."""
        for site, own in self.attempts.items():
            own.agree(self.offers, self.roster, (terms or {}).get(site, TERMS), (task or {}).get(site, TASK))

    def masked(self, words: Mapping[str, Words]) -> list[Words]:
        """Return what all send."""
        return [self.attempts[site].masked(words[site]) for site in self.attempts]

    def zeros(self, count: int) -> dict[str, Words]:
        """Return vectors of nothing."""
        return {site: np.zeros(count, dtype=np.uint32) for site in self.identities}


def is_uniform(words: Words) -> bool:
    """Return whether all four bytes of words look uniform, and successive words unrelated; false alarms: 1e-6."""
    cells = [np.bincount((words >> shift) & 255, minlength=256) for shift in (0, 8, 16, 24)]
    statistics = [float(((found - len(words) / 256) ** 2 / (len(words) / 256)).sum()) for found in cells]
    left, right = (torch.from_numpy(part.astype(np.float64)) for part in (words[:-1], words[1:]))
    return not any(out_of_band(statistic, 255) for statistic in statistics) and not related(left, right)


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [3, 4, 7, 20])
def test_the_server_gets_the_sum_bit_for_bit(sites: int) -> None:
    federation, draw = Federation(sites), np.random.default_rng(sites)
    federation.agree()
    words = {site: draw.integers(0, 2**32, 1001, dtype=np.uint32) for site in federation.identities}
    sent = federation.masked(words)
    wanted = sum(int_words.astype(object) for int_words in words.values()) % 2**32
    got = np.add.reduce(sent, dtype=np.uint32)
    assert got.tolist() == wanted.tolist()
    assert all((own != masked).mean() > 0.99 for own, masked in zip(words.values(), sent, strict=True))


def test_words_beyond_half_of_the_range_are_numbers_below_zero() -> None:
    vectors = [np.array([2**32 - 1, 5], dtype=np.uint32), np.array([0, 2**32 - 9], dtype=np.uint32)]
    assert total(iter(vectors), 2.0).tolist() == [-noise_grid(2.0), -4 * noise_grid(2.0)]


def test_vectors_that_have_no_sum_are_refused() -> None:
    with pytest.raises(ProtocolError, match="without vectors"):
        total([], 1.0)
    for other in (np.zeros(2, dtype=np.uint32), np.zeros((3, 1), dtype=np.uint32), np.zeros(3)):
        with pytest.raises(ProtocolError, match="not words of one number"):
            total([np.zeros(3, dtype=np.uint32), other], 1.0)


# --- what one vector, or all but one, tell ----------------------------------------------------------------------------


def test_an_upload_of_zeros_is_uniform_and_two_of_equal_data_share_nothing() -> None:
    federation = Federation(4)
    federation.agree()
    first = federation.masked(federation.zeros(100_000))[0]
    federation.begin(number=1)
    federation.agree()
    second = federation.masked(federation.zeros(100_000))[0]
    assert is_uniform(first)
    assert is_uniform(second)
    assert is_uniform(first - second)


@pytest.mark.parametrize("missing", [0, 2, 3])
def test_without_one_upload_the_others_tell_nothing(missing: int) -> None:
    federation = Federation(4)
    federation.agree()
    truth = np.arange(100_000, dtype=np.uint32) % 1000
    sent = federation.masked(dict.fromkeys(federation.identities, truth))
    got = np.add.reduce([part for i, part in enumerate(sent) if i != missing], dtype=np.uint32)
    assert is_uniform(got)
    assert not related(torch.from_numpy(got.astype(np.float64)), torch.from_numpy(truth.astype(np.float64)))
    whole = np.add.reduce(sent, dtype=np.uint32).astype(np.float64)
    assert related(torch.from_numpy(whole), torch.from_numpy(truth.astype(np.float64))), "the check sees no data at all"


CHANGED: dict[str, Any] = {
    "noise_multiplier": 4.800001,
    "clip_norm": 0.5000001,
    "sample_rate": 0.3300001,
    "rounds": 13,
    "honest_sites": 1,
    "colluders": 2,
    "base": "d" * 64,
    "start": "d" * 64,
    "basis": "d" * 64,
    "state": bytes(31) + b"\1",
    "layout": bytes(7) + b"\1",
}


def test_every_figure_and_hash_is_tried() -> None:
    assert set(CHANGED) == {item.name for kind in (Terms, Task) for item in fields(kind)}


@pytest.mark.parametrize("name", CHANGED)
def test_a_site_that_was_told_something_else_makes_the_sum_uniform(name: str) -> None:
    federation = Federation(4)
    other: Any = TERMS if name in {item.name for item in fields(Terms)} else TASK
    told = {"site-01": replace(other, **{name: CHANGED[name]})}
    federation.agree(terms=told if other is TERMS else None, task=told if other is TASK else None)
    assert is_uniform(np.add.reduce(federation.masked(federation.zeros(50_000)), dtype=np.uint32))


def test_whatever_is_in_a_context_changes_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    name, keys = AttemptName("run", 1, 0, "r" * 64), {"a": bytes(32), "b": b"x" * 32}
    names = [replace(name, **{k: v}) for k, v in {"run": "rum", "round_number": 2, "attempt": 1, "roster": "s"}.items()]
    others: list[Any] = [{"a": b"x" * 32, "b": bytes(32)}, {"a": bytes(32)}, {**keys, "c": b"y" * 32}]
    contexts = [Context(name, TERMS, TASK, keys), *(Context(other, TERMS, TASK, keys) for other in names)]
    contexts += [Context(name, TERMS, TASK, other) for other in others]
    digests = [context.digest() for context in contexts]
    for grid in (1.0, 2.0):
        monkeypatch.setattr(context_module, "noise_grid", lambda std, grid=grid: grid)
        digests.append(contexts[0].digest())
    monkeypatch.setattr(context_module, "WORD_BITS", 33)
    digests.append(contexts[0].digest())
    assert len(set(digests)) == len(digests) == 11
    assert contexts[0].digest() == Context(name, TERMS, TASK, dict(reversed(keys.items()))).digest()


@pytest.mark.parametrize("split", [1, 2])
def test_a_server_that_shows_some_sites_other_keys_gets_uniform_words(split: int) -> None:
    federation = Federation(4)
    names = list(federation.identities)
    liar = names[3]
    # The fourth site colludes: it signs two keys for one attempt, and the server shows one of them to some.
    second = SiteAttempt(federation.attempts[liar].name, liar, federation.identities[liar])
    other = [second.offer if offer.site == liar else offer for offer in federation.offers]
    for i, site in enumerate(names[:3]):
        federation.attempts[site].agree(other if i < split else federation.offers, federation.roster, TERMS, TASK)
    honest = [federation.attempts[site].masked(np.zeros(50_000, dtype=np.uint32)) for site in names[:3]]
    # It knows the seeds of the fourth's masks and takes them away. The honest ones' among each other stay.
    for i, site in enumerate(names[:3]):
        own, shown = (second, other) if i < split else (federation.attempts[liar], federation.offers)
        context = Context(own.name, TERMS, TASK, {offer.site: offer.public for offer in shown})
        assert own._private is not None
        seed = pair_seed(own._private, federation.attempts[site].offer.public, context.digest(), liar, site)
        add_mask(honest[i], seed, liar, site)
    assert is_uniform(np.add.reduce(honest, dtype=np.uint32))


# --- known answers ----------------------------------------------------------------------------------------------------


ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
SECRET = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
"""Keys and secret of RFC 7748, section 6.1."""


def seed_by_hand(secret: bytes, context: bytes, first: str, second: str) -> bytes:
    """RFC 5869 for one block, with the info written out byte by byte."""

    def text(words: str) -> bytes:
        return b"s" + struct.pack(">I", len(words)) + words.encode()

    info = text("fedveil/secure-sum/1/mask") + text("first") + text(first) + text("second") + text(second)
    extracted = hmac.new(context, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def test_a_pairs_seed_is_hkdf_of_the_secret_of_rfc_7748_whoever_derives_it() -> None:
    context = hashlib.sha256(b"context").digest()
    alice, bob = (X25519PrivateKey.from_private_bytes(key) for key in (ALICE, BOB))
    wanted = seed_by_hand(SECRET, context, "alice", "bob")
    assert pair_seed(alice, BOB_PUBLIC, context, "alice", "bob") == wanted
    assert pair_seed(bob, ALICE_PUBLIC, context, "bob", "alice") == wanted


def test_hkdf_by_hand_is_that_of_rfc_5869(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "canonical", lambda purpose, values: bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))

    class Given:
        def exchange(self, key: object) -> bytes:
            return bytes.fromhex("0b" * 22)

    given: Any = Given()
    got = pair_seed(given, BOB_PUBLIC, bytes.fromhex("000102030405060708090a0b0c"), "a", "b")
    # Test case 1 of its appendix A; the block is cut to the seed's length.
    assert got.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_a_masks_words_are_aes_in_counter_mode_from_0() -> None:
    seed = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    # NIST SP 800-38A, F.1.5.
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    assert block.update(plain).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(3))
    assert mask_of(seed, 11).tolist() == list(struct.unpack("<12I", stream))[:11]
    assert mask_of(seed, 0).tolist() == []


def test_a_signature_is_that_of_rfc_8032() -> None:
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    identity = Identity(Ed25519PrivateKey.from_private_bytes(secret))
    assert identity.public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b"
    )
    assert identity.sign(b"").hex() == signature
    assert is_signed(b"", bytes.fromhex(signature), identity.public)
    assert not is_signed(b"x", bytes.fromhex(signature), identity.public)
    assert not is_signed(b"", bytes(63), identity.public)
    assert not is_signed(b"", bytes.fromhex(signature), bytes(31))


def test_of_a_pair_the_first_name_adds_the_mask() -> None:
    seed, words = bytes(range(32)), np.zeros(5, dtype=np.uint32)
    add_mask(words, seed, "a", "b")
    assert words.tolist() == mask_of(seed, 5).tolist()
    add_mask(words, seed, "b", "a")
    assert words.tolist() == [0] * 5


def test_a_mask_never_changes_between_versions() -> None:
    keys = {"alice": ALICE_PUBLIC, "bob": BOB_PUBLIC}
    context = Context(AttemptName("run", 1, 0, "r" * 64), TERMS, TASK, keys)
    assert hashlib.sha256(context.encoded()).digest() == context.digest()
    seed = pair_seed(X25519PrivateKey.from_private_bytes(ALICE), BOB_PUBLIC, context.digest(), "alice", "bob")
    assert context.digest().hex() == "522135808f61e4f9373f49175b39a0b7d6126d56ac1e761230770bac0dc7b160"
    assert mask_of(seed, 3).tolist() == [2993847814, 1806371724, 3529367747]


# --- one encoding -----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(
        st.text(max_size=4),
        st.binary(max_size=4),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def told_apart(value: Any) -> Any:
    """Return a value such that two are equal only where type and content are."""
    if isinstance(value, dict):
        return {name: told_apart(item) for name, item in value.items()}
    return [told_apart(item) for item in value] if isinstance(value, list) else (type(value).__name__, value)


@settings(max_examples=50, deadline=None)
@example(("x", {"ab": "c"}), ("x", {"a": "bc"}))
@example(("x", {"a": ["b", "c"]}), ("x", {"a": ["bc"]}))
@example(("x", {"a": "b"}), ("x", {"a": b"b"}))
@example(("x", {"a": 1}), ("x", {"a": 1.0}))
@example(("x", {"a": [[], "b"]}), ("x", {"a": [["b"]]}))
@given(*(st.tuples(st.text(max_size=3), st.dictionaries(st.text(max_size=3), VALUES, max_size=4)) for _ in range(2)))
def test_two_contents_have_two_encodings(left: tuple[str, dict[str, Any]], right: tuple[str, dict[str, Any]]) -> None:
    same = left[0] == right[0] and told_apart(left[1]) == told_apart(right[1])
    assert (canonical(*left) == canonical(*right)) == same
    assert canonical(*left) == canonical(left[0], dict(reversed(left[1].items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, -(2**63) - 1])
def test_a_number_that_sites_cannot_agree_on_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="sites cannot agree on it"):
        canonical("x", {"a": value})


def test_zero_has_no_sign() -> None:
    assert canonical("x", {"a": 0.0}) == canonical("x", {"a": -0.0}) != canonical("x", {"a": 0})


# --- what a site refuses ----------------------------------------------------------------------------------------------

Lie = Callable[[Federation], Sequence[KeyOffer]]


def another_attempts(federation: Federation) -> list[KeyOffer]:
    old = federation.offers
    federation.begin(number=1)
    return [*federation.offers[:2], *old[2:]]


def of_another_round(federation: Federation) -> list[KeyOffer]:
    name = replace(federation.attempts["site-01"].name, round_number=2)
    return [*federation.offers[:1], SiteAttempt(name, "site-01", federation.identities["site-01"]).offer]


def signed_by_another(federation: Federation) -> list[KeyOffer]:
    stranger = SiteAttempt(federation.attempts["site-01"].name, "site-01", federation.identities["site-02"])
    return [federation.offers[0], stranger.offer, *federation.offers[2:]]


def own_swapped(federation: Federation) -> list[KeyOffer]:
    again = SiteAttempt(federation.attempts["site-00"].name, "site-00", federation.identities["site-00"])
    return [again.offer, *federation.offers[1:]]


def key_of_two(federation: Federation) -> list[KeyOffer]:
    first, second = federation.attempts["site-01"].offer, federation.identities["site-02"]
    signed = second.sign(attempt._signed(federation.attempts["site-02"].name, "site-02", first.public))
    return [*federation.offers[:2], KeyOffer("site-02", first.public, signed), *federation.offers[3:]]


def without_secret(federation: Federation) -> list[KeyOffer]:
    zero = bytes(32)
    signed = federation.identities["site-03"].sign(
        attempt._signed(federation.attempts["site-03"].name, "site-03", zero)
    )
    return [*federation.offers[:3], KeyOffer("site-03", zero, signed)]


def with_a_stranger(federation: Federation) -> list[KeyOffer]:
    stranger = SiteAttempt(federation.attempts["site-00"].name, "mallory", Identity.new())
    return [*federation.offers, stranger.offer]


LIES: dict[str, tuple[Lie, str]] = {
    "a site that is in no roster": (with_a_stranger, "'mallory' is not in the roster"),
    "a site twice": (lambda f: [*f.offers, f.offers[1]], "'site-01' is there twice"),
    "a key twice": (key_of_two, "'site-02' is there twice"),
    "a key signed by another": (signed_by_another, "'site-01' is not signed by that site for this attempt"),
    "a key of another attempt": (another_attempts, "'site-02' is not signed by that site for this attempt"),
    "a key of another round": (of_another_round, "'site-01' is not signed by that site for this attempt"),
    "another key of this site": (own_swapped, "own key is not among those of the attempt"),
    "this site left out": (lambda f: f.offers[1:], "own key is not among those of the attempt"),
    "too few sites": (lambda f: f.offers[:2], "has 2 sites: 2 honest ones beside 1 that may collude need 3"),
    "none": (lambda f: [], "own key is not among those"),
    "a key that makes no secret": (without_secret, "the key of site 'site-03' makes no secret"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_servers_lie_about_the_sites_is_refused_and_the_truth_goes_on(lie: str) -> None:
    federation, (told, words) = Federation(4), LIES[lie]
    shown = told(federation)
    own = federation.attempts["site-00"]
    with pytest.raises(ProtocolError, match=words):
        own.agree(shown, federation.roster, TERMS, TASK)
    with pytest.raises(MechanismError, match="once it is agreed on"):
        own.masked(np.zeros(3, dtype=np.uint32))
    federation.agree()
    assert np.add.reduce(federation.masked(federation.zeros(3)), dtype=np.uint32).tolist() == [0, 0, 0]


def test_a_roster_of_the_servers_own_is_refused() -> None:
    federation = Federation(3)
    invented = {f"sybil-{i}": Identity.new() for i in range(5)}
    keys = {**federation.roster.keys, **{name: identity.public for name, identity in invented.items()}}
    own = SiteAttempt(AttemptName("run", 3, 0, Roster(keys).digest), "site-00", federation.identities["site-00"])
    offers = [own.offer, *(SiteAttempt(own.name, name, identity).offer for name, identity in invented.items())]
    with pytest.raises(ProtocolError, match="another roster than this site's"):
        own.agree(offers, federation.roster, TERMS, TASK)
    # The planted fault: a site that believes the server's roster. All its peers are the server.
    own.agree(offers, Roster(keys), TERMS, TASK)


def test_another_task_for_one_attempt_is_refused_and_the_same_is_not() -> None:
    federation = Federation(3)
    federation.agree()
    federation.agree()
    own = federation.attempts["site-00"]
    for terms, task in ((replace(TERMS, rounds=13), TASK), (TERMS, replace(TASK, state=b"x" * 32))):
        with pytest.raises(ProtocolError, match="another task was given"):
            own.agree(federation.offers, federation.roster, terms, task)
    assert np.add.reduce(federation.masked(federation.zeros(3)), dtype=np.uint32).tolist() == [0, 0, 0]


def test_an_attempt_masks_one_vector() -> None:
    federation = Federation(3)
    federation.agree()
    federation.masked(federation.zeros(3))
    for again in (lambda: None, federation.agree):
        again()
        with pytest.raises(MechanismError, match="no second one"):
            federation.masked(federation.zeros(3))


def check_that_no_mask_is_used_twice() -> None:
    used: list[tuple[bytes, str]] = []

    def spying(words: Words, seed: bytes, own: str, peer: str) -> None:
        used.append((seed, own))
        add_mask(words, seed, own, peer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempt, "add_mask", spying)
        federation = Federation(4)
        for number in range(3):  # the same round again, with the same terms, task and sites
            federation.begin(number)
            federation.agree()
            federation.masked(federation.zeros(3))
        federation.begin(number=2)  # and the same attempt, after all sites have lost their memory
        federation.agree()
        federation.masked(federation.zeros(3))
    assert len(used) == len(set(used)) == 4 * 12, "one site used one seed twice"
    assert len({seed for seed, _ in used}) == 4 * 6, "a seed is used by both sites of its pair, and no other"


def test_no_two_vectors_ever_leave_under_one_mask() -> None:
    check_that_no_mask_is_used_twice()


def test_keys_that_are_made_of_the_attempts_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a site that was started anew makes the same key, and masks another vector with it."""

    class Repeating(X25519PrivateKey):
        made: ClassVar[int] = 0

        @classmethod
        def generate(cls) -> X25519PrivateKey:
            cls.made += 1
            # The keys of the four sites' third attempt come again in the fourth.
            number = cls.made - 4 if cls.made > 16 else cls.made
            return X25519PrivateKey.from_private_bytes(number.to_bytes(32))

    monkeypatch.setattr(attempt, "X25519PrivateKey", Repeating)
    with pytest.raises(AssertionError, match="used one seed twice"):
        check_that_no_mask_is_used_twice()


# --- rosters and identities -------------------------------------------------------------------------------------------


def test_a_roster_is_known_by_names_and_keys_alone(tmp_path: Path) -> None:
    roster = Federation(3).roster
    (tmp_path / "peers.toml").write_text(roster.text())
    assert load_roster(tmp_path / "peers.toml").digest == roster.digest
    entries = [f'[[site]] # of {name}\nkey = "{key.hex()}"\nname = "{name}"\n' for name, key in roster.keys.items()]
    assert parse_roster("\n".join(reversed(entries)), "x").digest == roster.digest
    changed = dict(roster.keys)
    changed["site-00"], changed["site-01"] = changed["site-01"], changed["site-00"]
    assert len({Roster(changed).digest, Roster({**roster.keys, "x": bytes(32)}).digest, roster.digest}) == 3


def entry(name: str = "north", key: str = "1" * 64, more: str = "") -> str:
    return f'[[site]]\nname = "{name}"\nkey = "{key}"\n{more}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "3 to 1000 sites, not 0"),
        (entry() + entry("south", "2" * 64), "3 to 1000 sites, not 2"),
        (entry() + entry(), "'north' is there twice"),
        (entry() + entry("south") + entry("west", "2" * 64), "one key to 'north' and 'south'"),
        (entry(key="1" * 63), "'north' is not 64 hexadecimal digits"),
        (entry(key="1" * 63 + "G"), "'north' is not 64 hexadecimal digits"),
        (entry("no rth") + entry("b", "2" * 64) + entry("c", "3" * 64), "names a site 'no rth'"),
        (entry(more='kee = "x"'), r"unknown key 'kee' of a site \(did you mean 'key'"),
        ('[[sites]]\nname = "x"', r"unknown key 'sites' \(did you mean 'site'"),
        ('[[site]]\nname = "x"', "both texts: 'x' lacks one"),
        ('[site]\nname = "x"', r"write \[\[site\]\] over each"),
        ("[[site", "the roster here: "),
    ],
)
def test_a_file_that_is_no_roster_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_roster(text, "here")
    assert "\n" not in str(caught.value)


def test_a_roster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the roster .*peers\.toml cannot be read"):
        load_roster(tmp_path / "peers.toml")


def test_a_signing_key_survives_its_file_and_another_file_is_refused() -> None:
    identity = Identity.new()
    assert Identity.from_pem(identity.pem()).public == identity.public
    for content in (b"", b"-----BEGIN PRIVATE KEY-----", identity.public):
        with pytest.raises(DataError, match="make a new one"):
            Identity.from_pem(content)
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(DataError, match="not an Ed25519 key"):
        Identity.from_pem(other)


# --- noise and rounding -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1e5), st.floats(1e-6, 1e6), st.integers(1, 1000))
def test_the_parts_of_the_noise_are_the_least_that_make_the_whole(noise: float, clip: float, honest: int) -> None:
    whole = (Fraction(noise) * Fraction(clip)) ** 2
    share = noise_share(noise, clip, honest)
    assert honest * Fraction(share) ** 2 >= whole > honest * Fraction(float(np.nextafter(share, 0))) ** 2


def law_faults(sites: int, share: Callable[[Terms, int], float], numbers: int = 71_000) -> set[str]:
    """Return what is wrong with the noise of one site, or of the sum of all, on nothing; at 71,000 numbers ±1.3 %."""
    terms, faults = replace(TERMS, honest_sites=sites - 1), set()
    each = [rounded(torch.zeros(numbers), share(terms, sites)) for _ in range(sites)]
    for what, parts, honest in (("sum", each, sites / (sites - 1)), ("site", each[:1], 1 / (sites - 1))):
        noise = total(parts, share(terms, sites)) / (terms.noise_multiplier * terms.clip_norm)
        if (
            out_of_band(float(noise.square().sum()) / honest, numbers)
            or stats.kstest((noise / honest**0.5).numpy(), "norm").pvalue < 1e-6
        ):
            faults.add(what)
    return faults


@pytest.mark.parametrize("sites", [3, 8])
def test_noise_of_a_site_is_its_share_and_that_of_the_sum_the_whole(sites: int) -> None:
    assert law_faults(sites, lambda terms, _: terms.noise_share) == set()


def test_a_share_for_more_sites_than_are_honest_is_found() -> None:
    too_small: Callable[[Terms, int], float] = lambda terms, sites: noise_share(  # noqa: E731
        terms.noise_multiplier, terms.clip_norm, sites
    )
    assert law_faults(8, too_small) == {"sum", "site"}


@pytest.fixture
def quiet_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round without noise."""
    monkeypatch.setattr(rounding, "add_private_noise", lambda sums, std, step: (sums / step).round() * step)


@pytest.mark.usefixtures("quiet_rounding")
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_a_record_moves_the_sum_by_its_clip_and_one_rounding(seed: int, numbers: int) -> None:
    draw, share, step = torch.Generator().manual_seed(seed), 2.0, noise_grid(2.0)
    parts = [10 * torch.randn(numbers, generator=draw, dtype=torch.float64) for _ in range(3)]
    record = torch.randn(numbers, generator=draw, dtype=torch.float64)
    record *= 0.5 / record.norm()

    def summed(first: torch.Tensor) -> torch.Tensor:
        return total([rounded(part, share) for part in (first, *parts[1:])], share)

    def moved(by: torch.Tensor) -> float:
        return float((summed(parts[0] + by) - summed(parts[0])).norm())

    most = 0.5 + step * numbers**0.5
    assert moved(record) <= most
    assert moved(3 * record) > most, "a record of three clips went unnoticed"


@pytest.mark.usefixtures("quiet_rounding")
@pytest.mark.parametrize("steps", [0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**32 + 5, -(2**45) - 3, 2**52 + 1, 2**70])
def test_words_are_the_whole_steps_modulo_their_range(steps: int) -> None:
    sums = torch.tensor([steps * noise_grid(1.0)], dtype=torch.float64)
    assert rounded(sums, 1.0).tolist() == [steps % 2**32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_is_not_sent(value: float) -> None:
    with pytest.raises(MechanismError, match="not finite"):
        rounded(torch.tensor([0.0, value]), 1.0)


def most_records(share: float, sites: int) -> float:
    """Return the largest expected number of records that the guard lets pass, at clip 0.5."""
    low, high = 1.0, 1e12
    while high > low * 1.001:
        middle = (low * high) ** 0.5
        try:
            check_headroom(middle, 0.5, share, sites)
            low = middle
        except ConfigError:
            high = middle
    return low


@pytest.mark.usefixtures("quiet_rounding")
@pytest.mark.parametrize("sites", [3, 20, 100])
def test_what_the_guard_lets_pass_never_wraps_and_twice_of_it_does(sites: int) -> None:
    share, records = 0.3, most_records(0.3, sites)
    # Every record has all of its clip in one coordinate, of one sign, and there are six deviations more than expected.
    worst = (records + 6 * records**0.5) * 0.5

    def summed(whole: float) -> float:
        return float(total([rounded(torch.tensor([whole / sites]), share)] * sites, share))

    assert abs(summed(worst) - worst) <= 0.01 * worst
    assert abs(summed(2 * worst) - 2 * worst) > worst, "the guard refuses what fits"


def test_the_guard_says_what_to_do() -> None:
    check_headroom(7530, 0.5, noise_share(4.8, 0.5, 4), 5)
    with pytest.raises(ConfigError, match=r"does not fit 32 bits .*lower training.sample-rate"):
        check_headroom(1e8, 0.5, noise_share(4.8, 0.5, 4), 5)
    with pytest.raises(ConfigError, match="expected-records must be above 0"):
        check_headroom(0, 0.5, 1.0, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"clip_norm": 1e9},
        {"sample_rate": 1.5},
        {"rounds": 0},
        {"honest_sites": 0},
        {"colluders": -1},
    ],
)
def test_terms_that_no_run_has_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(TERMS, **wrong)


# --- faults built in --------------------------------------------------------------------------------------------------


def round_faults() -> set[str]:
    """Return what a round of four sites gives away or gets wrong."""
    federation, faults = Federation(4), set()
    federation.agree()
    seeds = [seed for own in federation.attempts.values() for seed in own._seeds.values()]
    words = {site: np.arange(20_000, dtype=np.uint32) for site in federation.identities}
    sent = federation.masked(words)
    if np.add.reduce(sent, dtype=np.uint32).tolist() != (4 * np.arange(20_000)).tolist():
        faults.add("sum")
    if not is_uniform(sent[0]):
        faults.add("upload")
    # All that a server knows of a pair, in the place of the pair's secret.
    own = federation.attempts["site-00"]
    assert own._context is not None
    keys = own._context.keys
    guesses = [bytes(32), *keys.values(), own._context.digest(), *(key for key in federation.roster.keys.values())]
    for guess in guesses:
        bare = sent[0].copy()
        for peer in list(keys)[1:]:
            add_mask(bare, seed_by_hand(guess, own._context.digest(), "site-00", peer), peer, "site-00")
        if not is_uniform(bare):
            faults.add("seed")
    bits = np.unpackbits(np.frombuffer(b"".join(seeds), dtype=np.uint8)).reshape(len(seeds), -1)
    if (bits.any(0) & ~bits.all(0)).sum() < 200:  # of 256; of six seeds some eight have a bit in common
        faults.add("short seed")
    return faults


def seed_of_the_server(private: Any, peer_key: bytes, context: bytes, own: str, peer: str) -> bytes:
    return seed_by_hand(bytes(32), context, *sorted((own, peer)))


def seed_of_32_bits(private: Any, peer_key: bytes, context: bytes, own: str, peer: str) -> bytes:
    whole = pair_seed(private, peer_key, context, own, peer)
    return whole[:4] + bytes(28)


def both_add(words: Words, seed: bytes, own: str, peer: str) -> None:
    words += mask_of(seed, len(words))


def through_floats(words: Words, seed: bytes, own: str, peer: str) -> None:
    add_mask(words, seed, own, peer)
    words[:] = words.astype(np.float32).astype(np.float64).astype(np.int64).astype(np.uint32)


def no_mask(words: Words, seed: bytes, own: str, peer: str) -> None:
    return


def test_a_round_as_it_is_has_no_fault() -> None:
    assert round_faults() == set()


@pytest.mark.parametrize(
    ("name", "fault", "found"),
    [
        ("pair_seed", seed_of_the_server, "seed"),
        ("pair_seed", seed_of_32_bits, "short seed"),
        ("add_mask", both_add, "sum"),
        ("add_mask", through_floats, "sum"),
        ("add_mask", no_mask, "upload"),
    ],
    ids=["a seed that the server knows", "a seed of 32 bits", "signs", "floats after masking", "no mask"],
)
def test_a_fault_built_in_is_found(name: str, fault: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, name, fault)
    assert found in round_faults()


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "secure-aggregation.md"


def test_the_pages_example_ends_in_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    exec(block, {})
    (found,) = re.findall(r"^tensor\((\S+), dtype=torch.float64\)$", capsys.readouterr().out, flags=re.M)
    assert (
        abs(float(found) - 3) < 6 * (1.5 * 2.0 * 0.5 * 2.0 * 0.5 / 1000) ** 0.5
    )  # of three sites where two make the whole


@pytest.mark.parametrize(("rate", "column"), [(0.33, 0), (1.0, 6)])
@pytest.mark.parametrize("honest", [2, 6])
def test_the_pages_prices_are_the_accountants(rate: float, column: int, honest: int) -> None:
    rows = re.findall(r"^\| [138] \|.*$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    cells = [cell.strip() for cell in rows[1].strip("|").split("|")]
    assert cells[column] == "3"
    noise = noise_multiplier_for(3.0, 1e-5, rate, 12)
    alone = epsilon([gaussian_release(noise_share(noise, 1.0, honest), rate, 12)], 1e-5)
    assert cells[column + {2: 1, 6: 4}[honest]] == f"{alone:.2f}"

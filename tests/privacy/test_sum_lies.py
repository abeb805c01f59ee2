"""Lies of a server about the sites of a sum, and rosters: each is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sum_parties import TASK, TERMS, Federation

from fedveil.common.errors import ConfigError, DataError, MechanismError, ProtocolError
from fedveil.privacy.secure_sum import AttemptName, Identity, KeyOffer, Roster, SiteAttempt, attempt
from fedveil.privacy.secure_sum.masks import Words, add_mask
from fedveil.privacy.secure_sum.roster import load_roster, parse_roster

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

"""Seeds, masks, signatures and encodings of a sum, against published vectors and code by hand."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sum_parties import TASK, TERMS, seed_by_hand

from fedveil.common.errors import ConfigError
from fedveil.privacy.secure_sum import AttemptName, Context, Identity, masks
from fedveil.privacy.secure_sum.canonical import canonical
from fedveil.privacy.secure_sum.identity import is_signed
from fedveil.privacy.secure_sum.masks import add_mask, mask_of, pair_seed

# --- known answers ----------------------------------------------------------------------------------------------------
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")


BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")


BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")


SECRET = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
"""Keys and secret of RFC 7748, section 6.1."""


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

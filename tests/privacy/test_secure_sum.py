"""Sums of which nobody sees the parts: masks that cancel and hide, keys that are checked, noise that is a share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sum_parties import TASK, TERMS, Federation, seed_by_hand

from audits.bands import out_of_band, related
from fedveil.common.errors import ConfigError, MechanismError, ProtocolError
from fedveil.privacy.accounting import epsilon, gaussian_release
from fedveil.privacy.calibration import noise_multiplier_for
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.secure_sum import (
    AttemptName,
    Context,
    SiteAttempt,
    Task,
    Terms,
    attempt,
    check_headroom,
    noise_share,
    rounded,
    rounding,
    total,
)
from fedveil.privacy.secure_sum import context as context_module
from fedveil.privacy.secure_sum.masks import Words, add_mask, mask_of, pair_seed


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


@pytest.mark.parametrize(("rate", "column"), [(0.33, 0), (1.0, 6)])
@pytest.mark.parametrize("honest", [2, 6])
def test_the_pages_prices_are_the_accountants(rate: float, column: int, honest: int) -> None:
    rows = re.findall(r"^\| [138] \|.*$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    cells = [cell.strip() for cell in rows[1].strip("|").split("|")]
    assert cells[column] == "3"
    noise = noise_multiplier_for(3.0, 1e-5, rate, 12)
    alone = epsilon([gaussian_release(noise_share(noise, 1.0, honest), rate, 12)], 1e-5)
    assert cells[column + {2: 1, 6: 4}[honest]] == f"{alone:.2f}"

"""Random numbers: private ones follow no seed and have the law they claim; public ones follow from seed and name.

Every statistical band raises a false alarm about once in a million runs, and each check is shown a planted fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from audits.bands import out_of_band
from audits.faults import same_seeds, shuffled_epochs
from audits.site_rounds import sampler_faults
from fedveil.common.errors import ConfigError
from fedveil.privacy.entropy import Source, system_integers
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.randomness import add_private_noise, private_poisson_sample, stream

pytestmark = pytest.mark.system_entropy

Normal = Callable[[tuple[int, ...], float], Tensor]
Sampler = Callable[[int, float], Tensor]


# --- Gaussian noise ---------------------------------------------------------------------------------------------------


def private_normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Return noise on nothing."""
    return add_private_noise(torch.zeros(shape), std)


def faults_of_normal(draw: Normal, shape: tuple[int, ...] = (400, 250), std: float = 2.5) -> set[str]:
    """Return what is wrong with ``draw``; at 100 000 values the band of the standard deviation is ±1.1 %."""
    z = (draw(shape, std) / std).flatten()
    root, faults = z.numel() ** 0.5, set()
    if abs(float(z.mean())) * root > 5:  # 6e-7
        faults.add("mean")
    if out_of_band(float(z.pow(2).sum()), z.numel()):
        faults.add("standard deviation")
    # Variances of z³ and of z⁴ - 3 are 15 and 96.
    if abs(float(z.pow(3).mean())) * root > 6 * 15**0.5:
        faults.add("skew")
    if abs(float(z.pow(4).mean()) - 3) * root > 6 * 96**0.5:
        faults.add("tails")
    if stats.kstest(z.numpy(), "norm").pvalue < 1e-6:
        faults.add("shape")
    if abs(float((z[:-1] * z[1:]).mean())) * root > 6:
        faults.add("neighbours")
    # Within 2.5 deviations every cell of the grid expects two numbers or more.
    most, step = int(2.5 * std / noise_grid(std)), noise_grid(std) / std
    cells = (z / step).round().long()
    found = torch.bincount(cells[cells.abs() <= most] + most, minlength=2 * most + 1).numpy()
    chances = np.diff(stats.norm.cdf((np.arange(-most, most + 2) - 0.5) * step))
    expected = z.numel() * chances
    if stats.norm.sf((((found - expected) ** 2 / expected).sum() - len(found)) / (2 * len(found)) ** 0.5) < 1e-9:
        faults.add("repeats")
    return faults


@pytest.mark.parametrize("shape", [(100_000,), (400, 250), (10, 100, 100), (1, 100_000)])
def test_private_noise_is_independent_gaussian_in_float64(shape: tuple[int, ...]) -> None:
    drawn = private_normal(shape, 1.0)
    assert drawn.shape == shape
    assert drawn.dtype == torch.float64
    assert faults_of_normal(private_normal, shape) == set()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda shape, std: private_normal(shape, std) / 2, "standard deviation"),
        (lambda shape, std: private_normal(shape, std) * 0.98, "standard deviation"),
        (lambda shape, std: private_normal(shape, std) + 0.03 * std, "mean"),
        (lambda shape, std: private_normal(shape, std).abs(), "skew"),
        (lambda shape, std: private_normal(shape, std).clamp(-2 * std, 2 * std), "tails"),
        (lambda shape, std: (torch.rand(shape, dtype=torch.float64) - 0.5) * 12**0.5 * std, "shape"),
        (
            lambda shape, std: private_normal(shape, std).flatten().repeat_interleave(2)[: shape[0] * shape[1]],
            "repeats",
        ),
        (lambda shape, std: private_normal(shape, std).flatten().sort().values, "neighbours"),
    ],
    ids=["half", "two percent low", "biased", "one-sided", "cut off", "uniform", "each value twice", "sorted"],
)
def test_the_noise_check_finds(fault: Normal, found: str) -> None:
    assert found in faults_of_normal(fault)


def test_a_single_number_and_nothing_at_all_have_their_shapes() -> None:
    assert private_normal((), 1.0).shape == ()
    assert private_normal((0, 3), 1.0).shape == (0, 3)
    many = torch.stack([private_normal((), 1.0) for _ in range(3000)])
    assert not out_of_band(float(many.pow(2).sum()), 3000)
    assert out_of_band(float((many / 2).pow(2).sum()), 3000), "half the noise went unnoticed"


def test_the_standard_deviation_scales_one_and_the_same_draw(replace_entropy: Callable[[Source], None]) -> None:
    bits = np.frombuffer(np.random.default_rng(0).bytes(1200), dtype=np.uint64)
    replace_entropy(lambda count: bits[:count])
    alone = private_normal((100,), 1.0)
    assert torch.equal(private_normal((100,), 2.0**-30), 2.0**-30 * alone)
    assert (private_normal((100,), 3.0) - 3.0 * alone).abs().max() <= (3 * noise_grid(1.0) + noise_grid(3.0)) / 2


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300])
def test_noise_of_no_size_is_refused(std: float) -> None:
    with pytest.raises(ConfigError, match="noise-std must be above"):
        private_normal((3,), std)


@pytest.mark.parametrize("bits", [0, 1, 2**63, 2**64 - 1])
def test_noise_is_finite_whatever_the_bits(bits: int, replace_entropy: Callable[[Source], None]) -> None:
    replace_entropy(lambda count: np.full(count, bits, dtype=np.uint64) if count > 1 else system_integers(count))
    assert (private_normal((2,), 1.0).abs() < 20).all()


def test_private_noise_follows_no_seed() -> None:
    def drawn(normal: Normal) -> Tensor:
        same_seeds()
        return normal((2000,), 1.0)

    first, second = drawn(private_normal), drawn(private_normal)
    assert (first == second).double().mean() < 0.01, "two numbers on the grid are equal with a chance of 3e-4"
    assert abs(float((first * second).mean())) < 6 / 2000**0.5
    seeded: Normal = lambda shape, std: torch.randn(shape, dtype=torch.float64) * std  # noqa: E731
    assert torch.equal(drawn(seeded), drawn(seeded)), "the check would not notice a seeded generator"


def test_private_randomness_leaves_public_generators_alone() -> None:
    same_seeds()
    wanted = (torch.rand(1).item(), float(np.random.rand()), random.random())
    same_seeds()
    private_normal((10,), 1.0)
    private_poisson_sample(10, 0.5)
    assert (torch.rand(1).item(), float(np.random.rand()), random.random()) == wanted


# --- Poisson sampling -------------------------------------------------------------------------------------------------


def inclusion(sample: Sampler, size: int, rate: float, draws: int) -> Tensor:
    """Return a 0/1 table, shape (draws, size), of who was in which sample."""
    table = torch.zeros(draws, size, dtype=torch.float64)
    for row in table:
        row[sample(size, rate)] = 1.0
    return table


def faults_of_sampler(sample: Sampler, rate: float, size: int = 60, draws: int = 2000) -> set[str]:
    return sampler_faults(inclusion(sample, size, rate, draws), rate)


@pytest.mark.parametrize("rate", [0.14, 0.5, 0.9])
def test_every_record_is_in_a_batch_with_the_plans_chance_independently_of_all_others(rate: float) -> None:
    assert faults_of_sampler(private_poisson_sample, rate) == set()


def _fixed_size(size: int, rate: float) -> Tensor:
    return torch.randperm(size)[: round(size * rate)]


def _first_half_preferred(size: int, rate: float) -> Tensor:
    chance = torch.full((size,), rate)
    chance[: size // 2] += 0.05
    chance[size // 2 :] -= 0.05
    return (torch.rand(size) < chance).nonzero()[:, 0]


def _whole_authors(size: int, rate: float) -> Tensor:
    return (torch.rand(size // 2) < rate).repeat_interleave(2).nonzero()[:, 0]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda size, rate: private_poisson_sample(size, rate * 1.05), "rate"),
        (_fixed_size, "size of a batch"),
        (_first_half_preferred, "chance of a record"),
        (_whole_authors, "two records"),
        (shuffled_epochs(), "two draws"),
    ],
    ids=["rate too high", "fixed size", "some preferred", "in pairs", "shuffled epochs"],
)
def test_the_sampler_check_finds(fault: Sampler, found: str) -> None:
    torch.manual_seed(11)
    assert found in faults_of_sampler(fault, 0.5)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 300), rate=st.floats(0, 1))
def test_a_sample_is_ascending_indices_of_records_that_exist(size: int, rate: float) -> None:
    sample = private_poisson_sample(size, rate)
    assert sample.dtype == torch.int64
    assert sample.tolist() == sorted(set(sample.tolist()) & set(range(size)))


def test_rate_one_takes_everyone_and_rate_zero_no_one() -> None:
    assert private_poisson_sample(7, 1.0).tolist() == list(range(7))
    assert private_poisson_sample(5000, 0.0).tolist() == []
    assert private_poisson_sample(0, 0.5).tolist() == private_poisson_sample(0, 1.0).tolist() == []


def test_the_threshold_is_exact_to_the_last_bit(replace_entropy: Callable[[Source], None]) -> None:
    edge = np.array([2**62 - 1, 2**62, 0, 2**64 - 1], dtype=np.uint64)
    replace_entropy(lambda count: edge[:count])
    assert private_poisson_sample(4, 0.25).tolist() == [0, 2]
    assert private_poisson_sample(4, float(np.nextafter(1.0, 0.0))).tolist() == [0, 1, 2]


def test_private_batches_follow_no_seed() -> None:
    def drawn(sample: Sampler) -> list[int]:
        same_seeds()
        return sample(400, 0.5).tolist()

    # Two samples of 400 records are the same with chance 2^-400.
    assert drawn(private_poisson_sample) != drawn(private_poisson_sample)
    seeded: Sampler = lambda size, rate: (torch.rand(size) < rate).nonzero()[:, 0]  # noqa: E731
    assert drawn(seeded) == drawn(seeded), "the check would not notice a seeded sampler"


# --- public streams ---------------------------------------------------------------------------------------------------


def first(seed: int, *names: object) -> list[float]:
    return torch.rand(3, generator=stream(seed, *names), dtype=torch.float64).tolist()


def test_a_public_stream_is_the_same_for_everyone_and_untouched_by_global_seeds() -> None:
    torch.manual_seed(1)
    one = first(7, "adapter", "layer.0", "A")
    torch.manual_seed(2)
    assert first(7, "adapter", "layer.0", "A") == one


def test_public_streams_differ_by_seed_and_by_every_name() -> None:
    streams = [(1, "head"), (2, "head"), (1, "adapter"), (1, "batches", "site-1", 1), (1, "batches", "site-1", 2)]
    assert len({tuple(first(*names)) for names in streams}) == len(streams)


def test_two_calls_of_a_stream_do_not_share_a_position() -> None:
    one, other = stream(1, "head"), stream(1, "head")
    torch.rand(5, generator=one)
    assert torch.rand(1, generator=other).item() == torch.rand(1, generator=stream(1, "head")).item()


def test_the_stream_of_a_name_never_changes_between_versions() -> None:
    # int.from_bytes(sha256(b"1/a/b").digest()[:8], "big") >> 1, and torch's Mersenne Twister at that seed.
    assert stream(1, "a", "b").initial_seed() == 7298789200918546523
    assert first(1, "a", "b")[:2] == [0.05126401216559828, 0.8498313276241878]

"""Epochs without privacy: every record once, in batches of like length, in an order that only the seed decides."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common.errors import DataError
from fedveil.common.model.batching import WINDOW, epoch_batches, length_batches
from fedveil.privacy.randomness import stream

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


def take(lengths: list[int], rate: float, steps: int, *, skipped: int = 0, seed: int = 1) -> list[list[int]]:
    return list(islice(epoch_batches(lengths, rate, stream(seed, "batches", "site"), skipped), steps))


@given(LENGTHS, st.integers(1, 200))
def test_parts_hold_no_more_tokens_than_they_may_and_every_record_once(lengths: list[int], budget: int) -> None:
    groups = length_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * lengths[group[0]] <= budget for group in groups)


@given(LENGTHS, st.floats(0.01, 1.0))
def test_an_epoch_holds_no_record_twice_and_the_run_leaves_none_out(lengths: list[int], rate: float) -> None:
    count = max(1, round(rate * len(lengths)))
    whole = len(lengths) // count
    batches = take(lengths, rate, 3 * whole + 3)
    assert {len(batch) for batch in batches} == {count}
    first = [i for batch in batches[:whole] for i in batch]
    assert len(first) == len(set(first)), "a record came twice before the epoch was over"
    assert {i for batch in batches for i in batch} == set(range(len(lengths))), "a record never came"
    times = torch.bincount(torch.tensor([i for batch in batches for i in batch]), minlength=len(lengths))
    assert int(times.max() - times.min()) <= 2, "some records come more often than others"


@given(LENGTHS, st.floats(0.01, 1.0), st.integers(0, 40))
def test_a_run_that_goes_on_gets_the_batches_that_would_have_come(lengths: list[int], rate: float, skip: int) -> None:
    assert take(lengths, rate, skip + 3)[skip:] == take(lengths, rate, 3, skipped=skip)


def test_batches_hold_like_lengths_and_come_in_no_order_of_length() -> None:
    lengths = torch.randint(5, 60, (1900,), generator=torch.Generator().manual_seed(3)).tolist()
    batches = take(lengths, 0.018, WINDOW * 6)
    order = stream(2, "batches", "site")
    plain = torch.randperm(len(lengths), generator=order).split(34)[: len(batches)]

    def padded(groups: list[list[int]]) -> int:
        cut = [(group, part) for group in groups for part in length_batches([lengths[i] for i in group], 1024)]
        return sum(len(part) * max(lengths[group[i]] for i in part) for group, part in cut)

    assert padded(batches) < 0.85 * padded([part.tolist() for part in plain]), "the sorting saves no padding"
    means = torch.tensor([sum(lengths[i] for i in batch) / len(batch) for batch in batches])
    rising = int((means[1:] > means[:-1]).sum())
    assert 0.25 * len(means) < rising < 0.75 * len(means), "short records come before long ones"


def test_the_seed_and_the_site_decide_the_order() -> None:
    lengths = list(range(1, 101))
    assert take(lengths, 0.1, 5) == take(lengths, 0.1, 5)
    assert take(lengths, 0.1, 5) != take(lengths, 0.1, 5, seed=2)


def test_a_site_without_records_is_told_so() -> None:
    with pytest.raises(DataError, match="no records to train on"):
        take([], 0.5, 1)
